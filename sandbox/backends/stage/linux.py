"""System calls that the standard library lacks."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOSYMFOLLOW, MS_REC, MS_PRIVATE = 2, 4, 8, 0x100, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, 0o2000000
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_IDMAP = 0x00100000
MOVE_MOUNT_T_EMPTY_PATH = 0x40
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 2, 4, 8
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_OPENAT2, SYS_MOUNT_SETATTR = 428, 429, 437, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, SECCOMP_STEP_BYTES = 22, 2, 8

libc = ctypes.CDLL(None, use_errno=True)


class MountAttr(ctypes.Structure):
    """`struct mount_attr` of mount_setattr(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class OpenHow(ctypes.Structure):
    """`struct open_how` of openat2(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


class Program(ctypes.Structure):
    """`struct sock_fprog` of seccomp(2)."""

    _fields_ = [("size", ctypes.c_ushort), ("steps", ctypes.c_void_p)]


class Refused(Exception):
    """The kernel refused a step."""

    def __init__(self, step: str, error: int) -> None:
        super().__init__(f"{step}: {os.strerror(error)}")
        self.step = step
        self.errno = error


def call(step: str, result: int) -> int:
    """The result of a libc call, or `Refused` with its errno."""
    if result < 0:
        raise Refused(step, ctypes.get_errno())
    return result


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system, or change how mounts propagate."""
    call(
        f"mount {kind or 'private'} on {target}",
        libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()),
    )


def load_filter(steps: bytes) -> None:
    """Load a system call filter, for good; only root may without giving up set-user-ID programs."""
    held = ctypes.create_string_buffer(steps, len(steps))
    program = Program(len(steps) // SECCOMP_STEP_BYTES, ctypes.addressof(held))
    call("load its filter", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def clone(path: str) -> int:
    """A mount, nowhere yet, of the tree at `path` with all that is mounted in it."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    return call(f"open {path}", libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags))


def attach(tree: int, path: str, *, there: bool = False) -> None:
    """Put a tree at `path`, which is made, if it is not there, as what it is: a directory or a file."""
    if there:
        pass
    elif os.path.isdir(f"/proc/self/fd/{tree}"):
        os.mkdir(path)
    else:
        write(path, b"")
    call(
        f"attach {path}",
        libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(path), MOVE_MOUNT_F_EMPTY_PATH),
    )
    os.close(tree)


def write(path: str, content: bytes) -> None:
    """Write a small file."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise Refused(f"write {path}", error.errno or 0) from None
