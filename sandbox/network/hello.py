"""The name that a client asks for as it begins to speak TLS. Pure."""

from typing import Final

HANDSHAKE: Final = 22
CLIENT_HELLO: Final = 1
SERVER_NAME: Final = 0
HELLO_MAX: Final = 32 * 1024
"""Bytes of a client's first message; usual ones have some hundred, with post-quantum keys two thousand."""


class NotTls(ValueError):
    """It is no beginning of TLS."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise NotTls
        self._at += count
        return self._data[self._at - count : self._at]

    def vector(self, length_bytes: int) -> bytes:
        return self.take(int.from_bytes(self.take(length_bytes), "big"))

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def server_name(data: bytes) -> str | None:
    """The name in a client's first message; empty where it asks for none, None where more of it is to come.

    Raises:
        NotTls: It is none, or longer than any is.
    """
    message = bytearray()
    at = 0
    while True:
        record = data[at : at + 5]
        if record and (record[0] != HANDSHAKE or (len(record) > 1 and record[1] != 3)):
            raise NotTls
        if len(record) < 5:
            break
        size = int.from_bytes(record[3:5], "big")
        if not 0 < size <= 2**14 + 256:
            raise NotTls
        message += data[at + 5 : at + 5 + size]
        at += 5 + size
        if message and message[0] != CLIENT_HELLO:
            raise NotTls
        if len(message) >= 4:
            wanted = 4 + int.from_bytes(message[1:4], "big")
            if wanted > HELLO_MAX:
                raise NotTls
            if len(message) >= wanted:
                return _name(bytes(message[4:wanted]))
        if at > len(data):
            break
    if len(data) > HELLO_MAX:
        raise NotTls
    return None


def _name(hello: bytes) -> str:
    reader = _Reader(hello)
    reader.take(2 + 32)
    reader.vector(1)  # the session
    reader.vector(2)  # ciphers
    reader.vector(1)  # compression
    if not reader.left:
        return ""
    extensions = _Reader(reader.vector(2))
    while extensions.left:
        kind = int.from_bytes(extensions.take(2), "big")
        content = extensions.vector(2)
        if kind == SERVER_NAME:
            names = _Reader(_Reader(content).vector(2))
            while names.left:
                name_kind, name = names.take(1), names.vector(2)
                if name_kind == b"\0":
                    return name.decode("ascii", "replace").lower()
    return ""
