"""File work of the store: put on the disk, take off it, and say what a full disk means. Everything here blocks."""

import ctypes
import errno
import itertools
import os
import stat
from pathlib import Path

from warmcell.sandbox.errors import CapacityError, SnapshotError, WarmcellError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def sync_filesystem(path: Path) -> None:
    """Put all that was written to the file system of `path` on the disk.

    One call for a whole layer: a call for each of its files costs a turn of the journal each.

    Raises:
        OSError: The disk could not take it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a tree, however deep it is and whatever its names and modes are. Idempotent.

    No path longer than one level below `path` is ever used: a directory within is first moved up, to stand beside its
    parent. So a tree that is deeper than a path may be long, or than Python recurses, goes as well.

    Raises:
        OSError: Something of it cannot be removed.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        path.unlink()
        return
    numbers = itertools.count()
    path.chmod(0o700)
    waiting = _empty(path, path, numbers)
    while waiting:
        directory = waiting.pop()
        waiting += _empty(directory, path, numbers)
        directory.rmdir()
    path.rmdir()


def _empty(directory: Path, top: Path, numbers: "itertools.count[int]") -> list[Path]:
    """Unlink what is in `directory`; what is itself a directory is moved into `top` and answered."""
    moved = []
    with os.scandir(directory) as entries:
        found = [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name, is_directory in found:
            if not is_directory:
                os.unlink(name, dir_fd=at)
                continue
            # To move a directory, or to look into it, takes rights that a guest may have taken away.
            os.chmod(name, 0o700, dir_fd=at)
            target = _unused(top, numbers)
            os.rename(name, target, src_dir_fd=at)
            moved.append(target)
    finally:
        os.close(at)
    return moved


def _unused(top: Path, numbers: "itertools.count[int]") -> Path:
    """A name in `top` that nothing has; what an earlier attempt moved there may still be there."""
    while True:
        path = top / f"..{next(numbers)}"
        if not os.path.lexists(path):
            return path


def failure(error: OSError, doing: str) -> WarmcellError:
    """What went wrong on the disk, as one of ours; `doing` completes "Could not …"."""
    if error.errno in FULL:
        return CapacityError(
            f"Could not {doing}: the disk is full",
            hint="Free space on the disk of the state directory, or remove snapshots with `warmcell snapshots rm`.",
        )
    return SnapshotError(
        f"Could not {doing}: {error.strerror or error}",
        hint="See that the state directory can be written; keeper.log says more.",
    )
