"""The thread that publishes output: who subscribes is heard, whatever is published meanwhile."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from jupyter_client.session import Session

from warmcell.sandbox.guest.kernel.iopub import Publisher, Stream, in_order

TIMEOUT_MS = 60_000
SESSION = Session(key=b"")


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.linger = 0
    socket.bind(f"ipc://{tmp_path}/iopub")
    made = Publisher(socket, session=SESSION)
    made.start()
    try:
        yield made
    finally:
        in_order(made, made._event_pipe_gc_task.cancel, timeout=TIMEOUT_MS / 1000)
        made.stop()
        made.close()
        context.destroy(linger=0)


def test_who_has_left_unheard_is_not_taken_for_a_listener(publisher: Publisher, tmp_path: Path) -> None:
    """As in a kernel that was saved with somebody subscribed: what it says waits for whoever listens next."""
    with zmq.Context() as context:
        before = context.socket(zmq.SUB)
        before.subscribe(b"")
        before.connect(f"ipc://{tmp_path}/iopub")
        assert before.poll(TIMEOUT_MS)
        let_go = threading.Event()

        def come_back() -> None:
            """All in the publisher's thread, so that nothing wakes it for the one that has left."""
            publisher.hold()
            before.close(linger=0)
            publisher.socket.poll(TIMEOUT_MS)
            publisher._really_send(SESSION.serialize(SESSION.msg("status", {"execution_state": "idle"})))
            publisher.let_go()
            let_go.set()

        publisher.schedule(come_back)
        assert let_go.wait(TIMEOUT_MS / 1000)
        with context.socket(zmq.SUB) as after:
            after.linger = 0
            after.subscribe(b"")
            after.connect(f"ipc://{tmp_path}/iopub")
            kinds = []
            while "status" not in kinds:
                assert after.poll(TIMEOUT_MS)
                _, frames = SESSION.feed_identities(after.recv_multipart())
                kinds.append(str(SESSION.deserialize(frames)["msg_type"]))


def test_a_subscription_that_comes_while_it_publishes_is_heard(publisher: Publisher, tmp_path: Path) -> None:
    """libzmq wakes the thread once for a subscription, and sending uses that up; the welcome comes all the same."""
    publishing, heard = threading.Event(), threading.Event()

    def publish_until_it_has_come() -> None:
        message = SESSION.serialize(SESSION.msg("status", {"execution_state": "starting"}))
        publishing.set()
        while not heard.wait(0.002):  # libzmq looks for what has come at most once in a millisecond.
            publisher._really_send(message)

    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:

        def next_kind() -> str:
            assert subscriber.poll(TIMEOUT_MS)
            _, frames = SESSION.feed_identities(subscriber.recv_multipart())
            return str(SESSION.deserialize(frames)["msg_type"])

        subscriber.linger = 0
        subscriber.subscribe(b"other")
        subscriber.connect(f"ipc://{tmp_path}/iopub")
        assert next_kind() == "iopub_welcome"
        for _ in range(2):  # The thread has been woken for all that the connection brought.
            assert in_order(publisher, lambda: None, timeout=TIMEOUT_MS / 1000)
        publisher.schedule(publish_until_it_has_come)
        assert publishing.wait(TIMEOUT_MS / 1000)
        subscriber.subscribe(b"")
        assert next_kind() == "status"
        heard.set()
        while next_kind() != "iopub_welcome":
            pass


def test_a_flush_waits_only_for_what_was_printed(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was printed all is published when it returns; of what was not, the publishing thread hears nothing."""
    stream = Stream(SESSION, publisher, "stdout", watchfd=False)
    said: list[str] = []
    monkeypatch.setattr(SESSION, "send", lambda _, message, **__: said.append(message["content"]["text"]))
    asked = threading.Event()
    schedule = publisher.schedule

    def noted(what: Callable[[], object]) -> None:
        asked.set()
        schedule(what)

    monkeypatch.setattr(publisher, "schedule", noted)
    stream.flush()
    assert not asked.is_set()
    for number in range(100):
        print(number, file=stream)
        stream.flush()
        assert said.pop() == f"{number}\n"
    asked.clear()
    stream.flush()
    assert not asked.is_set()
    late = threading.Thread(target=print, args=("late",), kwargs={"file": stream})
    late.start()
    late.join()
    stream.flush()
    assert said == ["late\n"]
