"""A process with memory of every kind that an image may hold, which tells what is in it. Standard library only.

    python odd_memory.py DIRECTORY KIND…        KIND: areas, huge, heap, threads, children, large=MiB

It waits for SIGUSR1, does what DIRECTORY/ask-PID says, and writes the answer to the fifo DIRECTORY/answer-PID.
"""

import ctypes
import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE, HUGE = 4096, 2 << 20
PRIVATE, SHARED, ANONYMOUS, GROWSDOWN, NORESERVE, HUGETLB = 0x02, 0x01, 0x20, 0x100, 0x4000, 0x40000
NONE, READ, READ_WRITE, READ_WRITE_EXEC = 0, 1, 3, 7
ADVICE = {
    "random": 1,
    "sequential": 2,
    "dontfork": 10,
    "mergeable": 12,
    "hugepage": 14,
    "nohugepage": 15,
    "dontdump": 16,
    "wipeonfork": 18,
}
GUARD_INSTALL, DONTNEED = 102, 4
MAYMOVE = 1
SHARED_AREAS = {"shared", "memfd", "shm", "huge, shared"}

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = libc.sbrk.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.sbrk.argtypes = [ctypes.c_long]
FAILED = ctypes.c_void_p(-1).value


def checked(result: int) -> int:
    """The result of a call, or the error that errno names."""
    if result in (-1, FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Memory:
    """Areas by name: address, length and the pages of them that can be read."""

    def __init__(self) -> None:
        self.areas: dict[str, tuple[int, int]] = {}
        self.unreadable: dict[str, range] = {}
        self.closed: set[str] = set()
        self.random = random.Random(7)

    def new(self, name: str, pages: int, *, flags: int = PRIVATE | ANONYMOUS, fd: int = -1) -> int:
        """An area away from all others, so that the kernel merges none."""
        length = pages * PAGE
        address = checked(libc.mmap(None, length + 2 * PAGE, NONE, PRIVATE | ANONYMOUS, -1, 0)) + PAGE
        checked(libc.mmap(address, length, READ_WRITE, flags | 0x10, fd, 0))
        self.areas[name] = (address, length)
        return address

    def fill(self, name: str, pages: range | None = None) -> None:
        """Random bytes in these pages."""
        address, length = self.areas[name]
        for page in pages if pages is not None else range(length // PAGE):
            ctypes.memmove(address + page * PAGE, self.random.randbytes(PAGE), PAGE)

    def protect(self, name: str, protection: int) -> None:
        """Change what may be done with an area."""
        checked(libc.mprotect(*self.areas[name], protection))
        if protection == NONE:
            self.closed.add(name)

    def sums(self) -> dict[str, str]:
        """A checksum of each area."""
        return {name: self.sum(name) for name in self.areas}

    def sum(self, name: str) -> str:
        """The checksum of one."""
        address, length = self.areas[name]
        if name in self.closed:
            checked(libc.mprotect(address, length, READ))
        digest = hashlib.sha256()
        for page in range(length // PAGE):
            if page not in self.unreadable.get(name, ()):
                digest.update(ctypes.string_at(address + page * PAGE, PAGE))
        if name in self.closed:
            checked(libc.mprotect(address, length, NONE))
        return digest.hexdigest()[:16]


def odd_areas(memory: Memory, directory: Path) -> None:
    """One area of each kind."""
    memory.new("plain", 600)
    memory.fill("plain")
    memory.new("sparse", 900)
    for first in range(0, 900, 90):
        memory.fill("sparse", range(first, first + 30))
    memory.new("crumbs", 900)
    memory.fill("crumbs", range(0, 900, 2))
    memory.new("zeros", 100)
    ctypes.memset(memory.areas["zeros"][0], 0, 100 * PAGE)
    memory.new("untouched", 100)
    memory.new("read-only", 100)
    memory.fill("read-only")
    memory.protect("read-only", READ)
    memory.new("half read-only", 100)
    memory.fill("half read-only")
    checked(libc.mprotect(memory.areas["half read-only"][0] + 50 * PAGE, 50 * PAGE, READ))
    memory.new("closed", 100)
    memory.fill("closed")
    memory.protect("closed", NONE)
    memory.new("executable", 100)
    memory.fill("executable")
    memory.protect("executable", READ_WRITE_EXEC)
    for name, advice in ADVICE.items():
        memory.new(name, 600)
        memory.fill(name)
        checked(libc.madvise(*memory.areas[name], advice))
    memory.new("locked", 50)
    memory.fill("locked")
    checked(libc.mlock(*memory.areas["locked"]))
    memory.new("noreserve", 100, flags=PRIVATE | ANONYMOUS | NORESERVE)
    memory.fill("noreserve")
    memory.new("growsdown", 100, flags=PRIVATE | ANONYMOUS | GROWSDOWN)
    memory.fill("growsdown")
    memory.new("guarded", 100)
    memory.fill("guarded")
    if libc.madvise(memory.areas["guarded"][0] + 40 * PAGE, 3 * PAGE, GUARD_INSTALL) == 0:
        memory.unreadable["guarded"] = range(40, 43)
    memory.new("shared", 100, flags=SHARED | ANONYMOUS)
    memory.fill("shared")
    memfd = os.memfd_create("odd")
    os.ftruncate(memfd, 100 * PAGE)
    memory.new("memfd", 100, flags=SHARED, fd=memfd)
    memory.fill("memfd")
    memory.new("memfd, private", 100, flags=PRIVATE, fd=memfd)
    memory.fill("memfd, private", range(20, 60))
    path = directory / "mapped"
    path.write_bytes(memory.random.randbytes(100 * PAGE))
    file = os.open(path, os.O_RDWR)
    memory.new("file, private", 100, flags=PRIVATE, fd=file)
    memory.fill("file, private", range(10, 50))
    os.close(file)
    shm = os.open("/dev/shm/odd", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(shm, 100 * PAGE)
    memory.new("shm", 100, flags=SHARED, fd=shm)
    memory.fill("shm")


def huge_pages(memory: Memory) -> None:
    """An area of each kind that has pages of 2 MiB, which the machine must have reserved."""
    for name, flags in (("huge", PRIVATE), ("huge, shared", SHARED)):
        free = checked(libc.mmap(None, 3 * HUGE, NONE, PRIVATE | ANONYMOUS, -1, 0))
        address = -(-free // HUGE) * HUGE
        checked(libc.mmap(address, HUGE, READ_WRITE, flags | ANONYMOUS | HUGETLB | 0x10, -1, 0))
        memory.areas[name] = (address, HUGE)
        memory.fill(name)


def heap(memory: Memory) -> None:
    """Two megabytes more of what brk(2) gives."""
    begin = checked(libc.sbrk(600 * PAGE))
    memory.areas["heap"] = (-(-begin // PAGE) * PAGE, 590 * PAGE)
    memory.fill("heap")


def threads(memory: Memory) -> None:
    """Threads that wait for ever, each with a filled stack."""
    started = threading.Barrier(5)

    def wait() -> None:
        mine = ctypes.create_string_buffer(memory.random.randbytes(200 * PAGE))
        started.wait()
        signal.sigwait({signal.SIGUSR2})
        del mine

    for _ in range(4):
        threading.Thread(target=wait, daemon=True).start()
    started.wait()


def brk(memory: Memory) -> dict[str, object]:
    """The heap grows with zeros and shrinks, and what was in it stays.

    Between the calls nothing may allocate much: the C library uses the same heap.
    """
    length = 64 * PAGE
    zeros = checked(libc.mmap(None, length, READ, PRIVATE | ANONYMOUS, -1, 0))
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    before = memory.sum("heap")
    begin = checked(libc.sbrk(length))
    fresh = libc.memcmp(begin, zeros, length)
    ctypes.memset(begin, 1, length)
    checked(libc.sbrk(-length))
    again = checked(libc.sbrk(length))
    clean = libc.memcmp(again, zeros, length)
    checked(libc.sbrk(-length))
    libc.munmap(ctypes.c_void_p(zeros), ctypes.c_size_t(length))
    return {"same": begin == again, "fresh": fresh == 0, "clean": clean == 0, "kept": memory.sum("heap") == before}


def grow(memory: Memory) -> dict[str, object]:
    """What realloc(3) does: memory that grows by far more than the image is long keeps its old bytes."""
    libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
    libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found: dict[str, object] = {}
    for name in ("plain", "sparse"):
        address, _ = memory.areas[name]
        old = ctypes.string_at(address, 300 * PAGE)
        for offset in (0, 30 * PAGE):  # a part of a merged area may be what grows
            moved = libc.mremap(address + offset, 20 * PAGE, 50_000 * PAGE, MAYMOVE)
            if moved in (None, FAILED):
                found[f"{name} +{offset}"] = "refused"
                continue
            ctypes.memset(moved + 49_000 * PAGE, 5, PAGE)
            same = ctypes.string_at(moved, 20 * PAGE) == old[offset : offset + 20 * PAGE]
            found[f"{name} +{offset}"] = "same" if same else "other"
            back = libc.mremap(moved, 50_000 * PAGE, 20 * PAGE, MAYMOVE)
            checked(libc.mremap(back, 20 * PAGE, 20 * PAGE, MAYMOVE | 2, ctypes.c_void_p(address + offset)))
    return found


def part(memory: Memory) -> bool:
    """Make two pieces of the plain area areas of their own."""
    address, _ = memory.areas["plain"]
    checked(libc.mprotect(address, 50 * PAGE, READ))
    checked(libc.mprotect(address + 100 * PAGE, 50 * PAGE, READ))
    return True


def swap(memory: Memory) -> bool:
    """Let the two pieces change places, as moved memory does."""
    address, _ = memory.areas["plain"]
    length, other = 50 * PAGE, address + 100 * PAGE
    free = checked(libc.mmap(None, length, NONE, PRIVATE | ANONYMOUS, -1, 0))
    for source, target in ((address, free), (other, address), (free, other)):
        checked(libc.mremap(source, length, length, MAYMOVE | 2, ctypes.c_void_p(target)))
    return True


def discard(memory: Memory) -> dict[str, str]:
    """Give some pages back as allocators do, and look at them again; what is in them."""
    found = {}
    for name in ("noreserve", "plain"):
        address, _ = memory.areas[name]
        before = ctypes.string_at(address + PAGE, 4 * PAGE)
        checked(libc.madvise(address + PAGE, 4 * PAGE, DONTNEED))
        after = ctypes.string_at(address + PAGE, 4 * PAGE)
        found[name] = "zeros" if after == bytes(4 * PAGE) else "the same" if after == before else "something else"
    return found


def dirty(memory: Memory) -> dict[str, str]:
    """Change some pages of what can be written; the new checksums."""
    for name, (address, length) in memory.areas.items():
        if name not in memory.closed and "read-only" not in name:
            for page in sorted(memory.random.sample(range(length // PAGE), 5)):
                if page not in memory.unreadable.get(name, ()):
                    ctypes.memmove(address + page * PAGE + 100, memory.random.randbytes(64), 64)
    return memory.sums()


def rewrite(memory: Memory) -> bool:
    """Write runs of pages anew, long and short ones, at other places in each process."""
    at = memory.random.randrange(100)
    for length in (1, 600, 15, 16, 40, 300):
        memory.fill("large", range(at, at + length))
        at += length + 7
    return True


def mark(memory: Memory) -> bool:
    """Say in all memory that is shared who was here last."""
    for name in SHARED_AREAS & memory.areas.keys():
        ctypes.memmove(memory.areas[name][0], os.getpid().to_bytes(4, "little"), 4)
    return True


def marks(memory: Memory) -> dict[str, int]:
    """Who was here last."""
    shared = sorted(SHARED_AREAS & memory.areas.keys())
    return {name: int.from_bytes(ctypes.string_at(memory.areas[name][0], 4), "little") for name in shared}


def smaps(memory: Memory) -> dict[str, list[str]]:
    """How the kernel describes the first page of each area: its name and flags."""
    found, lines = {}, iter(Path("/proc/self/smaps").read_text().splitlines())
    name, low, high = "", 0, 0
    for line in lines:
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(edge, 16) for edge in words[0].split("-"))
            name = words[5] if len(words) > 5 else ""
        elif words[0] == "VmFlags:":
            found.update({key: [name, *words[1:]] for key, (at, _) in memory.areas.items() if low <= at < high})
    return found


def guarded(memory: Memory) -> bool:
    """The guard pages still cannot be read."""
    reader, writer = os.pipe()
    address = memory.areas["guarded"][0]
    try:
        for page in memory.unreadable["guarded"]:
            if libc.write(writer, ctypes.c_void_p(address + page * PAGE), 1) != -1:
                return False
        return bool(libc.write(writer, ctypes.c_void_p(address + 39 * PAGE), 1) == 1)
    finally:
        os.close(reader)
        os.close(writer)


def fork(directory: Path, memory: Memory, depth: int) -> list[int]:
    """Children that share the parent's memory and change some of it; theirs, too, have one."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        memory.random.seed(os.getpid())
        memory.areas.pop("dontfork", None)
        if "plain" in memory.areas:
            memory.fill("plain", range(200, 300))
            checked(libc.madvise(memory.areas["sparse"][0], 10 * PAGE, DONTNEED))
        if depth:
            fork(directory, memory, depth - 1)
        os.close(reader)
        os.write(writer, b"!")
        os.close(writer)
        serve(directory, memory)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return [pid]


def serve(directory: Path, memory: Memory) -> None:
    """Answer for ever."""
    handlers: dict[str, Callable[[], Any]] = {
        "sums": memory.sums,
        "dirty": lambda: dirty(memory),
        "brk": lambda: brk(memory),
        "grow": lambda: grow(memory),
        "rewrite": lambda: rewrite(memory),
        "discard": lambda: discard(memory),
        "part": lambda: part(memory),
        "swap": lambda: swap(memory),
        "mark": lambda: mark(memory),
        "marks": lambda: marks(memory),
        "guarded": lambda: guarded(memory),
        "smaps": lambda: smaps(memory),
        "fork": lambda: fork(directory, memory, 0),
        "credentials": lambda: Path("/proc/self/status").read_text(),
    }
    while True:
        signal.sigwait({signal.SIGUSR1})
        ask = (directory / f"ask-{os.getpid()}").read_text()
        try:
            answer = handlers[ask]()
        except Exception as error:
            answer = {"error": repr(error)}
        with open(directory / f"answer-{os.getpid()}", "w") as fifo:
            json.dump(answer, fifo)


def main() -> None:
    directory, kinds = Path(sys.argv[1]), sys.argv[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    memory = Memory()
    for kind in kinds:
        if kind == "areas":
            odd_areas(memory, directory)
        elif kind == "huge":
            huge_pages(memory)
        elif kind == "heap":
            heap(memory)
        elif kind == "threads":
            threads(memory)
        elif kind.startswith("large="):
            pages = int(kind.removeprefix("large=")) << 8
            memory.new("large", pages)
            block = memory.random.randbytes(1 << 20)
            for page in range(0, pages, 256):
                ctypes.memmove(memory.areas["large"][0] + page * PAGE, block, len(block))
    if "children" in kinds:
        fork(directory, memory, 1)
    Path(directory, "ready").open("w").close()
    serve(directory, memory)


if __name__ == "__main__":
    main()
