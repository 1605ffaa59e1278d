"""What a kernel prints, and the thread that publishes it, such that nothing is lost while nobody can listen.

libzmq drops what a publisher says when nobody is subscribed, and when a subscriber is a thousand messages behind. Here
it is kept in both cases, in order, up to a bound; past that the oldest output goes, and in its place it is said so.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import zmq
from ipykernel import kernelapp
from ipykernel.iostream import IOPubThread, OutStream
from zmq.eventloop.zmqstream import ZMQStream

KEPT_MAX_BYTES = 64 * 2**20
TEXT_MAX = 256 * 1024
"""Characters of one message; what is printed between two flushes goes in several, if it is more."""

LINGER_MS = 3000
"""How long a forked child tries to hand over what it has printed."""

WELCOME_TIMEOUT_MS = 1000
"""How long a welcome, sent in ipykernel's own way, may wait for room."""

RETRY_S, RETRY_MAX_S = 0.001, 0.05
"""A publisher that may not drop has no event for room in its queue; it can only be tried again."""

OUTPUT = (b"stream", b"display_data", b"update_display_data", b"execute_result")
"""What may go past the bound. States, comms and errors stay: they are small, and others wait for them."""

DELIMITER = b"<IDS|MSG>"


def install(prefix: str) -> None:
    """Let the application that comes up next in this process use this thread.

    Args:
        prefix: Of its sockets; children print at one more of them. A TCP port, as ipykernel has it, may be taken where
            a saved kernel comes back.
    """
    Publisher.children_at = f"ipc://{prefix}-6"
    kernelapp.IOPubThread = Publisher  # type: ignore[attr-defined]
    kernelapp.IPKernelApp.outstream_class = f"{__name__}.{Stream.__name__}"  # type: ignore[assignment]


