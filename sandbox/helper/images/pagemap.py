"""`pagemap-*.img`: which pages of an address space lie in the page file, in the order in which they lie there.

A large kernel has a hundred thousand of these entries, so they are read with one regular expression where they have
CRIU's usual form, and kept as parallel lists. Entries that need no change are written as the bytes that they were.
"""

import gc
import re
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from operator import gt, ne, or_
from pathlib import Path

from warmcell.sandbox.helper.images.criu import PAGE_BYTES, framed, header, messages
from warmcell.sandbox.helper.images.errors import corrupt
from warmcell.sandbox.helper.images.protobuf import message, numbers, read_varint

PARENT, LAZY, PRESENT = 1, 2, 4
_VADDR, _COMPAT_PAGES, _IN_PARENT, _FLAGS, _PAGES = 1, 2, 3, 4, 5
_VARINT = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_USUAL = re.compile(
    rb"((....)\x08([\x80-\xff]{3})(%b)\x10(?:%b)\x20(%b)\x28(%b))" % (_VARINT, _VARINT, _VARINT, _VARINT), re.DOTALL
)
_LOW_BITS = 21
_HEAD_BYTES = 64


class _Numbers(dict[bytes, int]):
    """Decoded varints; there are few different ones, and a look-up costs less than decoding."""

    def __missing__(self, raw: bytes) -> int:
        value = self[raw] = read_varint(raw, 0)[0]
        return value


class _LowBits(dict[bytes, int]):
    """The first three bytes of longer varints: the low 21 bits of an address."""

    def __missing__(self, raw: bytes) -> int:
        value = self[raw] = raw[0] & 0x7F | (raw[1] & 0x7F) << 7 | (raw[2] & 0x7F) << 14
        return value


class _Sizes(dict[bytes, int]):
    def __missing__(self, raw: bytes) -> int:
        value = self[raw] = int.from_bytes(raw, "little")
        return value


@dataclass(frozen=True, slots=True)
class PageMap:
    """The entries as parallel lists: addresses in bytes, `counts` and `offsets` in pages, `raw` with the length."""

    pages_id: int
    head: bytes
    starts: list[int]
    ends: list[int]
    counts: list[int]
    flags: list[int]
    offsets: list[int]
    raw: list[bytes]

    @property
    def bytes_in_file(self) -> int:
        """How long the page file is."""
        return self.offsets[-1] * PAGE_BYTES


def read(path: Path) -> PageMap:
    """Read a page map.

    Raises:
        ImageError: It is damaged, out of order, or overlapping.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise corrupt(f"{path.name} cannot be read ({error.strerror})") from error
    return parse(data, name=path.name)


def page_file(path: Path) -> int:
    """The number of the page file that a page map, of a process or of shared memory, is about.

    Raises:
        ImageError: It is damaged.
    """
    try:
        with path.open("rb") as file:
            return numbers(_head(file.read(_HEAD_BYTES), path.name)[0])[1]
    except OSError as error:
        raise corrupt(f"{path.name} cannot be read ({error.strerror})") from error


def _head(data: bytes, name: str) -> tuple[bytes, int]:
    """The first message, and where it ends."""
    top = header("pagemap")
    first = len(top) + 4 + int.from_bytes(data[len(top) : len(top) + 4], "little")
    head = messages(data[:first], "pagemap", name=name)
    if not head or 1 not in numbers(head[0]):
        raise corrupt(f"{name} does not name its page file")
    return head[0], first


def parse(data: bytes, *, name: str) -> PageMap:
    """`read`, from bytes."""
    head, first = _head(data, name)
    lists = _usual(data, first) or _any(data, name)
    starts, counts, flags, raw = lists
    if all(flag & PRESENT for flag in set(flags)):
        offsets = list(accumulate(counts, initial=0))
    else:
        present = [count if flag & PRESENT else 0 for count, flag in zip(counts, flags, strict=True)]
        offsets = list(accumulate(present, initial=0))
    ends = [start + count * PAGE_BYTES for start, count in zip(starts, counts, strict=True)]
    if any(map(gt, ends, starts[1:])) or reduce(or_, starts, 0) % PAGE_BYTES:
        raise corrupt(f"the entries of {name} are out of order")
    if not all(counts) or (ends and ends[-1] >= 1 << 64):
        raise corrupt(f"{name} holds an entry of no possible size")
    return PageMap(numbers(head)[1], head, starts, ends, counts, flags, offsets, raw)


_Lists = tuple[list[int], list[int], list[int], list[bytes]]


def _usual(data: bytes, first: int) -> _Lists | None:
    collecting = gc.isenabled()
    gc.disable()  # it would look through the growing list of tuples again and again, and find nothing
    try:
        found = _USUAL.findall(data, first)
        if not found:
            return None
        raw, sizes, low, high, flags, counts = map(list, zip(*found, strict=True))
    finally:
        if collecting:
            gc.enable()
    lengths = list(map(len, raw))
    size, lows, highs, number = _Sizes(), _LowBits(), _Numbers(), _Numbers()
    if sum(lengths) != len(data) - first or [size[stated] + 4 for stated in sizes] != lengths:
        return None
    starts = [(highs[a] << _LOW_BITS) + lows[b] for a, b in zip(high, low, strict=True)]
    return starts, [number[count] for count in counts], [number[flag] for flag in flags], raw


def _any(data: bytes, name: str) -> _Lists:
    starts, counts, flags, raw = [], [], [], []
    for entry in messages(data, "pagemap", name=name)[1:]:
        found = numbers(entry)
        if _VADDR not in found:
            raise corrupt(f"an entry of {name} has no address")
        starts.append(found[_VADDR])
        counts.append(found.get(_PAGES, found.get(_COMPAT_PAGES, 0)))
        # What CRIU assumes of entries that older versions wrote.
        flags.append(found.get(_FLAGS, PARENT if found.get(_IN_PARENT) else PRESENT))
        raw.append(framed(entry))
    return starts, counts, flags, raw


def entry(start: int, count: int, flags: int) -> bytes:
    """An entry in CRIU's usual form, with its length in front."""
    return framed(message({_VADDR: start, _COMPAT_PAGES: 0, _FLAGS: flags, _PAGES: count}))


def joined(head: bytes, raw: list[bytes]) -> bytes:
    """The bytes of a page map."""
    return header("pagemap") + framed(head) + b"".join(raw)


@dataclass(frozen=True, slots=True)
class Run:
    """Pages that lie side by side in memory and in the page file: addresses and offset in bytes."""

    start: int
    end: int
    offset_bytes: int


def runs(pagemap: PageMap) -> list[Run]:
    """The entries joined to runs as long as can be; pages that are not in the page file are left out."""
    ends, starts = pagemap.ends, pagemap.starts
    breaks = [index for index, apart in enumerate(map(ne, ends, starts[1:]), start=1) if apart]
    present = [flag & PRESENT for flag in pagemap.flags]
    if not all(present):
        absent = [index for index, here in enumerate(present) if not here]
        breaks = sorted({*breaks, *absent, *(index + 1 for index in absent)} - {0, len(ends)})
    edges = [0, *breaks, len(ends)] if ends else []
    return [
        Run(starts[first], ends[last - 1], pagemap.offsets[first] * PAGE_BYTES)
        for first, last in pairwise(edges)
        if present[first]
    ]
