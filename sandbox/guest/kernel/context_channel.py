"""Between a kernel and the process of one of its contexts: messages of several frames, over a pair of sockets.

A pair that both ends have got by birth is saved with the two processes, as nothing of it leads out of their tree.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable

PIECE_BYTES = 64 * 1024
"""Of one packet: it goes whole or not at all, so that several threads, and forked children, can send at once."""

SENDERS_MAX = 64
"""Of those in the middle of a message. One that was killed there never ends it."""

_HEAD = struct.Struct("<IB")
"""Who sends, and whether this is the message's last piece."""

_LENGTH = struct.Struct("<I")


class Channel:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._parts: dict[int, list[bytes]] = {}

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """The two ends, which no program that is started inherits."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send(self, frames: Iterable[bytes]) -> None:
        """Send a message; returns when there was room for it.

        Raises:
            OSError: The other side has gone.
        """
        data = b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)
        for at in range(0, len(data), PIECE_BYTES):
            head = _HEAD.pack(threading.get_native_id(), at + PIECE_BYTES >= len(data))
            self._end.sendall(head + data[at : at + PIECE_BYTES])

    def receive(self) -> list[bytes] | None:
        """The next message; None when the other side has gone."""
        while True:
            try:
                packet = self._end.recv(PIECE_BYTES + _HEAD.size)
            except OSError:
                return None
            if not packet:
                return None
            sender, last = _HEAD.unpack_from(packet)
            self._parts.setdefault(sender, []).append(packet[_HEAD.size :])
            if last:
                return _frames(b"".join(self._parts.pop(sender)))
            if len(self._parts) > SENDERS_MAX:
                del self._parts[next(iter(self._parts))]

    def close(self) -> None:
        """Idempotent. Whoever waits at the other end is told."""
        self._end.close()


def _frames(data: bytes) -> list[bytes]:
    frames, at = [], 0
    while at < len(data):
        (size,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        frames.append(data[at : at + size])
        at += size
    return frames
