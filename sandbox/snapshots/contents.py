"""What is in the files of a layer: read without its holes, and summed up.

A guest may have made a file of a terabyte that is all hole. So a file is read as its segments of data, and its sum is
over the blocks that are not all zeros: the same for a hole as for zeros that were written, in time that goes by what is
on the disk.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from warmcell.sandbox.snapshots import listing

SUMS = "layer.sums"
BLOCK = 64 * 1024

_ZEROS = bytes(BLOCK)

Stopped = Callable[[], bool]


@contextlib.contextmanager
def opened(path: bytes) -> Iterator[int]:
    """A descriptor to read a file of ours, one that its guest made unreadable included. Blocks."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        mode = stat.S_IMODE(os.lstat(path).st_mode)
        os.chmod(path, mode | 0o400)  # Only the owner can; root is never refused.
        try:
            descriptor = os.open(path, flags)
        finally:
            os.chmod(path, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def segments(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the file has data, as (begin, end); the rest is hole. Blocks."""
    begin = 0
    while begin < size:
        try:
            begin = os.lseek(descriptor, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(descriptor, begin, os.SEEK_HOLE), size)
        if end <= begin:
            return
        yield begin, end
        begin = end


def file_sum(path: bytes, size: int) -> str:
    """SHA-256 over the offset and content of each block of the file that is not all zeros. Blocks."""
    digest = hashlib.sha256()
    with opened(path) as descriptor:
        done = 0
        for begin, end in segments(descriptor, size):
            at = max(begin - begin % BLOCK, done)
            while at < end:
                block = os.pread(descriptor, BLOCK, at)
                if not block:
                    return "short"
                if block != _ZEROS[: len(block)]:
                    digest.update(at.to_bytes(8, "little"))
                    digest.update(block)
                at += BLOCK
            done = at
    return digest.hexdigest()


def layer_sums(layer: Path, *, stopped: Stopped = lambda: False) -> dict[str, str] | None:
    """The sum of each regular file by its name in the layer; None if it was stopped. Blocks."""
    sums = {}
    skip = len(os.fsencode(layer)) + 1
    for path, found in listing.walk(layer):
        if stopped():
            return None
        if stat.S_ISREG(found.st_mode):
            sums[os.fsdecode(path[skip:])] = file_sum(path, found.st_size)
    return sums


def save(directory: Path, sums: dict[str, str]) -> None:
    """Write the sums beside the manifest, with a sum of their own. Blocks."""
    body = _canonical(sums)
    new = directory / f".{SUMS}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(new, flags, 0o600), "wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    os.rename(new, directory / SUMS)


def load(directory: Path) -> dict[str, str] | None:
    """The sums that were saved; None where there are none yet, or not what was written. Blocks."""
    try:
        digest, _, body = (directory / SUMS).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    sums: dict[str, str] = json.loads(body)
    return sums


def _canonical(sums: dict[str, str]) -> bytes:
    return json.dumps(sums, sort_keys=True).encode("ascii")
