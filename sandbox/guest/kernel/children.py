"""What the kernel's forked children inherit of it: no connection of the kernel's.

A child that kept the kernel's accepted connections would hold them half closed when the clients have gone, and then
neither it nor the kernel could be saved.
"""

from __future__ import annotations

import contextlib
import os
import socket

_prefix = ""
_polls: set[int] = set()


def let_go_at_fork(prefix: str) -> None:
    """From now on children let go of the sockets at `prefix` and of the polls that this process has now."""
    global _prefix
    _prefix = prefix
    _polls.update(fd for fd in _descriptors() if _target(fd) == "anon_inode:[eventpoll]")
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    """Put /dev/null in place of them, so that no number that libzmq still knows becomes something else."""
    global _prefix
    prefix, _prefix = _prefix, ""
    if not prefix:
        return  # A child's child has nothing of the kernel any more.
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in _descriptors():
        target = _target(fd)
        if (fd in _polls and target == "anon_inode:[eventpoll]") or (
            target.startswith("socket:") and _is_ours(fd, f"{prefix}-")
        ):
            os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)


def _is_ours(fd: int, prefix: str) -> bool:
    """Whether either end of that socket is bound at `prefix`."""
    try:
        with contextlib.closing(socket.socket(fileno=os.dup(fd))) as one:
            if one.family != socket.AF_UNIX:
                return False
            if str(one.getsockname()).startswith(prefix):
                return True
            return str(one.getpeername()).startswith(prefix)
    except OSError:
        return False


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def _target(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
