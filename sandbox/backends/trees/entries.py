"""What lies in a tree, found and opened without being led out of it."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

SYS_OPENAT2 = 437
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 1, 2, 4, 8
WITHIN = RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
BENEATH = WITHIN | RESOLVE_NO_XDEV
CHUNK_BYTES = 1 << 24
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})

libc = ctypes.CDLL(None, use_errno=True)


class OpenHow(ctypes.Structure):
    """`struct open_how` of openat2(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


class Refused(Exception):
    """The tree cannot be copied as it is."""

    def __init__(self, why: str, *, full: bool = False) -> None:
        super().__init__(why)
        self.full = full
        """Whether it is larger than it may be."""


def beneath(top: int, path: str, flags: int = DIRECTORY) -> int:
    """Open what is at `path` below the directory `top`, through no link and no mount."""
    return _open(top, path, flags, BENEATH)


def within(top: int, path: str, flags: int = DIRECTORY) -> int:
    """Open what is at `path` below the directory `top`, through no link: for what is mounted there.

    A guest may have put a link in place of any directory on the way, and one to an absolute path leads out of its root
    to the host's own files.
    """
    return _open(top, path, flags, WITHIN)


def _open(top: int, path: str, flags: int, resolve: int) -> int:
    how = OpenHow(flags, 0, resolve)
    while True:
        made = libc.syscall(SYS_OPENAT2, top, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if made >= 0:
            return int(made)
        error = ctypes.get_errno()
        if error == errno.ENAMETOOLONG:
            raise Refused("Directories are nested too deeply: a path is longer than 4,096 bytes")
        if error not in (errno.EINTR, errno.EAGAIN):  # A rename elsewhere; Linux asks to try again.
            raise OSError(error, os.strerror(error), path)


def entries(directory: int) -> list[tuple[str, os.stat_result]]:
    """What lies in a directory, links not followed."""
    found = []
    with os.scandir(directory) as listed:
        for one in listed:
            try:
                found.append((one.name, one.stat(follow_symlinks=False)))
            except OSError as error:
                if error.errno not in GONE:
                    raise
    return found


def entry(directory: int, name: str) -> os.stat_result | None:
    """One of them, None where there is none."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def is_whiteout(found: os.stat_result) -> bool:
    """Whether it marks that something of a lower layer was removed."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def allocated(found: os.stat_result) -> int:
    """Bytes that a file has, holes left out."""
    return min(found.st_size, found.st_blocks * 512)


def joined(path: str, name: str) -> str:
    """A path below a tree's top."""
    return name if path == "." else f"{path}/{name}"


def copy_data(source: int, target: int, found: os.stat_result) -> None:
    """The content of a file as it was when `found` was taken, its holes as holes."""
    size = found.st_size
    start = 0
    if found.st_blocks * 512 >= size:
        start = send(source, target, 0, size)
    else:
        while start < size:
            try:
                data = os.lseek(source, start, os.SEEK_DATA)
                end = min(os.lseek(source, data, os.SEEK_HOLE), size)
            except OSError as error:
                if error.errno == errno.ENXIO:  # Only a hole is left.
                    break
                raise
            if data >= size:
                break
            os.lseek(target, data, os.SEEK_SET)
            start = end
            if send(source, target, data, end) < end:
                break
    if start < size:
        os.ftruncate(target, size)


def send(source: int, target: int, start: int, end: int) -> int:
    """Copy bytes `start` to `end` to where `target` stands; how far it came, which is less if the file got shorter."""
    while start < end:
        sent = os.sendfile(target, source, start, min(end - start, CHUNK_BYTES))
        if sent == 0:
            break
        start += sent
    return start
