"""An HTTP answer on a socket that never blocks: its status, and its body as it comes."""

from __future__ import annotations

import socket

READ_BYTES = 256 * 1024


class Answer:
    """The answer to one request. Whoever has it waits for the socket, then reads."""

    def __init__(self, sock: socket.socket) -> None:
        self.status = 0
        """0 until it has come."""
        self.ended = False
        self._socket = sock
        self._raw = bytearray()
        """What has come and was not looked at yet."""
        self._chunked = False
        self._left = 0
        """Bytes of the chunk, or of the body, that are still to come."""
        self._between = False
        """A chunk has ended, and its line has not."""

    def read(self) -> list[bytes]:
        """Further parts of the body.

        Raises:
            OSError: There are none; BlockingIOError: there are none yet.
            EOFError: The other side has closed.
            ValueError: It says what is no HTTP.
        """
        data = self._socket.recv(READ_BYTES)
        if not data:
            raise EOFError("the answer ended early")
        self._raw += data
        if not self.status:
            self._read_head()
        found: list[bytes] = []
        while self.status and not self.ended and self._raw:
            if self._left:
                found.append(bytes(self._raw[: self._left]))
                del self._raw[: len(found[-1])]
                self._take(len(found[-1]))
            elif not self._read_size():
                break
        return found

    def read_into(self, room: memoryview) -> int:
        """The same where it is known what comes, without copying it; 0: there is nothing that could be read so now."""
        if not self._left or self._raw:
            return 0
        got = self._socket.recv_into(room, min(self._left, room.nbytes))
        if not got:
            raise EOFError("the answer ended early")
        self._take(got)
        return got

    def _take(self, size: int) -> None:
        self._left -= size
        self.ended = not self._left and not self._chunked

    def _read_head(self) -> None:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = bytes(self._raw[:end]).lower().split(b"\r\n")
        del self._raw[: end + 4]
        headers = {name: value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        words = first.split()
        if len(words) < 2 or not words[0].startswith(b"http/"):
            raise ValueError("the answer is no HTTP")
        self.status = int(words[1])
        self._chunked = headers.get(b"transfer-encoding") == b"chunked"
        self._left = 0 if self._chunked else int(headers.get(b"content-length", b"0"))
        self.ended = not self._left and not self._chunked

    def _read_size(self) -> bool:
        """Of the next chunk; False while it has not come."""
        begin = 2 if self._between else 0
        end = self._raw.find(b"\r\n", begin)
        if end < 0:
            return False
        size = int(self._raw[begin:end], 16)
        if not size and len(self._raw) < end + 4:
            return False
        del self._raw[: end + (2 if size else 4)]
        self._left, self._between, self.ended = size, True, not size
        return True
