"""One cell on one rank: a connection whose messages go into the inbox of its fan-out."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..values import loads
from . import doors

if TYPE_CHECKING:
    from .api import UnixConnection

MESSAGES_MAX = 1000
"""How many may wait to be shown; beyond that the remote cells wait."""


class Event(NamedTuple):
    """Something of a run: a message of its output, its end (`done`), or why it failed (`error`)."""

    run: Run
    message: Mapping[str, Any] | None = None
    done: Mapping[str, Any] | None = None
    error: BaseException | None = None


class Inbox:
    """What the runs of one fan-out say, in order; whoever says it waits while it is full."""

    def __init__(self) -> None:
        self._events: collections.deque[Event] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, event: Event) -> None:
        """Add one; thrown away when nobody reads any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._events) < MESSAGES_MAX)
            if not self._closed:
                self._events.append(event)
                self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Event | None:
        """The next one; None if there is none for `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._events), timeout):
                return None
            self._changed.notify_all()
            return self._events.popleft()

    def close(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._closed = True
            self._events.clear()
            self._changed.notify_all()


class Run:
    """A cell that runs on a rank.

    The connection belongs to a thread, so that an interrupt of the waiting one cannot tear a message apart.
    """

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
        self._thread = threading.Thread(target=self._talk, args=(path, line, body), daemon=True, name="warmcell-remote")

    def begin(self) -> None:
        """Let it run."""
        self.begun = True
        self._thread.start()

    def abort(self, why: BaseException) -> None:
        """Give up waiting: its end is the error `why`. Callable from any thread."""
        self._aborted = self._aborted or why
        self.close()

    def close(self) -> None:
        """Let go; a cell that still runs is interrupted by the keeper. Idempotent."""
        with self._lock, contextlib.suppress(OSError, AttributeError):
            if self._connection is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)

    def _talk(self, path: str, head: bytes, body: bytes) -> None:
        with doors.passing(None), contextlib.ExitStack() as stack:
            try:
                with self._lock:
                    connection = self._connection = self._take()
                    stack.callback(connection.close)
                if self._aborted is not None:
                    raise self._aborted
                done = self._exchange(connection, path, head, body)
                with self._lock:
                    self._connection = None
                    stack.pop_all()
                    self._keep(connection)
            except Exception as error:
                told = error if getattr(error, "code", None) is not None else self._failure(error)
                self._inbox.put(Event(self, error=self._aborted or told))
            else:
                self._inbox.put(Event(self, done=done))

    def _exchange(self, connection: UnixConnection, path: str, head: bytes, body: bytes) -> Mapping[str, Any]:
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/octet-stream")
        connection.putheader("Content-Length", str(len(head) + len(body)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError):  # Refused before all was sent; the answer says why.
            connection.send(head + body)
        response = connection.getresponse()
        if response.status != 200:
            raise self._failure(response.read())
        while True:
            line = response.readline()
            if not line:
                raise EOFError("the answer ended early")
            message = json.loads(line)
            if message.get("done"):
                break
            self._inbox.put(Event(self, message=message))
        if message.get("failure"):
            raise self._failure(message["failure"])
        size = int(message.get("get") or 0)
        if size:
            self.values = loads(_read(response, size))
        response.read()  # The end of it, so that the connection is good for another one.
        return dict(message)


def _read(response: http.client.HTTPResponse, size: int) -> bytearray:
    """So many bytes, in memory that arrays may go on using."""
    data = bytearray(size)
    view = memoryview(data)
    at = 0
    while at < size:
        got = response.readinto(view[at:])
        if not got:
            raise EOFError("the values ended early")
        at += got
    return data
