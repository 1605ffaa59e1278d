"""Mounts that show files as somebody else's."""

from __future__ import annotations

import os

from .alone import number_of
from .linux import CLONE_NEWUSER, Refused, libc, write

ID_MAX = 2**32 - 1
MOST = 64
_namespaces: dict[tuple[int, int, int, int], int] = {}
"""At most so many are kept; no process is in them."""


def namespace_that_swaps(uid: int, other_uid: int, gid: int, other_gid: int) -> int:
    """A descriptor of a user namespace that maps `uid` to `other_uid` and the other way round, all else to itself."""
    key = (uid, other_uid, gid, other_gid)
    if key in _namespaces:
        return _namespaces[key]
    while len(_namespaces) >= MOST:
        os.close(_namespaces.pop(next(iter(_namespaces))))
    made_read, made_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(made_read)
        os.close(done_write)
        os.write(made_write, b"." if libc.unshare(CLONE_NEWUSER) == 0 else b"!")
        os.read(done_read, 1)
        os._exit(0)
    os.close(made_write)
    os.close(done_read)
    try:
        if os.read(made_read, 1) != b".":
            raise Refused("make a user namespace for the mapping", 1)
        number = number_of(child)
        write(f"/proc/{number}/uid_map", swapping(uid, other_uid).encode())
        write(f"/proc/{number}/gid_map", swapping(gid, other_gid).encode())
        _namespaces[key] = os.open(f"/proc/{number}/ns/user", os.O_RDONLY)
    finally:
        os.close(done_write)
        os.close(made_read)
        os.waitpid(child, 0)
    return _namespaces[key]


def swapping(one: int, other: int) -> str:
    """An id map that exchanges two ids."""
    low, high = sorted((one, other))
    rows = [(0, 0, low), (low, high, 1), (low + 1, low + 1, high - low - 1), (high, low, 1)]
    rows.append((high + 1, high + 1, ID_MAX - high - 1))
    if low == high:
        rows = [(0, 0, ID_MAX)]
    return "\n".join(f"{inside} {outside} {count}" for inside, outside, count in rows if count > 0)
