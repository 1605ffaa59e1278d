"""Busy, idle, and what waits."""

from warmcell.kernel_provisioner.proxy.activity import Activity
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
