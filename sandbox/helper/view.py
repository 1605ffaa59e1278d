"""What the helper puts into a sandbox's file tree: a room that the guest cannot enter, page files, pinned libraries.

Everything here runs inside the sandbox's mount namespace, as root, and follows no link of the guest's making.
"""

from __future__ import annotations

import contextlib
import os
import stat

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.criu import CACHE, DOOR
from warmcell.sandbox.helper.problems import HelperError, incompatible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOM_BYTES = "1m"


def make_room(cache: bytes) -> None:
    """Mount the helper's own room at /.warmcell, once, and give criu what it knows of this kernel."""
    if _is_ours(DOOR):
        return
    if not os.path.isdir(DOOR) or (cache and _content(f"/run/{CACHE}", len(cache) + 1) != cache):
        _write_below_root(cache)
    if os.path.islink(DOOR):  # An image can bring anything.
        raise HelperError("unsupported", f"{DOOR} is a link in this sandbox", hint="Take it out of the image.")
    linux.mount("warmcell", DOOR, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, f"mode=0700,size={ROOM_BYTES}")
    if cache:
        _write(f"{DOOR}/{CACHE}", cache)


def show_pages(pages: Mapping[str, int]) -> None:
    """Attach page files, mounts that are nowhere yet, where the image looks for them. What is there already stays."""
    for name, tree in pages.items():
        place = f"{DOOR}/{name}"
        try:
            _write(place, b"")
        except FileExistsError:  # An earlier kernel of this sandbox came from the same image.
            continue
        target = linux.open_plain(place)
        linux.attach_mount(tree, target)
        os.close(target)


def cover(pins: Sequence[tuple[str, Sequence[int], int]]) -> int:
    """Put pinned files over those that have changed; how many.

    Each is a path, what stat(2) said of it (inode, size, time of change) and a mount that shows what it was, or -1.
    """
    covered = 0
    for path, expected, tree in pins:
        try:
            found = os.stat(path)
        except OSError:
            raise incompatible(path, "there", "missing", hint="Install the package again, or start anew.") from None
        if [found.st_ino, found.st_size, found.st_mtime_ns] == list(expected):
            continue
        if tree < 0:
            if [found.st_size, found.st_mtime_ns] == list(expected)[1:]:
                continue
            raise incompatible(path, "as it was mapped", "another version")
        target = linux.open_plain(os.path.realpath(path))
        linux.attach_mount(tree, target)
        os.close(target)
        covered += 1
    return covered


def check_open(files: Mapping[str, Sequence[int]]) -> None:
    """Files that the kernel holds open are as they were: size and time of change, nothing of their content."""
    for path, (size, changed_ns) in files.items():
        try:
            found = os.stat(path, follow_symlinks=False)
        except OSError:
            raise incompatible(path, "there", "missing", hint="Put the file back as it was, or start anew.") from None
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise incompatible(path, f"{size} bytes long", f"{found.st_size} bytes long")
        if found.st_mtime_ns != changed_ns:
            raise incompatible(path, "as the kernel had it open", "changed since")


def sweep(folders: Sequence[str]) -> None:
    """Remove the second names that criu gives to deleted files, once the kernel that has them open goes on."""
    for folder in folders:
        with contextlib.suppress(OSError):
            fd = linux.open_plain(folder, flags=os.O_RDONLY | os.O_DIRECTORY)
            try:
                for name in os.listdir(fd):
                    if name.startswith("link_remap."):
                        os.unlink(name, dir_fd=fd)
            finally:
                os.close(fd)


def _is_ours(path: str) -> bool:
    """Whether something is mounted there that only root can enter; an image may have a volume of that name."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return found.st_dev != os.stat("/").st_dev and (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o700)
    return False


def _content(path: str, most: int) -> bytes:
    """Of a plain file, at most so much; nothing if it is none."""
    with contextlib.suppress(OSError):
        fd = linux.open_plain(path, flags=os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, most) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        finally:
            os.close(fd)
    return b""


def _write_below_root(cache: bytes) -> None:
    """The root is read-only for everybody in the sandbox; a mount of our own of the same file system is not."""
    tree = linux.clone_mount("/")
    try:
        linux.change_mount(tree, clear=linux.MOUNT_ATTR_RDONLY)
        with contextlib.suppress(FileExistsError):
            os.mkdir(DOOR[1:], 0o700, dir_fd=tree)
        if cache and os.stat("/run").st_dev == os.stat("/").st_dev:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"run/{CACHE}", dir_fd=tree)
            _write(f"run/{CACHE}", cache, dir_fd=tree)
    finally:
        os.close(tree)


def _write(path: str, content: bytes, *, dir_fd: int | None = None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
