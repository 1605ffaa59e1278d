"""Whether two sandboxes have the same private files, so that a kernel in the one would miss nothing of the other."""

import os
import stat
from collections.abc import Sequence

from warmcell.sandbox.backends import trees
from warmcell.sandbox.backends.layers import Parts

MOST_ENTRIES = 200
MOST_BYTES = 128 * 1024
"""Who has more is taken to be unlike anybody: to look at it would take longer than it saves."""

OWN = ("user.overlay.uuid", "trusted.overlay.uuid")
"""What Linux gives each overlay of its own."""

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def alike(one: int, other: int, layers: Sequence[int], parts: Parts) -> bool:
    """Compare two sandboxes that were planned alike: names, kinds, owners, rights, attributes and contents of all that
    is private, and whether what they show of the host is the same. Blocks.

    Times are not compared. What cannot be looked at is unlike. Nothing may run in them but what does not write.

    Args:
        one: A descriptor of the directory in which all parts of one are.
        other: The other's.
        layers: Descriptors of the layers that they began with, if they began with any.
        parts: What there is of both.
    """
    look = _Look()
    try:
        return (
            len({_identity(os.fstat(layer)) for layer in layers}) <= 1
            and all(_identity(_at(one, place)) == _identity(_at(other, place)) for place in parts.shown)
            and all(look.at(one, other, part.place) for part in parts.parts.values())
        )
    except (OSError, trees.Refused):
        return False


class _Look:
    def __init__(self) -> None:
        self._entries_left = MOST_ENTRIES
        self._bytes_left = MOST_BYTES

    def at(self, one: int, other: int, name: str) -> bool:
        """Two directories, and all below them."""
        opened: list[int] = []
        try:
            for above in (one, other):
                opened.append(trees.within(above, name))
            mine, theirs = opened
            found = os.fstat(mine)
            if _about(found) != _about(os.fstat(theirs)) or _attributes(mine) != _attributes(theirs):
                return False
            here, there = dict(trees.entries(mine)), dict(trees.entries(theirs))
            for entry in [entry for entry in here if here[entry].st_dev != found.st_dev and entry in there]:
                if _identity(here[entry]) == _identity(there[entry]):  # Both show it, and neither is looked into.
                    del here[entry], there[entry]
            self._entries_left -= len(here)
            if here.keys() != there.keys() or self._entries_left < 0:
                return False
            return all(self._same(mine, theirs, entry, here[entry], there[entry]) for entry in here)
        finally:
            for handle in opened:
                os.close(handle)

    def _same(self, one: int, other: int, name: str, here: os.stat_result, there: os.stat_result) -> bool:
        if stat.S_ISDIR(here.st_mode) and stat.S_ISDIR(there.st_mode):
            return self.at(one, other, name)
        if _about(here) != _about(there) or here.st_nlink > 1 or there.st_nlink > 1:
            return False
        if stat.S_ISLNK(here.st_mode):
            return os.readlink(name, dir_fd=one) == os.readlink(name, dir_fd=other)
        if not stat.S_ISREG(here.st_mode):
            return trees.is_whiteout(here)
        self._bytes_left -= here.st_size
        return here.st_size == there.st_size and self._bytes_left >= 0 and _read(one, name) == _read(other, name)


def _at(base: int, place: str) -> os.stat_result:
    handle = trees.within(base, place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.fstat(handle)
    finally:
        os.close(handle)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _about(found: os.stat_result) -> tuple[int, ...]:
    return found.st_mode, found.st_uid, found.st_gid, found.st_rdev


def _attributes(handle: int) -> dict[str, bytes]:
    return {name: os.getxattr(handle, name) for name in os.listxattr(handle) if name not in OWN}


def _read(directory: int, name: str) -> tuple[bytes, dict[str, bytes]]:
    with open(os.open(name, READ, dir_fd=directory), "rb") as file:
        return file.read(MOST_BYTES), _attributes(file.fileno())
