"""A stopped kernel's memory, copied to its page file by the helper itself: in large pieces, by as many as can.

criu moves pages one by one through pipes, in one thread that the kernel's own waits for. So where it would write those
of the kernel it finds a way to nowhere (`divert`): it takes each page up, lets it go again, and writes down which there
are. Then, nothing of the kernel running still, they are copied to where criu would have put them (`fill`).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import threading
from array import array
from pathlib import Path

from warmcell.sandbox.helper.images import pagemap
from warmcell.sandbox.helper.images.errors import ImageError
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from warmcell.sandbox.helper.images.pagemap import Run
    from warmcell.sandbox.helper.spare import Spare

FIRST = 1
"""The number of the first page file that criu makes: that of the first process of the tree, or of memory it shares."""
SHARED = (b" /memfd:", b" /dev/zero (deleted)")
"""How areas of such memory are called: memfds, and what has no name at all."""
PIECE_BYTES = 1 << 19
"""Large enough for the file system, small enough for a processor's own cache."""
PARTS_MAX = 512
"""Pages that lie apart are read so many at once; Linux takes 1024."""
THREADS_MAX = 4
LEAST_BYTES = 16 << 20
"""Less than this for each is not worth another thread."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]


def is_first(pids: Sequence[int]) -> bool:
    """Whether the first page file will be that of the first of these processes, all of which are stopped."""
    for pid in pids:
        with open(f"/proc/{pid}/maps", "rb") as file:
            areas = file.read()
        if any(name in areas for name in SHARED):
            return False
        for fd in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("/memfd:"):
                return False
    return True


def divert(image: int, nowhere: int, *, number: int = FIRST) -> None:
    """Have criu, which is to write into a directory, drop the memory that a page file is to hold.

    Args:
        image: The directory.
        nowhere: /dev/null, which criu has open under this number too.
        number: Of the page file.
    """
    os.symlink(f"/proc/self/fd/{nowhere}", f"pages-{number}.img", dir_fd=image)


def fill(image: str, processes: Mapping[int, int], *, number: int = FIRST, spare: Spare | None = None) -> None:
    """Write the page file that was diverted, if one was.

    Args:
        image: The directory.
        processes: Who is in it, by the guest's numbers: the host's. All of them are stopped.
        number: Of the page file.
        spare: A file that may be written over.

    Raises:
        HelperError: The kernel has ended meanwhile, or the image is not as it should be.
        OSError: The disk is full.
    """
    path = f"{image}/pages-{number}.img"
    if not os.path.islink(path):  # criu removes what it has not used.
        return
    os.unlink(path)
    try:
        owner = _owner(Path(image), number)
        found = pagemap.read(Path(image) / f"pagemap-{owner}.img")
    except ImageError as error:
        raise HelperError(error.code, error.message, hint=error.hint) from error
    if owner not in processes:
        raise _ended()
    target = None if spare is None else spare.take(path, length_bytes=found.bytes_in_file)
    if target is None:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _Copy(processes[owner], target, pagemap.runs(found)).run(found.bytes_in_file)
        os.ftruncate(target, found.bytes_in_file)  # One that was written over was longer, perhaps.
    finally:
        os.close(target)


def _owner(image: Path, number: int) -> int:
    """The process whose memory belongs into a page file."""
    names = [path.name for path in image.glob("pagemap-*.img") if pagemap.page_file(path) == number]
    owner = names[0].removeprefix("pagemap-").removesuffix(".img") if len(names) == 1 else ""
    if not owner.isdecimal():
        raise HelperError(
            "snapshot_failed",
            "CRIU has numbered the page files in another way than is known",
            hint="Use another version of CRIU, 4.2 for one.",
            details={"found": names},
        )
    return int(owner)


class _Copy:
    """One process's pages, side by side into one file."""

    def __init__(self, pid: int, target: int, runs: Sequence[Run]) -> None:
        self._pid, self._target = pid, target
        self._pieces = _pieces(runs)
        self._lock = threading.Lock()
        self._failed: BaseException | None = None

    def run(self, size_bytes: int) -> None:
        """Copy all of it."""
        try:
            # As long as this process is there at the end, it was that one whose number was read from all the time.
            process = os.pidfd_open(self._pid)
            memory = os.open(f"/proc/{self._pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except (ProcessLookupError, FileNotFoundError):
            raise _ended() from None
        try:
            most = min(processors(), THREADS_MAX, size_bytes // LEAST_BYTES)
            self._side_by_side(memory, most)
            ending = select.poll()
            ending.register(process, select.POLLIN)
            if ending.poll(0):
                raise _ended()
            if self._failed is not None:
                raise self._failed
        finally:
            os.close(memory)
            os.close(process)

    def _side_by_side(self, memory: int, most: int) -> None:
        others: list[threading.Thread] = []
        try:
            for _ in range(most - 1):
                one = threading.Thread(target=self._work, args=(memory,))
                with contextlib.suppress(RuntimeError):  # The limit of processes: fewer do it as well.
                    one.start()
                    others.append(one)
            self._work(memory)
        except BaseException as error:
            self._failed = error
            raise
        finally:
            for one in others:  # They write to what the caller closes.
                one.join()

    def _work(self, memory: int) -> None:
        room = mmap.mmap(-1, PIECE_BYTES)
        view = memoryview(room)
        try:
            while self._failed is None:
                with self._lock:
                    piece = next(self._pieces, None)
                if piece is None:
                    return
                offset, parts = piece
                read = view[: sum(length for _, length in parts)]
                self._read(memory, parts, read)
                while read:
                    done = os.pwrite(self._target, read, offset)
                    read, offset = read[done:], offset + done
        except BaseException as error:
            self._failed = error

    def _read(self, memory: int, parts: list[tuple[int, int]], into: memoryview) -> None:
        here = array("Q", [ctypes.addressof(ctypes.c_char.from_buffer(into)), len(into)])
        there = array("Q", [number for part in parts for number in part])
        ours, theirs = here.buffer_info()[0], there.buffer_info()[0]
        if _libc.process_vm_readv(self._pid, ours, 1, theirs, len(parts), 0) == len(into):
            return
        # Some of it nobody may read, not even the process itself. This way one can, page by page.
        at = 0
        for address, length in parts:
            end = at + length
            while at < end:
                done = os.preadv(memory, [into[at:end]], address + length - (end - at))
                if not done:
                    raise _ended()
                at += done


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def _pieces(runs: Sequence[Run]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Where in the file, and what of the memory (address and length in bytes) belongs there."""
    offset, size = 0, 0
    parts: list[tuple[int, int]] = []
    for run in runs:
        address = run.start
        while address < run.end:
            length = min(run.end - address, PIECE_BYTES - size)
            parts.append((address, length))
            size += length
            address += length
            if size == PIECE_BYTES or len(parts) == PARTS_MAX:
                yield offset, parts
                offset, size, parts = offset + size, 0, []
    if parts:
        yield offset, parts


def _ended() -> HelperError:
    return HelperError("conflict", "The kernel has ended while it was saved", hint="Start it anew.")
