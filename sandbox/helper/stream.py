"""Records of a stream, a JSON line each and bytes behind it, with one sum over all; what is read comes from anybody."""

from __future__ import annotations

import hashlib
import json
import os

from warmcell.sandbox.helper.problems import corrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

PIECE_BYTES = 1 << 20
LINE_MAX_BYTES = 4096


class Out:
    """What is sent, in pieces of a good size, and its sum."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        """`send` is called with each piece."""
        self._send = send
        self._sum = hashlib.sha256()
        self._waiting = bytearray()
        self.sent_bytes = 0

    def record(self, said: dict[str, object]) -> None:
        """A line."""
        self.put(json.dumps(said).encode() + b"\n")

    def put(self, data: bytes) -> None:
        """Bytes behind it."""
        self._sum.update(data)
        self._waiting += data
        if len(self._waiting) >= PIECE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what waits for more."""
        self.sent_bytes += len(self._waiting)
        if self._waiting:
            self._send(bytes(self._waiting))
        self._waiting.clear()

    def digest(self) -> str:
        """SHA-256 of all so far."""
        return self._sum.hexdigest()


class In:
    """What is received, record by record, and its sum."""

    def __init__(self, receive: Callable[[], bytes]) -> None:
        """`receive` gives the next piece, an empty one at the end."""
        self._receive = receive
        self._sum = hashlib.sha256()
        self._here, self._at = b"", 0
        self.before = ""
        """The sum of all that came before the last record."""

    def record(self) -> dict[str, Any]:
        """The next line.

        Raises:
            HelperError: There is none, or it is no record.
        """
        while (end := self._here.find(b"\n", self._at)) < 0:
            if len(self._here) - self._at > LINE_MAX_BYTES or not self._more():
                raise corrupt("the stream of the image breaks off")
        line, self._at = self._here[self._at : end], end + 1
        self.before = self._sum.hexdigest()
        self._sum.update(line + b"\n")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise corrupt("the stream of the image cannot be read")
        return said

    def take(self, count: int) -> Iterator[bytes]:
        """The next `count` bytes.

        Raises:
            HelperError: There are fewer.
        """
        while count:
            if self._at == len(self._here) and not self._more():
                raise corrupt("the stream of the image breaks off")
            piece = self._here[self._at : self._at + count]
            self._at += len(piece)
            self._sum.update(piece)
            count -= len(piece)
            yield piece

    def ended(self) -> bool:
        """Whether nothing comes any more."""
        return self._at == len(self._here) and not self._more()

    def _more(self) -> bool:
        data = self._receive()
        self._here, self._at = self._here[self._at :] + data, 0
        return bool(data)


def segments(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of what is no hole."""
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # From here on all is a hole.
            return
        at = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        yield begin, at


def number(said: dict[str, Any], name: str, most: int) -> int:
    """A number of a record, from 0 to `most`.

    Raises:
        HelperError: There is none.
    """
    value = said.get(name)
    if not is_number(value, most):
        raise corrupt(f"the stream of the image has no {name} that can be")
    assert isinstance(value, int)
    return value


def is_number(value: object, most: int) -> bool:
    """Whether it is a number from 0 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def are_numbers(values: object, count: int) -> bool:
    """Whether it is a list of so many sizes, times or the like."""
    return isinstance(values, list) and len(values) == count and all(is_number(each, 1 << 63) for each in values)


def is_path(path: str) -> bool:
    """Whether it can be a path in a sandbox."""
    return path.startswith("/") and "\0" not in path
