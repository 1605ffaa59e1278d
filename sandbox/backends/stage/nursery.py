"""Stages that are forked instead of started: an interpreter of this size takes longer to start than all that it does.

The keeper sends one byte with two descriptors for each, a control socket and a stderr. What is forked is the keeper's
own child, as if it had started it: it waits for it, and takes it along when it dies.
"""

from __future__ import annotations

import _socket
import ctypes
import os
import sys

from .. import trees  # noqa: F401  # So that every fork has it.
from .linux import PR_SET_PDEATHSIG, Refused, call, libc
from .main import main as carry_out
from .saying import answer, quoted

SYS_CLONE3 = 435
CLONE_PIDFD, CLONE_PARENT = 0x1000, 0x8000


class CloneArguments(ctypes.Structure):
    """`struct clone_args` of clone3(2), as it began."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls")
    ]


def main(fd: int, keeper: int) -> None:
    """Serve the requests that come on `fd` until its other end is closed."""
    control = _socket.socket(fileno=fd)
    call("die with the keeper", libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))
    if os.getppid() != keeper:
        sys.exit(1)
    room = _socket.CMSG_SPACE(8)
    while True:
        said, ancillary, _, _ = control.recvmsg(1, room, _socket.MSG_CMSG_CLOEXEC)
        if not said:
            return
        fds = [
            int.from_bytes(rights[at : at + 4], sys.byteorder)
            for _, _, rights in ancillary
            for at in range(0, len(rights) - 3, 4)
        ]
        try:
            pid, pidfd = fork()
        except Refused as error:
            answer(control, f'"failed": {quoted(error.step)}, "errno": {error.errno}')
        else:
            if pid == 0:
                control.close()
                os.dup2(fds[1], 2)
                os.close(fds[1])
                carry_out(fds[0])
            answer(control, f'"pid": {pid}', [pidfd])
            os.close(pidfd)
        for one in fds:
            os.close(one)


def fork() -> tuple[int, int]:
    """Fork a child of our own parent's: its pid and a descriptor of it; 0 in the child.

    Raises:
        Refused: The system call is not let through.
    """
    pidfd = ctypes.c_int(-1)
    arguments = CloneArguments(flags=CLONE_PARENT | CLONE_PIDFD, pidfd=ctypes.addressof(pidfd))
    size = ctypes.sizeof(arguments)
    return call("fork a stage", libc.syscall(SYS_CLONE3, ctypes.byref(arguments), size)), pidfd.value
