"""ZeroMQ's wire protocol (ZMTP 3.0, mechanism NULL) on a socket that never blocks.

To the other side each of these is an ordinary ZeroMQ socket. It is spoken here, and not by libzmq, for four
reasons: libzmq counts messages where buffers must be bounded in bytes; it reads ahead of whoever uses it and
forgets what still lies in a socket when the other end closes while being held back; it cannot say which subscriber
takes nothing; and its own threads add two changes of thread to each message's way in and out.
"""

import collections
import contextlib
import errno
import mmap
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import Final, Literal

Part = bytes | mmap.mmap
"""A frame: bytes, or memory of its own if it is large, which is never copied."""
Chunk = bytes | memoryview

LARGE_BYTES: Final = 64 * 1024
MESSAGE_MAX_BYTES: Final = 2 * 1024**3
"""A message above this ends the connection, unless it is cut: it would have to be held as a whole."""
MESSAGE_MAX_FRAMES: Final = 4096

_READ_BYTES: Final = 64 * 1024
_PASS_BYTES: Final = 1024 * 1024
_MORE, _LONG, _COMMAND = 1, 2, 4
_CONTEXT_MAX_BYTES: Final = 16
"""Of a PING, as the protocol says."""
_UNSENT_FOR_PONG_BYTES: Final = 64 * 1024
_GREETING: Final = b"\xff" + 8 * b"\0" + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + 32 * b"\0"
_HEADERS: Final = tuple(tuple(bytes((flags, size)) for size in range(256)) for flags in (0, _MORE))

State = Literal["connecting", "greeting", "handshake", "open", "closed"]
Kind = Literal[b"ROUTER", b"DEALER", b"XPUB", b"SUB"]
_PARTNERS: Final[dict[bytes, frozenset[bytes]]] = {
    b"ROUTER": frozenset({b"DEALER", b"REQ", b"ROUTER"}),
    b"DEALER": frozenset({b"ROUTER", b"REP", b"DEALER"}),
    b"XPUB": frozenset({b"SUB", b"XSUB"}),
    b"SUB": frozenset({b"PUB", b"XPUB"}),
}


class ZmtpError(ValueError):
    """The other side does not speak ZMTP, or says more than it may."""


class Cut(list[Part]):
    """The frames of a message before the one with which it became too large; that and the rest were thrown away."""

    def __init__(self, frames: list[Part], size_bytes: int) -> None:
        super().__init__(frames)
        self.size_bytes = size_bytes
        """Of the whole message."""


