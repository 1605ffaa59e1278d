"""What a stopped kernel has of files outside its image: libraries that it maps, files that it holds open."""

from __future__ import annotations

import contextlib
import os
import re
import stat

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.criu import DOOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from warmcell.sandbox.helper.pins import Pins

DATA_MAX_BYTES = 256 << 20
AT_ONCE = 64
"""Files are opened so many together, as it takes longer to become another user and back."""
TMPFS_MAGIC, OVERLAYFS_MAGIC = 0x01021994, 0x794C7630
_LINE = re.compile(r"([0-9a-f]+-[0-9a-f]+) (\S{4}) [0-9a-f]+ \S+ (\d+) +(/.*)")


class Held:
    """Collected while the kernel is stopped."""

    def __init__(self) -> None:
        self.mapped: dict[str, list[int]] = {}
        """By path in the sandbox: inode, size, time of change."""
        self.code: set[str] = set()
        """Which of them it executes."""
        self.open: dict[str, list[int]] = {}
        """By path in the sandbox: size, time of change. Files of the host only, such as the workspace's."""
        self.pages: dict[str, int] = {}
        """Page files that it maps: inodes by name."""
        self.folders: set[str] = set()
        """Where criu may have put second names of deleted files."""


def collect(pids: Iterable[int]) -> Held:
    """Look at all of a tree."""
    held = Held()
    for pid in pids:
        with contextlib.suppress(OSError):
            _look_at_maps(pid, held)
            _look_at_descriptors(pid, held)
    return held


def _look_at_maps(pid: int, held: Held) -> None:
    with open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        area, access, _, path = match.groups()
        path = path.replace("\\012", "\n")
        if path.endswith(" (deleted)"):
            held.folders.add(os.path.dirname(path))
        elif path.startswith(f"{DOOR}/"):
            held.pages[path[len(DOOR) + 1 :]] = int(match.group(3))
        elif access[3] == "p" and path.startswith("/"):
            if access[2] == "x":
                held.code.add(path)
            if path not in held.mapped:
                with contextlib.suppress(OSError):
                    found = os.stat(f"/proc/{pid}/map_files/{area}")
                    if stat.S_ISREG(found.st_mode):
                        held.mapped[path] = [found.st_ino, found.st_size, found.st_mtime_ns]


def _look_at_descriptors(pid: int, held: Held) -> None:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        way = f"/proc/{pid}/fd/{fd}"
        with contextlib.suppress(OSError):
            path = os.readlink(way)
            if not path.startswith("/"):
                continue
            found = os.stat(way)
            if not stat.S_ISREG(found.st_mode):
                continue
            if path.endswith(" (deleted)"):
                held.folders.add(os.path.dirname(path))
            elif not _in_layer(way):
                held.open[path] = [found.st_size, found.st_mtime_ns]


def _in_layer(way: str) -> bool:
    """Whether a file travels with the snapshot: it is in memory or in the writable layer."""
    import ctypes

    class StatFs(ctypes.Structure):
        _fields_ = [("kind", ctypes.c_long), ("rest", ctypes.c_long * 31)]

    found = StatFs()
    if ctypes.CDLL(None).statfs(os.fsencode(way), ctypes.byref(found)) != 0:
        return False
    return found.kind in (TMPFS_MAGIC, OVERLAYFS_MAGIC)


def pin(
    mapped: dict[str, list[int]],
    into: str,
    *,
    pins: Pins,
    reader: tuple[int, int] = (0, 0),
    code: Collection[str] = (),
) -> dict[str, list[object]]:
    """Keep mapped files of the host against upgrades: a hard link each, of a copy where that cannot be.

    Paths are the sandbox's, whose user may have chosen what lies there on the host by now: so each is opened once, with
    the rights of who asks, and it is what was opened that is compared and kept.

    Args:
        mapped: By path: inode, size and time of change as the sandbox sees it.
        into: Where to keep them.
        pins: Copies of files of other file systems.
        reader: uid and gid of who asks.
        code: Which of them are programs or libraries, and so copied however large they are. Of data, such as a model's
            weights, only what is small is.

    Returns, by path: inode, size and time of change as the sandbox sees it; the name in `into`, empty if the file is
    of the sandbox's own layer or cannot be kept, and then is only compared.
    """
    pinned: dict[str, list[object]] = {}
    paths = sorted(mapped)
    for first in range(0, len(paths), AT_ONCE):
        some = paths[first : first + AT_ONCE]
        files = _opened(some, reader)
        try:
            for number, path in enumerate(some, first):
                seen, name = mapped[path], ""
                with contextlib.suppress(OSError, KeyError):
                    found = os.fstat(files[path])
                    if [found.st_ino, found.st_size, found.st_mtime_ns] == seen and stat.S_ISREG(found.st_mode):
                        most = None if path in code else DATA_MAX_BYTES
                        pins.keep(files[path], f"{into}/{number}", most_bytes=most)
                        name = str(number)
                pinned[path] = [*seen, name]
        finally:
            for file in files.values():
                os.close(file)
    return pinned


def _opened(paths: Iterable[str], reader: tuple[int, int]) -> dict[str, int]:
    """Those that this user may read."""
    files: dict[str, int] = {}
    with contextlib.suppress(OSError), linux.files_of(*reader):
        for path in paths:
            with contextlib.suppress(OSError):
                files[path] = linux.open_plain(path, flags=os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    return files
