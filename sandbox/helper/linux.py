"""The few system calls that Python's standard library lacks. Every one raises `OSError`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 0x40000
AT_FDCWD, AT_EACCESS, AT_EMPTY_PATH = -100, 0x200, 0x1000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, 0o2000000
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 4, 0x40
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_CLOSE_RANGE, SYS_OPENAT2, SYS_MOUNT_SETATTR = 428, 429, 436, 437, 442
SYS_PIDFD_GETFD, SYS_FACCESSAT2 = 438, 439
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 2, 4
CLOSE_RANGE_CLOEXEC = 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME = 1, 4, 8, 15
PR_SET_CHILD_SUBREAPER, PR_CAP_AMBIENT = 36, 47
PR_CAP_AMBIENT_RAISE = 2
CAP_SYS_RESOURCE, CAP_LAST = 24, 40
_CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class _OpenHow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def setns(fd: int) -> None:
    """Join the namespace that `fd` stands for; a pid namespace is that of the next fork."""
    _checked(_libc.setns(fd, 0), "setns")


def unshare(flags: int) -> None:
    """Leave namespaces for new ones."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _checked(result, f"mount {kind or 'private'} on {target}")


def clone_mount(path: str | bytes, directory: int = AT_FDCWD, *, empty: bool = False) -> int:
    """A descriptor of a mount of its own, nowhere attached, that shows what `path` shows (without mounts below)."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_EMPTY_PATH if empty else 0)
    return _checked(_libc.syscall(SYS_OPEN_TREE, directory, os.fsencode(path), flags), f"open_tree {path!r}")


def change_mount(fd: int, *, add: int = 0, clear: int = 0) -> None:
    """Change the attributes of a mount."""
    attributes = _MountAttr(add, clear, 0, 0)
    result = _libc.syscall(
        SYS_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    _checked(result, "mount_setattr")


def attach_mount(fd: int, target: int) -> None:
    """Put the mount `fd` over the file or directory that `target` is open on."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _checked(_libc.syscall(SYS_MOVE_MOUNT, fd, b"", target, b"", flags), "move_mount")


def memory_directory(*, size_bytes: int) -> int:
    """A directory in memory that has no name: it goes when the last descriptor of it is closed."""
    made = _checked(_libc.syscall(SYS_FSOPEN, b"tmpfs", FSOPEN_CLOEXEC), "fsopen")
    try:
        for name, value in ((b"size", str(size_bytes).encode()), (b"mode", b"0700")):
            _checked(_libc.syscall(SYS_FSCONFIG, made, FSCONFIG_SET_STRING, name, value, 0), "fsconfig")
        _checked(_libc.syscall(SYS_FSCONFIG, made, FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig")
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
        return _checked(_libc.syscall(SYS_FSMOUNT, made, FSMOUNT_CLOEXEC, attributes), "fsmount")
    finally:
        os.close(made)


def open_plain(path: str, *, flags: int = os.O_PATH) -> int:
    """Open `path`, no part of which may be a link."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    result = _libc.syscall(SYS_OPENAT2, AT_FDCWD, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    return _checked(result, f"open {path}")


def descriptor_of(process: int, fd: int) -> int:
    """A descriptor of our own for what `fd` is in a process, which is given by a pidfd."""
    return _checked(_libc.syscall(SYS_PIDFD_GETFD, process, fd, 0), "pidfd_getfd")


def close_but(kept: list[int]) -> None:
    """Close every descriptor above 2 that is not in `kept`."""
    low = 3
    for fd in [*sorted(fd for fd in kept if fd > 2), 0x80000000]:
        if fd > low:
            _checked(
                _libc.syscall(SYS_CLOSE_RANGE, ctypes.c_uint(low), ctypes.c_uint(fd - 1), ctypes.c_uint(0)),
                "close_range",
            )
        low = fd + 1


def close_at_exec() -> None:
    """Whatever is open above 2 closes when this process executes something, though it had been given otherwise."""
    everything = ctypes.c_uint(0xFFFFFFFF)
    _checked(
        _libc.syscall(SYS_CLOSE_RANGE, ctypes.c_uint(3), everything, ctypes.c_uint(CLOSE_RANGE_CLOEXEC)), "close_range"
    )


@contextlib.contextmanager
def files_of(uid: int, gid: int) -> Iterator[None]:
    """Meanwhile files are opened with that user's rights and no others. For a process of one thread."""
    os.setgroups([])
    try:
        _libc.setfsgid(gid)
        _libc.setfsuid(uid)  # Of any user but root: the capabilities go that overrule a file's rights.
        if (_libc.setfsuid(-1), _libc.setfsgid(-1)) != (uid, gid):  # Whether it worked, only the next call says.
            raise PermissionError(errno.EPERM, f"the rights of user {uid} cannot be taken on")
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def may_access(fd: int, mode: int) -> bool:
    """Whether what is open may be accessed so (R_OK, X_OK), with the rights that this process has on files now."""
    return int(_libc.syscall(SYS_FACCESSAT2, fd, b"", mode, AT_EACCESS | AT_EMPTY_PATH)) == 0


def die_with_parent(signal_number: int = 9) -> None:
    """Get this signal when the thread that forked this process ends."""
    _checked(_libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Be the parent of what this process's descendants leave when they end."""
    _checked(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def name_process(name: str) -> None:
    """What `ps` shows."""
    _libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def has_capability(number: int) -> bool:
    """Whether this process may use it now."""
    data = _capabilities()
    return bool(data[number // 32].effective >> (number % 32) & 1)


def become_with_capabilities(uid: int, gid: int) -> None:
    """Become a user, and keep all capabilities, over an exec too."""
    _checked(_libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl")
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _checked(_libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    data = _capabilities()
    for part in data:
        part.inheritable = part.effective = part.permitted
    header = _CapHeader(_CAPABILITY_VERSION, 0)
    _checked(_libc.capset(ctypes.byref(header), data), "capset")
    for number in range(CAP_LAST + 1):
        if data[number // 32].permitted >> (number % 32) & 1:
            _checked(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0), "prctl")


def _capabilities() -> ctypes.Array[_CapData]:
    header, data = _CapHeader(_CAPABILITY_VERSION, 0), (_CapData * 2)()
    _checked(_libc.capget(ctypes.byref(header), data), "capget")
    return data
