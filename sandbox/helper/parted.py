"""Clients of a kernel have left it. Until it has seen that, it holds sockets without another end, which criu refuses.

On a busy machine a kernel that is stopped at once has not.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time

from warmcell.sandbox.helper import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

LOOK_S = 0.002


def wait(pids: Iterable[int], *, timeout_s: float) -> bool:
    """Wait until none of these processes has to take note of somebody who came, or has gone, at a socket with a name.

    Pairs of sockets have none: what is closed of those the processes know themselves, and criu as well.

    Returns:
        Whether that is so; False where one does not look.
    """
    deadline = time.monotonic() + timeout_s
    while any(_has_to_look(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def _has_to_look(pid: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        return any(_is_left(process, fd) for fd in _sockets(pid))
    finally:
        os.close(process)


def _sockets(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
                    found.append(int(fd))
    return found


def _is_left(process: int, fd: int) -> bool:
    """Whether that socket has a name and is hung up, or is one at which somebody waits to be let in."""
    try:
        taken = linux.descriptor_of(process, fd)
    except OSError:  # It has just been closed.
        return False
    with socket.socket(fileno=taken) as one:
        try:
            if one.family != socket.AF_UNIX or one.type != socket.SOCK_STREAM or not one.getsockname():
                return False
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:
            return False
        waiting = select.poll()
        waiting.register(one, select.POLLIN if listens else 0)
        return any(happened & (select.POLLIN if listens else select.POLLHUP) for _, happened in waiting.poll(0))
