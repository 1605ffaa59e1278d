"""The Connect protocol's framing, JSON codec: enveloped messages in, enveloped messages and one trailer out."""

import enum
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

UNARY_TYPE: Final = "application/json"
STREAM_TYPE: Final = "application/connect+json"

MAX_MESSAGE_BYTES: Final = 4 * 2**20
"""Of one message from a client. Files do not travel in messages."""

_HEAD = struct.Struct(">BI")
_END: Final = 0b10


class Code(enum.StrEnum):
    """What went wrong, as Connect says it."""

    CANCELED = "canceled"
    INVALID_ARGUMENT = "invalid_argument"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    PERMISSION_DENIED = "permission_denied"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    FAILED_PRECONDITION = "failed_precondition"
    UNIMPLEMENTED = "unimplemented"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"
    UNAUTHENTICATED = "unauthenticated"


HTTP_STATUS: Final[Mapping[Code, int]] = {
    Code.CANCELED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
"""Of an answer to a unary call; a stream's is 200, its error is in the trailer."""


class ConnectError(Exception):
    """A call failed: its code and a sentence."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def to_json(self) -> dict[str, str]:
        """As the wire has it."""
        return {"code": self.code.value, "message": self.message}


class Envelopes:
    """Takes a client's bytes as they come and gives the messages that are whole. Holds one message at most."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete now.

        Raises:
            ConnectError: What came is no envelope, is compressed, or announces more than the limit. All that follows is
                of no use then.
        """
        view = memoryview(data)
        while True:
            view = view[self._fill(view, _HEAD.size) :]
            if len(self._buffer) < _HEAD.size:
                return
            flags, length = _HEAD.unpack_from(self._buffer)
            self._check(flags, length)
            view = view[self._fill(view, _HEAD.size + length) :]
            if len(self._buffer) < _HEAD.size + length:
                return
            message = bytes(self._buffer[_HEAD.size :])
            self._buffer.clear()
            yield message

    def close(self) -> None:
        """The client has sent all.

        Raises:
            ConnectError: In the middle of a message.
        """
        if self._buffer:
            raise ConnectError(Code.INVALID_ARGUMENT, "The request ended in the middle of a message")

    def _fill(self, view: memoryview, size: int) -> int:
        """Take as much as is missing from `size` bytes; how much that was."""
        taken = max(0, min(len(view), size - len(self._buffer)))
        self._buffer += view[:taken]
        return taken

    def _check(self, flags: int, length: int) -> None:
        if flags & 1:
            raise ConnectError(Code.UNIMPLEMENTED, "Compressed messages are not supported; send them as they are")
        if flags:
            raise ConnectError(Code.INVALID_ARGUMENT, f"{flags} are not the flags of a client's message")
        if length > self._max_bytes:
            raise ConnectError(Code.RESOURCE_EXHAUSTED, f"A message has {self._max_bytes} bytes at most, not {length}")


def envelope(message: Mapping[str, Any]) -> bytes:
    """One message of a stream."""
    return _enveloped(0, message)


def trailer(error: ConnectError | None = None) -> bytes:
    """The end of a stream: well, or with an error."""
    return _enveloped(_END, {} if error is None else {"error": error.to_json()})


def _enveloped(flags: int, message: Mapping[str, Any]) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    return _HEAD.pack(flags, len(data)) + data
