"""One cell on one rank: a connection whose messages go into the inbox of its fan-out.

No thread is between: whoever asks the inbox waits for the connections themselves, and reads what has come.
"""

from __future__ import annotations

import collections
import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..values import loads
from . import doors
from .incoming import Answer

if TYPE_CHECKING:
    from .api import UnixConnection


class Event(NamedTuple):
    """Something of a run: a message of its output, its end (`done`), or why it failed (`error`)."""

    run: Run
    message: Mapping[str, Any] | None = None
    done: Mapping[str, Any] | None = None
    error: BaseException | None = None


class Inbox:
    """What the runs of one fan-out say, in order."""

    def __init__(self) -> None:
        self._events: collections.deque[Event] = collections.deque()
        self._runs: dict[int, Run] = {}
        self._poll = select.poll()

    def watch(self, fd: int, run: Run) -> None:
        """Have it read when something comes at its connection."""
        self._runs[fd] = run
        self._poll.register(fd, select.POLLIN)

    def leave(self, fd: int) -> None:
        """No longer. Idempotent."""
        if self._runs.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def put(self, event: Event) -> None:
        """Add one."""
        self._events.append(event)

    def get(self, timeout: float | None = None) -> Event | None:
        """The next one; None if there is none for `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._events:
            left = None if until is None else 1000 * max(0.0, until - time.monotonic())
            ready = self._poll.poll(left)
            for fd, _ in ready:
                if fd in self._runs:
                    self._runs[fd].read()
            if left is not None and (not ready or not left) and not self._events:
                return None
        return self._events.popleft()


class Run:
    """A cell that runs on a rank. It is begun and read by one thread; others may abort it."""

    def __init__(
        self,
        take: Callable[[], UnixConnection],
        path: str,
        head: Mapping[str, Any],
        body: bytes,
        inbox: Inbox,
        failure: Callable[[bytes | Mapping[str, Any] | BaseException], BaseException],
        keep: Callable[[UnixConnection], None],
    ) -> None:
        """Prepare it.

        Args:
            take: Gives a connection, once it begins.
            path: Of the request.
            head: Its first line.
            body: The values behind it.
            inbox: Where what comes of it goes.
            failure: Makes an error of what has come instead of its end.
            keep: Gets the connection once it has ended well.
        """
        self.rank = int(head.get("rank", 0))
        self.task = -1
        """Whatever its fan-out calls what it does."""
        self.values: dict[str, Any] = {}
        """What was brought back, once it is done."""
        self.size = 0
        """Bytes that come back, once that is known."""
        self.got = 0
        """Those that have come."""
        self.begun = False
        self._take = take
        self._keep = keep
        self._connection: UnixConnection | None = None
        self._lock = threading.Lock()
        """Whoever has it lets go of the connection, or keeps it for another run, but not both."""
        self._inbox = inbox
        self._failure = failure
        self._aborted: BaseException | None = None
        line = json.dumps(head).encode() + b"\n"
        begin = f"POST {path} HTTP/1.1\r\nHost: keeper\r\nContent-Length: {len(line) + len(body)}\r\n\r\n"
        self._request = b"".join((begin.encode(), line, body))
        self._answer: Answer | None = None
        self._fd = -1
        self._passing = contextlib.ExitStack()
        self._rest = bytearray()
        """Of the answer's body: a line that has not ended; of one that is an error, all of it."""
        self._looked = 0
        """So much of that has no end of a line."""
        self._done: Mapping[str, Any] | None = None
        self._data = bytearray()
        """What comes back, in memory that arrays may go on using."""

    def begin(self) -> None:
        """Let it run. What goes wrong comes out of the inbox."""
        self.begun = True
        try:
            self._passing.enter_context(doors.passing(None))
            with self._lock:
                connection = self._connection = self._take()
                if connection.sock is None:
                    connection.connect()
                self._fd = connection.sock.fileno()
            if self._aborted is not None:
                raise self._aborted
            connection.sock.setblocking(True)
            with contextlib.suppress(BrokenPipeError):  # Refused before all was sent; the answer says why.
                connection.sock.sendall(self._request)  # At once, so that it wakes the keeper once.
            connection.sock.setblocking(False)
            self._answer = Answer(connection.sock)
            self._inbox.watch(self._fd, self)
        except Exception as error:
            self._fail(error)

    def read(self) -> None:
        """Something has come: put what it is into the inbox."""
        try:
            if self._heard():
                self._end()
        except BlockingIOError:
            pass
        except Exception as error:
            self._fail(error)

    def abort(self, why: BaseException) -> None:
        """Give up waiting: its end is the error `why`. Callable from any thread."""
        self._aborted = self._aborted or why
        with self._lock, contextlib.suppress(OSError, AttributeError):
            if self._connection is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go; a cell that still runs is interrupted by the keeper. Idempotent."""
        self._inbox.leave(self._fd)
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._passing.close()

    def _heard(self) -> bool:
        """Take in what has come; whether that was all."""
        answer = self._answer
        assert answer is not None
        if self.got < self.size and (got := answer.read_into(memoryview(self._data)[self.got :])):
            self.got += got
            return answer.ended
        for part in answer.read():
            if self.size:
                self._data[self.got : self.got + len(part)] = part
                self.got += len(part)
            else:
                self._rest += part
                self._read_lines(answer.status)
        return answer.ended

    def _read_lines(self, status: int) -> None:
        at = 0
        while status == 200 and self._done is None:
            end = self._rest.find(b"\n", max(at, self._looked))
            if end < 0:
                break
            message = json.loads(self._rest[at:end])
            at = end + 1
            if message.get("done"):
                self._done = message
                self.size, self.got = int(message.get("get") or 0), len(self._rest) - at
                self._data = bytearray(self.size)
                self._data[: self.got] = self._rest[at:]
            else:
                self._inbox.put(Event(self, message=message))
        del self._rest[:at]
        self._looked = len(self._rest)

    def _end(self) -> None:
        """All of the answer is there."""
        assert self._answer is not None
        if self._answer.status != 200:
            raise self._failure(bytes(self._rest))
        if self._done is None or self.got != self.size:
            raise EOFError("the answer ended early")
        if self._done.get("failure"):
            raise self._failure(self._done["failure"])
        if self.size:
            self.values = loads(self._data)
        self._inbox.leave(self._fd)
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            self._keep(connection)
        self._passing.close()
        self._inbox.put(Event(self, done=dict(self._done)))

    def _fail(self, error: BaseException) -> None:
        told = error if getattr(error, "code", None) is not None else self._failure(error)
        self.close()
        self._inbox.put(Event(self, error=self._aborted or told))