class Peer:
    """One connection. Its owner waits for its descriptor, calls `read` and `flush`, and closes it."""

    def __init__(
        self,
        sock: socket.socket,
        kind: Kind,
        *,
        identity: bytes = b"",
        connected: bool = True,
        cut_above_bytes: int | None = None,
    ) -> None:
        """A larger message than `cut_above_bytes` is given as a `Cut`."""
        sock.setblocking(False)
        self.fd: int = sock.fileno()
        """Descriptor to wait on; keeps its number when closed."""
        self.unsent_bytes = 0
        self.identity = b""
        """What the other side calls itself, if it does."""
        self._socket = sock
        self._kind: Kind = kind
        self._state: State = "connecting"
        self._hello = _hello(kind, identity)
        self._unsent: collections.deque[Chunk] = collections.deque()
        self._rest = b""
        self._frames: list[Part] = []
        self._frames_bytes = 0
        self._large: tuple[mmap.mmap, int, bool] | None = None
        """A large frame that is still coming: its memory, how much of it is there, whether more frames follow."""
        self._cut_above = cut_above_bytes
        self._cut_bytes = 0
        """Of the message that is being thrown away; 0: none is."""
        self._passing = 0
        """How much of the frame that is being thrown away is still to come."""
        self._passing_more = False
        if connected:
            self._greet()

    @property
    def state(self) -> State:
        """Where it is on its way. `closed`: the other side has gone, or `close` was called."""
        return self._state

    def connect(self, path: str) -> None:
        """Try to connect to a Unix socket; it stays `connecting` while nobody listens there.

        Whoever made the socket may write to its directory, so what is there is looked at first: a link to some
        other socket of this user is not followed.
        """
        try:
            found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if not stat.S_ISSOCK(os.fstat(found).st_mode):
                self._state = "closed"
                return
            problem = self._socket.connect_ex(f"/proc/self/fd/{found}")
        finally:
            os.close(found)
        if not problem:
            self._greet()
        elif problem not in (errno.ECONNREFUSED, errno.EAGAIN):
            self._state = "closed"

    def end(self) -> None:
        """Say no more, and go on reading until the other side closes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close at once; what was not sent is gone. Idempotent."""
        self._state = "closed"
        self._socket.close()
        self._unsent.clear()
        self.unsent_bytes = 0
        self._frames, self._large, self._rest = [], None, b""

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Send what `encode` made, or keep what the other side does not take now for `flush`."""
        if not self._unsent and len(chunks) == 1:
            data = chunks[0]
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # The end is noticed by `read`, after everything that was said before it.
            if sent == len(data):
                return
            chunks = (memoryview(data)[sent:],)
        self._unsent.extend(chunks)
        self.unsent_bytes += sum(map(len, chunks))
        self.flush()

    def flush(self) -> bool:
        """Send on what is left; called when the socket takes data again. True if some of it went."""
        before = self.unsent_bytes
        while self._unsent:
            try:
                sent = self._socket.sendmsg([*self._unsent] if len(self._unsent) < 64 else [*self._unsent][:64])
            except BlockingIOError:
                break
            except OSError:
                self._unsent.clear()
                self.unsent_bytes = 0
                break
            self.unsent_bytes -= sent
            while sent:
                first = self._unsent.popleft()
                if len(first) > sent:
                    self._unsent.appendleft(memoryview(first)[sent:])
                    break
                sent -= len(first)
        return self.unsent_bytes < before

    def read(self) -> Iterator[list[Part]]:
        """Take in one portion of what is there and give the frames of each message that it completes.

        Raises:
            ZmtpError: The other side does not speak ZMTP; the state is `closed`.
        """
        try:
            if self._passing:
                yield from self._pass_by()
            elif self._large is not None:
                yield from self._read_large(*self._large)
            elif data := self._receive():
                yield from self._parse(self._rest + data if self._rest else data)
        except ZmtpError:
            self._state = "closed"
            raise

    def _greet(self) -> None:
        self._state = "greeting"
        self.write([self._hello])

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._state = "closed"
        return data

    def _read_large(self, memory: mmap.mmap, filled: int, more: bool) -> Iterator[list[Part]]:
        try:
            read = self._socket.recv_into(memoryview(memory)[filled:])
        except BlockingIOError:
            return
        except OSError:
            read = 0
        if not read:
            self._state = "closed"
            return
        self._large = (memory, filled + read, more)
        if filled + read == len(memory):
            self._large = None
            if (frames := self._take(memory, more)) is not None:
                yield frames

    def _parse(self, data: bytes) -> Iterator[list[Part]]:
        at, end = 0, len(data)
        if self._state == "greeting":
            at = self._parse_greeting(data)
        while self._state in ("handshake", "open") and end - at >= 2:
            flags, size, begin = data[at], data[at + 1], at + 2
            if flags & ~(_MORE | _LONG | _COMMAND):
                raise ZmtpError(f"a frame with the flags {flags:#x}")
            if flags & _LONG:
                begin = at + 9
                if end < begin:
                    break
                size = int.from_bytes(data[at + 1 : begin])
            if not flags & _COMMAND and self._is_too_large(size):
                at = begin + min(size, end - begin)
                self._cut_bytes = (self._cut_bytes or self._frames_bytes) + size
                self._passing, self._passing_more = begin + size - at, bool(flags & _MORE)
                if self._passing:
                    break
                yield from self._end_frame()
                continue
            if size > LARGE_BYTES:
                if flags & _COMMAND:
                    raise ZmtpError(f"a command of {size} bytes")
                there = data[begin : begin + size]
                memory = _memory(size)
                memory[: len(there)] = there
                at = begin + len(there)
                if len(there) < size:
                    self._large = (memory, len(there), bool(flags & _MORE))
                    break
                if (frames := self._take(memory, bool(flags & _MORE))) is not None:
                    yield frames
                continue
            if end < begin + size:
                break
            at = begin + size
            if flags & _COMMAND:
                self._command(data[begin:at])
            elif (frames := self._take(data[begin:at], bool(flags & _MORE))) is not None:
                yield frames
        self._rest = data[at:]

    def _is_too_large(self, size: int) -> bool:
        """Whether a frame of that size is to be thrown away."""
        if self._state != "open":
            raise ZmtpError("a message before the handshake")
        if self._cut_bytes:
            return True
        whole = size + self._frames_bytes
        if self._cut_above is None and whole > MESSAGE_MAX_BYTES:
            raise ZmtpError(f"a message above {MESSAGE_MAX_BYTES} bytes")
        return self._cut_above is not None and whole > self._cut_above

    def _pass_by(self) -> Iterator[list[Part]]:
        try:
            passed = len(self._socket.recv(min(self._passing, _PASS_BYTES)))
        except BlockingIOError:
            return
        except OSError:
            passed = 0
        if not passed:
            self._state = "closed"
            return
        self._passing -= passed
        if not self._passing:
            yield from self._end_frame()

    def _end_frame(self) -> Iterator[list[Part]]:
        if self._passing_more:
            return
        cut = Cut(self._frames, self._cut_bytes)
        self._frames, self._frames_bytes, self._cut_bytes = [], 0, 0
        yield cut

    def _parse_greeting(self, data: bytes) -> int:
        if data[:1] != b"\xff" or (len(data) >= 10 and not data[9] & 1):
            raise ZmtpError("no ZMTP greeting")
        if len(data) < len(_GREETING):
            return 0
        if data[10] < 3 or data[12:32] != _GREETING[12:32]:
            raise ZmtpError("a ZMTP greeting of another version or mechanism")
        self._state = "handshake"
        return len(_GREETING)

    def _command(self, data: bytes) -> None:
        if self._state == "open":
            if data.startswith(b"\x04PING"):
                self._pong(data[7:])
            return
        if not data.startswith(b"\x05READY"):
            raise ZmtpError(f"the handshake command {data[:16]!r}")
        said = _properties(data[6:])
        if said.get(b"socket-type") not in _PARTNERS[self._kind]:
            raise ZmtpError(f"a socket of type {said.get(b'socket-type')!r} at one of type {self._kind!r}")
        self.identity = said.get(b"identity", b"")
        self._state = "open"
        if self._kind == b"SUB":
            self.write([b"\x00\x01\x01"])  # A message that subscribes to everything.

    def _pong(self, context: bytes) -> None:
        """Answer a PING. Who reads nothing gets none: else each of its own would stay here."""
        if len(context) > _CONTEXT_MAX_BYTES:
            raise ZmtpError(f"a PING with {len(context)} bytes")
        if self.unsent_bytes <= _UNSENT_FOR_PONG_BYTES:
            self.write([_command(b"PONG", context)])

    def _take(self, frame: Part, more: bool) -> list[Part] | None:
        """One more frame; with the last one, the frames of the message. A generator is too slow for each of them."""
        frames = self._frames
        frames.append(frame)
        if not more:
            self._frames, self._frames_bytes = [], 0
            return frames
        self._frames_bytes += len(frame)
        if len(frames) > MESSAGE_MAX_FRAMES:
            raise ZmtpError(f"a message of more than {MESSAGE_MAX_FRAMES} frames")
        return None


def encode(parts: Sequence[Part]) -> list[Chunk]:
    """One message as it goes over the wire; large frames stay where they are."""
    chunks: list[Chunk] = []
    small: list[bytes] = []
    more, left = _MORE, len(parts)
    headers = _HEADERS[True]
    for part in parts:
        left -= 1
        if not left:
            more, headers = 0, _HEADERS[False]
        size = len(part)
        header = headers[size] if size < 256 else _long_header(size, more)
        if isinstance(part, bytes):
            small += (header, part)
        else:
            small.append(header)
            chunks += (b"".join(small), memoryview(part))
            small = []
    if small:
        chunks.append(b"".join(small))
    return chunks


def _hello(kind: Kind, identity: bytes) -> bytes:
    said = _property(b"Socket-Type", kind)
    if identity:
        said += _property(b"Identity", identity)
    return _GREETING + _command(b"READY", said)


def _command(name: bytes, data: bytes) -> bytes:
    body = bytes((len(name),)) + name + data
    return (bytes((_COMMAND, len(body))) if len(body) < 256 else _long_header(len(body), _COMMAND)) + body


def _long_header(size: int, flags: int) -> bytes:
    return bytes((flags | _LONG,)) + size.to_bytes(8)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4) + value


def _properties(data: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        name = data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
        size = int.from_bytes(data[at : at + 4])
        at += 4
        if at + size > len(data):
            raise ZmtpError("a handshake that ends too early")
        found[name.lower()] = data[at : at + size]
        at += size
    return found


def _memory(size: int) -> mmap.mmap:
    """Of its own; pages come as they are filled, not because a size was claimed."""
    try:
        return mmap.mmap(-1, size)
    except OSError as error:
        raise ZmtpError(f"a frame of {size} bytes, for which there is no room") from error