class Stream(OutStream):
    """stdout or stderr, whose flush does nothing where there is nothing to be flushed.

    In ipykernel each flush waits for the thread that publishes, and each cell ends with four.
    """

    _printed = False
    _publishing = False

    def write(self, string: str) -> int:
        """Print (the base's)."""
        written: Any = super().write(string)
        self._printed = True
        return int(written or 0)

    def flush(self) -> None:
        """Wait until what was printed is on its way (the base's)."""
        if self._printed or self._publishing:
            super().flush()  # type: ignore[no-untyped-call]

    def _flush(self) -> None:
        self._publishing = True  # Before the other is taken back, so that nothing is between them.
        self._printed = False
        try:
            super()._flush()  # type: ignore[no-untyped-call]
        finally:
            self._publishing = False

    def _flush_buffers(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Much that was printed in no time (the base's) goes in pieces: one message of all of it would be too large."""
        for parent, text in super()._flush_buffers():  # type: ignore[no-untyped-call]
            for at in range(0, len(text), TEXT_MAX):
                yield parent, text[at : at + TEXT_MAX]


class Kept:
    """Messages in order, of which the oldest output is left out where they come to too much."""

    def __init__(self, most_bytes: int = KEPT_MAX_BYTES) -> None:
        self._most_bytes = most_bytes
        self._messages: deque[list[bytes]] = deque()
        self._bytes = 0
        self._left_out = 0
        self._left_out_bytes = 0
        self._left_out_after: list[bytes] = []

    def __len__(self) -> int:
        return len(self._messages) + bool(self._left_out)

    def add(self, message: list[Any]) -> None:
        """Keep a copy of a message, as what its buffers refer to may change."""
        frames = [bytes(frame) for frame in message]
        self._messages.append(frames)
        self._bytes += _size(frames)
        if self._bytes > self._most_bytes:
            self._make_room()

    def first(self, session: Any) -> list[bytes]:
        """The next one to be sent; where output was left out, a line that says so comes before."""
        if self._left_out:
            return self._notice(session)
        return self._messages[0]

    def sent(self) -> None:
        """The first has been sent."""
        if self._left_out:
            self._left_out = self._left_out_bytes = 0
        else:
            self._bytes -= _size(self._messages.popleft())

    def _make_room(self) -> None:
        staying: list[list[bytes]] = []
        while self._messages and self._bytes > self._most_bytes * 3 // 4:
            frames = self._messages.popleft()
            if not _is_output(frames):
                staying.append(frames)
                continue
            size = _size(frames)
            self._bytes -= size
            self._left_out += 1
            self._left_out_bytes += size
            self._left_out_after = frames
        self._messages.extendleft(reversed(staying))

    def _notice(self, session: Any) -> list[bytes]:
        text = f"\n[Warmcell left out {self._left_out_bytes / 2**20:.0f} MiB of output that nobody could be shown]\n"
        at = self._left_out_after.index(DELIMITER)
        parent = json.loads(self._left_out_after[at + 3])
        message = session.msg("stream", {"name": "stderr", "text": text}, parent={"header": parent})
        return [bytes(frame) for frame in session.serialize(message, ident=b"stream.stderr")]


def _size(frames: list[bytes]) -> int:
    return sum(map(len, frames))


def _is_output(frames: list[bytes]) -> bool:
    """Whether that is a message which may be left out; by its header, as topics are made in several ways."""
    try:
        header = frames[frames.index(DELIMITER) + 2]
    except (ValueError, IndexError):
        return False
    return any(b'"msg_type": "%s"' % kind in header or b'"msg_type":"%s"' % kind in header for kind in OUTPUT)


class Publisher(IOPubThread):
    """ipykernel's thread for output, which keeps what nobody can hear for now."""

    children_at = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kept = Kept()
        self._holding = False
        self._subscriptions = 0
        self._retry_s = 0.0
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.hears_subscriptions:
            self.socket.setsockopt(zmq.XPUB_NODROP, 1)
            self.socket.setsockopt(zmq.SNDTIMEO, WELCOME_TIMEOUT_MS)
            self.socket.setsockopt(zmq.XPUB_VERBOSER, 1)

    @property
    def hears_subscriptions(self) -> bool:
        """Whether it is told when somebody listens; ipykernel before version 7 has another kind of socket."""
        return bool(self.socket.getsockopt(zmq.TYPE) == zmq.XPUB)

    def hold(self) -> None:
        """In its thread: from now on keep everything, until somebody subscribes or `let_go`."""
        self._holding = True

    def let_go(self) -> None:
        """In its thread: what was kept goes out, now or as soon as somebody is subscribed."""
        self._hear()
        if self._subscriptions > 0 or not self.hears_subscriptions:
            self._go_on()

    def _go_on(self) -> None:
        self._holding = False
        self._send_kept()

    def _hear(self) -> None:
        """Take note of who has come and gone. Where it was saved meanwhile nothing may wake it for them, and whoever
        listened to the one that was saved is no longer there.
        """
        with contextlib.suppress(AttributeError, zmq.ZMQError):  # There is none, or it is closed.
            self._xpub_stream.flush(zmq.POLLIN)

    def _handle_subscription(self, frames: Any) -> None:
        with contextlib.suppress(zmq.Again):
            super()._handle_subscription(frames)  # type: ignore[no-untyped-call]  # It welcomes the subscriber.
        for frame in frames:
            self._subscriptions = max(0, self._subscriptions + (1 if frame[:1] == b"\x01" else -1))
            if frame[:1] == b"\x01":
                self._go_on()

    def _really_send(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        if self.closed or not super()._is_master_process():  # type: ignore[no-untyped-call]
            super()._really_send(msg, *args, **kwargs)  # type: ignore[no-untyped-call]
        elif self._kept or self._holding:
            if self._holding and _is_about_saving(msg):
                super()._really_send(msg, *args, **kwargs)  # type: ignore[no-untyped-call]
            else:
                self._kept.add(msg)
            self._look_for_subscriptions()
        elif not self._sent(msg, **kwargs):
            self._kept.add(msg)
            self._try_later()

    def _sent(self, msg: Any, **kwargs: Any) -> bool:
        try:
            super()._really_send(msg, **{**kwargs, "flags": zmq.DONTWAIT})  # type: ignore[no-untyped-call]
        except zmq.Again:
            return False
        finally:
            self._look_for_subscriptions()
        return True

    def _look_for_subscriptions(self) -> None:
        """libzmq wakes this thread only once for one that comes, and sending uses that up."""
        with contextlib.suppress(AttributeError, zmq.ZMQError):  # It is closed meanwhile.
            if self.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                self.io_loop.add_callback(self._xpub_stream.flush, zmq.POLLIN)

    def _send_kept(self) -> None:
        self._retry_s = 0.0
        self._try_kept()

    def _try_kept(self) -> None:
        while self._kept and not self._holding and not self.closed:
            if not self._sent(self._kept.first(self.session)):
                self._try_later()
                return
            self._retry_s = 0.0
            self._kept.sent()

    def _try_later(self) -> None:
        self._retry_s = min(RETRY_MAX_S, max(RETRY_S, 2 * self._retry_s))
        self.io_loop.call_later(self._retry_s, self._try_kept)

    # What forked children print.

    def _setup_pipe_in(self) -> None:
        incoming = self.socket.context.socket(zmq.PULL)
        incoming.linger = 0
        self._pipe_uuid = os.urandom(16)
        incoming.bind(self.children_at)
        self._pipe_in = ZMQStream(incoming, self.io_loop)
        self._pipe_in.on_recv(self._handle_pipe_msg)

    def _setup_pipe_out(self) -> tuple[Any, Any]:
        context: Any = zmq.Context()
        outgoing = context.socket(zmq.PUSH)
        outgoing.linger = LINGER_MS
        outgoing.connect(self.children_at)
        return context, outgoing


def _is_about_saving(msg: Any) -> bool:
    """Whether that is the state of a request for saving, whose end tells the other side that it has heard all."""
    try:
        at = msg.index(DELIMITER)
        return b"warmcell_" in bytes(msg[at + 3])[:4096]
    except (ValueError, IndexError):
        return False


def in_order(publisher: Any, what: Callable[[], object], *, timeout: float) -> bool:
    """Have the publisher's thread do something after all that was published so far; whether it was done in time."""
    done = threading.Event()

    def do() -> None:
        what()
        done.set()

    publisher.schedule(do)
    return done.wait(timeout)
