"""What is in a writable layer, without its contents: enough to see cheaply that nobody has touched it.

Each entry is one line of JSON: name, kind, mode, owner, size, modification time, link target or device number, and
extended attributes (an overlay keeps its own there). Names are any bytes and come from the guest.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LISTING = "layer.list"

_UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTSUP})


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries of a layer in one fixed order."""

    lines: tuple[bytes, ...]
    disk_bytes: int
    """What they take on the disk; a hole takes nothing."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"\n".join(self.lines)).hexdigest()


def scan(layer: Path) -> Listing:
    """Look at every entry below `layer`. Follows no link, opens no file. Blocks.

    A directory that this user cannot enter, or that lies deeper than a path can be long, is one entry.
    """
    lines: list[bytes] = []
    total = 0
    skip = len(os.fsencode(layer)) + 1
    for path, found in walk(layer):
        lines.append(_line(path[skip:], path, found))
        total += found.st_blocks * 512
    lines.sort()
    return Listing(tuple(lines), total)


def walk(layer: Path) -> Iterator[tuple[bytes, os.stat_result]]:
    """Every entry below `layer` with its path as bytes, parents before what is in them. Blocks."""
    waiting = [os.fsencode(layer)]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            continue
        for entry in found:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as error:
                if error.errno not in _UNREADABLE:
                    raise
                continue
            yield entry.path, status
            if stat.S_ISDIR(status.st_mode):
                waiting.append(entry.path)


def save(directory: Path, listing: Listing) -> None:
    """Write the listing beside the manifest. Blocks.

    Raises:
        OSError: It could not be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(directory / LISTING, flags, 0o600), "wb") as file:
        file.write(b"\n".join(listing.lines))


def load(directory: Path) -> tuple[bytes, ...]:
    """The lines that were saved. Blocks.

    Raises:
        OSError: There are none.
    """
    data = (directory / LISTING).read_bytes()
    return tuple(data.split(b"\n")) if data else ()


def difference(saved: tuple[bytes, ...], found: tuple[bytes, ...]) -> str:
    """The first entry that is not as it was, in words; empty where there is none."""
    changed = set(saved) ^ set(found)
    if not changed:
        return ""
    names = sorted({str(json.loads(line)[0]) for line in changed if _is_line(line)})
    return names[0] if names else "the listing itself"


def _is_line(line: bytes) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, list) and bool(value)


def _line(name: bytes, path: bytes, found: os.stat_result) -> bytes:
    mode = found.st_mode
    target: str | int = ""
    if stat.S_ISLNK(mode):
        target = os.fsdecode(os.readlink(path))
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        target = found.st_rdev  # An overlay marks what was removed by a character device 0:0.
    size, changed = (found.st_size, found.st_mtime_ns) if stat.S_ISREG(mode) else (0, 0)
    fields = [os.fsdecode(name), mode, found.st_uid, found.st_gid, size, changed, target, attributes(path)]
    return json.dumps(fields).encode("ascii")


def attributes(path: bytes) -> dict[str, str]:
    """Extended attributes as hexadecimal digits; none where they cannot be read. Blocks."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
        return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(names)}
    except OSError:
        return {}
