"""What is said on the control socket."""

from __future__ import annotations

import _socket
import sys


def receive(control: _socket.socket, size: int) -> bytes:
    """Exactly `size` bytes."""
    data = bytearray(size)
    left = memoryview(data)
    while left:
        got = control.recv_into(left)
        if not got:
            sys.exit(1)  # The keeper is gone.
        left = left[got:]
    return bytes(data)


def answer(control: _socket.socket, members: str, fds: list[int] = []) -> None:  # noqa: B006  # Never changed.
    """Send a JSON object, and descriptors with it."""
    rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if fds else []
    control.sendmsg([f"{{{members}}}\n".encode()], ancillary)


def quoted(text: str) -> str:
    """A JSON string."""
    return (
        '"' + "".join(c if (c.isalnum() and c.isascii()) or c in " ./-_:()" else f"\\u{ord(c):04x}" for c in text) + '"'
    )
