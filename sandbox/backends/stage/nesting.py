"""Trees and links at places inside other trees."""

from __future__ import annotations

import ctypes
import os

from .choices import choose
from .linux import (
    MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_EMPTY_PATH,
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    SYS_MOVE_MOUNT,
    SYS_OPENAT2,
    OpenHow,
    Refused,
    call,
    clone,
    libc,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def nest(plan: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Put a tree, or a symbolic link, at a place inside another tree.

    That other tree may be changed by its owner meanwhile, so no link in it is followed, and nothing is made in it
    unless it is a file system of the sandbox's own.
    """
    inside = os.open(plan["inside"], os.O_PATH | os.O_DIRECTORY)
    step = f"find {plan['path']}"
    try:
        if "link" in plan:
            parent, name = os.path.split(plan["path"])
            over = make_beneath(inside, parent) if parent else os.dup(inside)
            if name not in os.listdir(over_folder := os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=over)):
                os.symlink(plan["link"], name, dir_fd=over)  # Else a saved layer has it.
            os.close(over_folder)
            os.close(over)
            return
        source = choose(plan["source"], report)[0]
        try:
            over = open_beneath(inside, plan["path"])
        except FileNotFoundError:
            if not plan["make"]:
                raise
            over = make_beneath(inside, plan["path"], whole=os.path.isdir(source))
        tree = clone(source)
        flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        call(f"attach {plan['path']}", libc.syscall(SYS_MOVE_MOUNT, tree, b"", over, b"", flags))
        os.close(tree)
        os.close(over)
    except OSError as error:
        raise Refused(step, error.errno or 0) from None
    finally:
        os.close(inside)


def open_beneath(directory: int, path: str) -> int:
    """A descriptor of `path` below `directory`, no part of which may be a link."""
    how = OpenHow(
        os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    )
    fd = libc.syscall(SYS_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


def make_beneath(directory: int, path: str, *, whole: bool = True) -> int:
    """As `open_beneath`; what of the path is missing is made."""
    here = os.dup(directory)
    parts = path.split("/")
    for number, part in enumerate(parts):
        try:
            if number == len(parts) - 1 and not whole:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=here))
            else:
                os.mkdir(part, 0o755, dir_fd=here)
        except FileExistsError:
            pass
        below = open_beneath(here, part)
        os.close(here)
        here = below
    return here
