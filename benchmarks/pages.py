"""A snapshot's memory as files: reading it into fresh memory, which is what a restore that copies cannot do without.

`python -m benchmarks.pages FILE…` reads them into memory of its own and prints the seconds.
"""

import asyncio
import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.server import BenchmarkError

READ_BYTES = 1 << 30
"""Most that is asked of the system at a time."""

READER_TIMEOUT_S = 300.0


def page_files(image: Path) -> list[Path]:
    """The files that hold a snapshot's memory: those that it maps, and those that a restore copies."""
    return [*sorted((image / "memory").glob("*")), *sorted(image.glob("pages-*.img"))]


def held_bytes(files: Sequence[Path]) -> int:
    """What is in them; a page file looks longer than it is."""
    return sum(end - start for path in files for start, end in _parts(path))


async def read_s(files: Sequence[Path]) -> float:
    """Seconds that a process needs to read all of them into fresh memory of its own."""
    reader = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.pages", *map(str, files)), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(READER_TIMEOUT_S):
            said, _ = await reader.communicate()
    finally:
        if reader.returncode is None:
            reader.kill()
            await reader.wait()
    if reader.returncode != 0:
        raise BenchmarkError(f"the reader of {len(files)} page files ended with {reader.returncode}")
    return float(said)


def forget(directory: Path) -> None:
    """Have the system write all of a directory to disk and drop it from the page cache, but for what processes map.

    Raises:
        BenchmarkError: It is still there.
    """
    mapped = mapped_inodes()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    alone = [path for path in page_files(directory) if path.stat().st_ino not in mapped]
    left = sum(cached_bytes(path) for path in alone)
    if left > held_bytes(alone) / 100:
        raise BenchmarkError(f"{left} bytes of {directory.name} stayed in the page cache")


def mapped_inodes() -> set[int]:
    """The numbers of all files that a process maps; those of other users are seen by root alone."""
    found: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # It has ended, or is none of ours.
            found.update(int(line.split(maxsplit=5)[4]) for line in maps.read_text(errors="replace").splitlines())
    return found - {0}


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    found = 0
    with path.open("rb") as file:
        for start, end in _parts(path):
            start -= start % mmap.ALLOCATIONGRANULARITY
            seen = mmap.mmap(file.fileno(), end - start, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE, offset=start)
            said = ctypes.create_string_buffer(-(-(end - start) // mmap.PAGESIZE))
            if libc.mincore(_address(seen), end - start, said) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
            found += mmap.PAGESIZE * sum(byte & 1 for byte in said.raw)
            seen.close()
    return found


def _address(area: mmap.mmap) -> int:
    """Where a mapping lies that cannot be written to, which ctypes has no view of."""
    import numpy

    return int(numpy.frombuffer(area, dtype="uint8").ctypes.data)


def _parts(path: Path) -> Iterator[tuple[int, int]]:
    """Where a file has something, as (from, to)."""
    with path.open("rb") as file:
        at, size = 0, path.stat().st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing follows
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, at


def _read(files: Sequence[Path]) -> float:
    parts = [(os.open(path, os.O_RDONLY), start, end) for path in files for start, end in _parts(path)]
    began = time.perf_counter()
    for fd, start, end in parts:
        memory = memoryview(mmap.mmap(-1, end - start, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        at = start
        while at < end:
            at += os.preadv(fd, [memory[at - start : at - start + READ_BYTES]], at)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(_read([Path(name) for name in sys.argv[1:]]))
