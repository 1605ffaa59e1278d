"""Busy, idle, and what waits."""

from warmcell.kernel_provisioner.proxy.activity import KEPT_MAX_BYTES, Activity
from warmcell.kernel_provisioner.proxy.requests import WAITING_MAX_BYTES, WAITING_MAX_MESSAGES, Requests
from warmcell.kernel_provisioner.proxy.wire import Author


def test_a_cell_is_open_until_the_kernel_is_idle() -> None:
    """The reply may come before the last output; only idle ends a cell."""
    activity = Activity()
    activity.asked("execute_request", "1")
    assert (activity.busy, activity.open_requests) == (True, 1)
    activity.status("busy", "execute_request", "1")
    activity.answered("1")
    assert activity.busy
    activity.status("idle", "execute_request", "1")
    assert (activity.busy, activity.open_requests) == (False, 0)


def test_what_a_page_asks_by_itself_is_no_sign_of_a_user() -> None:
    """A refresh makes nothing busy and does not move the last activity."""
    activity = Activity()
    activity.last = 0.0
    for name in ("kernel_info_request", "comm_info_request", "history_request"):
        activity.asked(name, name)
        activity.status("busy", name, name)
        assert not activity.busy
        activity.answered(name)
        activity.status("idle", name, name)
    assert activity.last == 0.0
    assert activity.open_requests == 0
    activity.output()
    assert activity.last > 0.0


def test_what_a_dead_kernel_was_asked_is_forgotten() -> None:
    """Requests that wait for the next kernel stay open; those that went down with the last do not."""
    activity = Activity()
    activity.asked("execute_request", "lost")
    activity.asked("execute_request", "waits")
    activity.sent("lost")
    activity.status("busy", "execute_request", "lost")
    activity.forgotten(waiting=frozenset({"waits"}))
    assert (activity.busy, activity.open_requests) == (True, 1)
    activity.forgotten(waiting=frozenset())
    assert (activity.busy, activity.open_requests) == (False, 0)


def test_waiting_requests_are_bounded_in_number_and_bytes() -> None:
    """Above either bound clients keep their messages; order within a channel stays."""
    requests = Requests()
    _, small = Author().make("execute_request", {})
    for number in range(WAITING_MAX_MESSAGES):
        assert requests.room("shell")
        requests.put("shell", str(number), small)
    assert not requests.room("shell")
    assert requests.room("control")
    assert requests.take("shell") == ("0", small)
    assert requests.room("shell")
    assert requests.names() == {str(number) for number in range(1, WAITING_MAX_MESSAGES)}

    _, large = Author().make("comm_msg", {})
    large.buffers.append(bytes(WAITING_MAX_BYTES))
    requests.put("control", "large", large)
    assert not requests.room("shell")
    assert requests.take("control") == ("large", large)
    assert requests.room("shell")
    assert requests.take("control") is None


def test_what_the_kernel_has_is_known_in_order_and_given_up() -> None:
    """Requests that it was given and has not finished; those put to it again come before those that wait."""
    activity = Activity()
    for name in ("first", "second", "waits"):
        activity.asked("execute_request", name, "shell", Author().make("execute_request", {})[1])
    activity.sent("first")
    activity.sent("second")
    activity.status("busy", "execute_request", "first")
    assert activity.in_kernel() == ("first", "second")
    (first, running), (second, queued) = activity.give_up()
    assert (first, running.begun, second, queued.begun) == ("first", True, "second", False)
    assert activity.in_kernel() == ()
    activity.asked_again(second, queued)
    assert activity.open_requests == 2
    activity.sent("waits")
    activity.sent("second")
    assert activity.in_kernel() == ("second", "waits")


def test_what_is_kept_of_requests_is_bounded() -> None:
    """Of a request that is too large only what is needed for an answer stays, until others are finished."""
    activity = Activity()
    for name in ("a", "b", "c"):
        message = Author().make("execute_request", {})[1]
        message.buffers.append(bytes(KEPT_MAX_BYTES // 2 - 1000))
        activity.asked("execute_request", name, "shell", message)
        activity.sent(name)
    assert [each.whole for each in activity.unanswered().values()] == [True, True, False]
    assert all(each.message is not None for each in activity.unanswered().values())
    activity.status("idle", "execute_request", "a")
    activity.asked("execute_request", "d", "shell", message)
    activity.sent("d")
    assert activity.unanswered()["d"].whole


def test_inherited_requests_keep_a_kernel_busy_until_they_are_idle() -> None:
    """A clone in the middle of a cell is not idle, though nobody here has asked for that cell."""
    activity = Activity()
    activity.asked("execute_request", "own")
    activity.inherited(["own", "other"])
    activity.status("idle", "execute_request", "own")
    assert (activity.busy, activity.idle_s) == (True, 0.0)
    activity.status("idle", "execute_request", "other")
    assert not activity.busy
    assert activity.idle_s >= 0.0
