"""Processes that nothing which comes from them can outlive: each is the first of a pid namespace of its own.

bubblewrap ends with its parent, and its inner process with bubblewrap, but each only once it has asked for that. Until
then the inner one waits for the outer: for ever, if that is killed.
"""

from __future__ import annotations

import ctypes
import os
from errno import ESRCH

from .linux import CLONE_NEWPID, CLONE_NEWUSER, Refused, call, libc, write
from .saying import answer

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

SYS_CLONE3 = 435
CLONE_PIDFD, CLONE_PARENT = 0x1000, 0x8000
SIGCHLD = 17


class CloneArguments(ctypes.Structure):
    """`struct clone_args` of clone3(2), as it began."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls")
    ]


def fork(flags: int) -> tuple[int, int]:
    """Fork: the child's pid and a descriptor of it; 0 in the child.

    Args:
        flags: With CLONE_PARENT it is a child of our own parent's, which is told of its end as of ours.

    Raises:
        Refused: The system call is not let through.
    """
    pidfd = ctypes.c_int(-1)
    # Who forks for its parent must say nothing of a signal: the parent gets the one that it would get for us.
    arguments = CloneArguments(
        flags=flags | CLONE_PIDFD, pidfd=ctypes.addressof(pidfd), exit_signal=0 if flags & CLONE_PARENT else SIGCHLD
    )
    size = ctypes.sizeof(arguments)
    return call("fork a stage", libc.syscall(SYS_CLONE3, ctypes.byref(arguments), size)), pidfd.value


def spaces() -> int:
    """The namespaces that are made at the fork of one that is to be alone; only root needs no user namespace for it."""
    return CLONE_NEWPID if os.geteuid() == 0 else CLONE_NEWPID | CLONE_NEWUSER


def is_first() -> bool:
    """Whether this process is alone."""
    return os.getpid() == 1


def be_first(control: _socket.socket, uid: int, gid: int) -> None:
    """Go on alone, as the one that was forked so, or as one that is forked now; as we are where Linux refuses that.

    Args:
        control: Where the parent is told who goes on.
        uid: Who this is to our parent.
        gid: Likewise.
    """
    if not is_first():
        try:
            go_on(control, spaces())
        except Refused:
            return  # The mounts, or bubblewrap, will say why.
    if uid != 0:
        map_ids(uid, gid)


def map_ids(uid: int, gid: int, *, of: str = "self") -> None:
    """In a user namespace just made, that of process `of`, be root, who is nobody but that user."""
    write(f"/proc/{of}/setgroups", b"deny")
    write(f"/proc/{of}/uid_map", f"0 {uid} 1".encode())
    write(f"/proc/{of}/gid_map", f"0 {gid} 1".encode())


def go_on(control: _socket.socket, flags: int) -> None:
    """Go on as another child of our own parent's, which is told that one's pid; this process ends.

    Raises:
        Refused: Nothing was forked.
    """
    told, telling = os.pipe()
    child, pidfd = fork(CLONE_PARENT | flags)
    if child:
        answer(control, f'"pid": {child}', [pidfd])
        os._exit(0)
    os.close(telling)
    os.read(told, 1)  # What is said from here on comes after that.
    os.close(told)


def number_of(child: int) -> int:
    """How `/proc` knows our only child: who is alone still has that of the pid namespace it came from."""
    if not is_first():
        return child
    with open("/proc/thread-self/children") as children:
        numbers = children.read().split()
    if not numbers:
        raise ProcessLookupError(ESRCH, "It has ended")
    return int(numbers[0])
