"""One request and its answers: JSON lines over a Unix stream socket, descriptors on the first byte."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import struct

from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

LINE_MAX_BYTES = 1 << 16
REQUEST_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 600.0
"""For one piece of a stream: whoever sends or takes it may have a slow disk or a slow line."""
PIECE_MAX_BYTES = 1 << 23
FDS_MAX = 64


class Answers:
    """A connection on which somebody waits for what is said."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(REQUEST_TIMEOUT_S)

    def fileno(self) -> int:
        return self._connection.fileno()

    def say(self, answer: Mapping[str, Any], *, fds: Sequence[int] = ()) -> None:
        """Answer, with descriptors; a caller that has gone misses it."""
        line = json.dumps(answer).encode() + b"\n"
        with contextlib.suppress(OSError):
            if fds:
                line = line[socket.send_fds(self._connection, [line], fds) :]
            self._connection.sendall(line)

    def fail(self, error: HelperError) -> None:
        """Answer with an error."""
        self.say({"ok": False, **error.to_json()})

    def gone(self) -> bool:
        """Whether the caller has hung up."""
        waiting = select.poll()
        waiting.register(self._connection, select.POLLRDHUP)
        return bool(waiting.poll(0))

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class Conversation(Answers):
    """A connection on which a request has been read."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._rest = b""
        self.uid, self.gid = _credentials(connection)
        self.fds: list[int] = []
        self.in_parts = False
        """Whether each part of it is written to the log by itself."""
        self.request = self._read_request()

    def again(self) -> bool:
        """Read another request in the place of this one; False if there is none, as the caller has hung up.

        Raises:
            HelperError: It is no request.
        """
        self._close_fds()
        try:
            self.request = self._read_request()
        except (OSError, EOFError):
            return False
        return True

    def hear(self) -> dict[str, Any] | None:
        """The caller's next line; None if it has gone."""
        try:
            return _parsed(self._line())
        except (OSError, EOFError):
            return None

    def text(self, name: str, *, choices: tuple[str, ...] = ()) -> str:
        """A member of the request that is text.

        Raises:
            HelperError: It is not, or not one of the choices.
        """
        value = self.request.get(name)
        if not isinstance(value, str) or (choices and value not in choices):
            raise _bad(f"{name!r} is missing or not as it should be")
        return value

    def number(self, name: str) -> int:
        """A member of the request that is a process's number.

        Raises:
            HelperError: It is not.
        """
        value = self.request.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 22:
            raise _bad(f"{name!r} is missing or not as it should be")
        return value

    def pidfd(self) -> int:
        """The descriptor that names the sandbox.

        Raises:
            HelperError: There is none, or there are several.
        """
        if len(self.fds) != 1:
            raise _bad("A descriptor of the sandbox's first process has to come with the request")
        return self.fds[0]

    def answers(self) -> Answers:
        """Where this very request is to be answered: the socket that came as the second of two descriptors.

        Raises:
            HelperError: None did.
        """
        if len(self.fds) == 2:
            with contextlib.suppress(OSError):
                connection = socket.socket(fileno=self.fds[1])
                self.fds.pop()
                return Answers(connection)
        raise _bad("A socket for the answer has to come with the request, behind the sandbox's first process")

    def pour(self, data: bytes) -> None:
        """Send a piece of a stream.

        Raises:
            OSError: The caller has gone, or takes nothing.
        """
        self._connection.settimeout(STREAM_TIMEOUT_S)
        self._connection.sendall(json.dumps({"bytes": len(data)}).encode() + b"\n" + data)

    def piece(self) -> bytes:
        """The next piece of the caller's stream; empty at its end.

        Raises:
            EOFError: The caller has gone before that.
            HelperError: It is none.
        """
        self._connection.settimeout(STREAM_TIMEOUT_S)
        count = _parsed(self._line()).get("bytes")
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= PIECE_MAX_BYTES:
            raise _bad("That is no piece of a stream")
        data = bytearray(self._rest[:count])
        self._rest = self._rest[count:]
        while len(data) < count:
            more = self._connection.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return bytes(data)

    def drain(self) -> None:
        """Take what the caller still sends until it hangs up, so that it does not miss the answer."""
        self._connection.settimeout(REQUEST_TIMEOUT_S)
        with contextlib.suppress(OSError):
            while self._connection.recv(LINE_MAX_BYTES):
                pass

    def close(self) -> None:
        """Hang up."""
        super().close()
        self._close_fds()

    def _close_fds(self) -> None:
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)

    def _read_request(self) -> dict[str, Any]:
        fds = array.array("i")
        data, ancillary, _, _ = self._connection.recvmsg(
            LINE_MAX_BYTES, socket.CMSG_SPACE(FDS_MAX * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        self.fds = list(fds)
        self._rest = data
        if not data:
            raise EOFError
        return _parsed(self._line())

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            if len(self._rest) > LINE_MAX_BYTES:
                raise _bad("The request is too long")
            data = self._connection.recv(LINE_MAX_BYTES)
            if not data:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def peer(connection: socket.socket) -> int:
    """The uid of who has connected."""
    return _credentials(connection)[0]


def _credentials(connection: socket.socket) -> tuple[int, int]:
    _, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, gid


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise _bad("That is no JSON object")
    return said


def _bad(message: str) -> HelperError:
    return HelperError("protocol", message, hint="Use the same version of Warmcell on both sides.")
