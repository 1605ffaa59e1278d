"""File work of the store: put on the disk, take off it, and say what a full disk means. Everything here blocks."""

import ctypes
import errno
import os
from pathlib import Path

from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.errors import SnapshotError, StorageFullError, WarmcellError
from warmcell.sandbox.paths import FULL


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

    Raises:
        OSError: Something of it cannot be removed.
    """
    remove_tree(path)
    if os.path.lexists(path):
        raise OSError(errno.ENOTEMPTY, "something in it cannot be removed", str(path))


def failure(error: OSError, doing: str) -> WarmcellError:
    """What went wrong on the disk, as one of ours; `doing` completes "Could not …"."""
    if error.errno in FULL:
        return StorageFullError(
            f"Could not {doing}: the disk is full",
            hint="Free space on the disk of the state directory, or remove snapshots with `warmcell snapshots rm`.",
        )
    return SnapshotError(
        f"Could not {doing}: {error.strerror or error}",
        hint="See that the state directory can be written; keeper.log says more.",
    )
