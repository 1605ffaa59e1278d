"""A sandbox's root: one tree, put together of mounts that are nowhere yet, which bubblewrap then shows as a whole.

None of this reads the list of mounts. bubblewrap reads it for each thing that it is told to show.
"""

from __future__ import annotations

import ctypes
import os
import stat

from .choices import choose
from .linux import (
    AT_RECURSIVE,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_EMPTY_PATH,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
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
    mount,
    restrict,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

ATTRIBUTES = {
    "ro": MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
    "rw": MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
    "dev": MOUNT_ATTR_NOSUID,
}
"""What holds for a tree and for all that is mounted in it."""
FILE_SYSTEMS = {
    "tmpfs": (MS_NOSUID | MS_NODEV, "mode=0755,size=16m,nr_inodes=65536"),
    "devpts": (MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620"),
}


def open_shown(plan: Mapping[str, Any]) -> dict[str, int]:
    """The host's trees that are shown as they are, by their places."""
    return {made["place"]: clone(made["host"]) for made in plan["entries"] if "host" in made}


def make_root(plan: Mapping[str, Any], report: Mapping[str, str], shown: Mapping[str, int]) -> None:
    """Put together what is to be seen, parents before what lies in them.

    Args:
        plan: Where, and what. What depends on whether a tree could be made has both ways in it.
        report: Why a tree could not be made, empty where it could.
        shown: What `open_shown` has opened.

    Raises:
        Refused: Something has no place, or the kernel refuses it.
    """
    path = plan["path"]
    os.mkdir(path)
    mount("tmpfs", path, "tmpfs", *FILE_SYSTEMS["tmpfs"])
    root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    closed = [root]
    for entry in plan["entries"]:
        made = entry if "tree" not in entry else {**entry, **choose(entry, report)}
        try:
            if "link" in made:
                _link(root, made)
            elif "directory" in made:
                over = open_place(root, made["place"], make=made["make"])
                os.chmod(f"/proc/self/fd/{over}", made["directory"])
                os.close(over)
            elif "file_system" in made:
                closed += _make_file_system(root, made)
            else:
                tree = shown[made["place"]] if "host" in made else clone(made["own"])
                restrict(tree, ATTRIBUTES[made["mode"]], AT_RECURSIVE)
                _attach(tree, root, made)
        except OSError as error:
            raise Refused(f"make /{made['place']}", error.errno or 0) from None
    for whole in closed:  # Nothing more is made in these.
        restrict(whole, MOUNT_ATTR_RDONLY)
        os.close(whole)


def _make_file_system(root: int, made: Mapping[str, Any]) -> list[int]:
    """Mount it; a descriptor of what is to be closed."""
    kind = made["file_system"]
    over = open_place(root, made["place"], make=made["make"])
    mount(kind, f"/proc/self/fd/{over}", kind, *FILE_SYSTEMS[kind])
    os.close(over)
    return [open_beneath(root, made["place"])] if kind == "tmpfs" else []


def _link(root: int, made: Mapping[str, Any]) -> None:
    parent, name = os.path.split(made["place"])
    over = open_place(root, parent, make=made["make"]) if parent else os.dup(root)
    try:
        os.symlink(made["link"], name, dir_fd=over)
    except FileExistsError:
        pass  # A saved layer has it.
    finally:
        os.close(over)


def _attach(tree: int, root: int, made: Mapping[str, Any]) -> None:
    whole = stat.S_ISDIR(os.fstat(tree).st_mode)
    over = open_place(root, made["place"], make=made["make"], whole=whole)
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    call(f"attach /{made['place']}", libc.syscall(SYS_MOVE_MOUNT, tree, b"", over, b"", flags))
    os.close(tree)
    os.close(over)


def open_place(root: int, place: str, *, make: bool, whole: bool = True) -> int:
    """A descriptor of a place in the root.

    The trees on the way may be changed by their owners meanwhile, so no link is followed, and what is missing is made,
    a directory or, unless it is to be a `whole` one, a file, only where the plan says that all of it is the sandbox's.
    """
    try:
        return open_beneath(root, place)
    except FileNotFoundError:
        if not make:
            raise
    here = os.dup(root)
    parts = place.split("/")
    for number, part in enumerate(parts, 1):
        try:
            if number == len(parts) and not whole:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o444, dir_fd=here))
            else:
                os.mkdir(part, 0o755, dir_fd=here)
        except FileExistsError:
            pass
        below = open_beneath(here, part)
        os.close(here)
        here = below
    return here


def open_beneath(directory: int, path: str) -> int:
    """A descriptor of `path` below `directory`, no part of which may be a link."""
    # Not O_NOFOLLOW, with which the last part could be a link that is opened itself.
    how = OpenHow(os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    fd = libc.syscall(SYS_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)
