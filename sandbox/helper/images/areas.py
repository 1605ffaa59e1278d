"""Which parts of an address space may become private mappings of a file without the program being able to tell.

A private mapping of a file is not in all things like anonymous memory, so only areas whose every property is known stay
in the choice, and of those only pages that were dumped:

- Stacks that grow, vdso, AIO rings, shadow stacks, huge pages, shared memory and anything unknown stay as they are, and
  so do locked areas, areas without access, executable ones, and those with madvise(2) flags that a file cannot have.
- Areas with MAP_NORESERVE stay: allocators which give memory back with MADV_DONTNEED and then count on zeros reserve
  theirs so (jemalloc does). On a private mapping of a file the old bytes would come back.
- The last page of an area stays. mremap(2) then cannot make the file's part longer: it fails across the border, and
  the C library copies instead.

A private mapping of a file is taken apart where it was written: what was dumped of it becomes a mapping of the page
file, what was not stays as it is. Such are the data of libraries, nearly all of which the linker has written, and what
an earlier restore has left; so memory that is written again and again is mapped again and again, too.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from warmcell.sandbox.helper.images import criu, pagemap
from warmcell.sandbox.helper.images.criu import PAGE_BYTES, Area
from warmcell.sandbox.helper.images.pagemap import PageMap, Run

# RANDOM, SEQUENTIAL, DONTFORK, MERGEABLE, HUGEPAGE, NOHUGEPAGE, DONTDUMP. Not WIPEONFORK: it is refused for files.
_MADVICE = sum(1 << advice for advice in (1, 2, 10, 12, 14, 15, 16))
# The kernel's usual vm.max_map_count is 65530.
_MOST_AREAS = 60_000
_LEAST_ROOM = 256


@dataclass(frozen=True, slots=True)
class Mapped:
    """A part of area number `area` that becomes a mapping; addresses and the offset in the page file in bytes."""

    area: int
    run: Run


def may_be_mapped(area: Area) -> bool:
    """True where pages of this area may come from a file."""
    return (
        area.status & ~criu.HEAP == criu.REGULAR | criu.ANON_PRIVATE
        and area.flags == criu.MAP_PRIVATE | criu.MAP_ANONYMOUS
        and area.prot in (criu.PROT_READ, criu.PROT_READ | criu.PROT_WRITE)
        and not area.madv & ~_MADVICE
        and area.shmid == 0
    )


def may_be_mapped_anew(area: Area) -> bool:
    """True where an area is a private mapping of a file, and what was written of it may come from another."""
    return (
        area.status == criu.REGULAR | criu.FILE_PRIVATE
        and area.flags == criu.MAP_PRIVATE
        and area.prot in (criu.PROT_READ, criu.PROT_READ | criu.PROT_WRITE)
        and not area.madv & ~_MADVICE
    )


def choose(
    areas: Sequence[Area],
    found: PageMap,
    *,
    least_pages: int,
    most: int,
    page_file_ids: frozenset[int] = frozenset(),
    again: bool = True,
) -> list[Mapped]:
    """The runs worth mapping, by address.

    Args:
        areas: As `criu.areas` gives them.
        found: What was dumped of them.
        least_pages: A run that is shorter is cheaper to copy.
        most: How many at most; the longest are taken. Fewer where an area is in many pieces from earlier restores.
        page_file_ids: Files of earlier restores.
        again: Take mappings of those apart as well.
    """
    least = least_pages * PAGE_BYTES

    def limit(area: Area) -> int:
        if may_be_mapped(area):
            return area.end - PAGE_BYTES
        if not may_be_mapped_anew(area):
            return area.start
        if area.shmid in page_file_ids:
            return area.end if again else area.start
        return area.end - PAGE_BYTES

    chosen = [
        mapped for mapped in within(areas, pagemap.runs(found), limit) if mapped.run.end - mapped.run.start >= least
    ]
    if page_file_ids and again:
        most = min(most, max(_LEAST_ROOM, (most - joints(areas, page_file_ids)) // 2))
    room = max(0, min(most, (_MOST_AREAS - len(areas)) // 2))
    if len(chosen) > room:
        longest = sorted(chosen, key=lambda mapped: mapped.run.start - mapped.run.end)[:room]
        chosen = sorted(longest, key=lambda mapped: mapped.run.start)
    return chosen


def within(areas: Sequence[Area], runs: Sequence[Run], limit: Callable[[Area], int]) -> Iterator[Mapped]:
    """The parts of `runs` that lie in an area, below the address that `limit` says for it."""
    at = 0
    for number, area in enumerate(areas):
        end_of_area = limit(area)
        if end_of_area <= area.start or area.status & criu.GUARD:
            continue
        while at < len(runs) and runs[at].end <= area.start:
            at += 1
        index = at
        while index < len(runs) and runs[index].start < end_of_area:
            run = runs[index]
            start, end = max(run.start, area.start), min(run.end, end_of_area)
            yield Mapped(number, Run(start, end, run.offset_bytes + start - run.start))
            index += 1
        at = max(at, index - 1)


def joints(areas: Sequence[Area], page_file_ids: frozenset[int]) -> int:
    """How many pairs of neighbours are mappings of these page files, though they could be one."""
    return sum(
        one.end == other.start and one.prot == other.prot and one.madv == other.madv
        for one, other in pairwise(area for area in areas if area.shmid in page_file_ids)
        if one.status & other.status & criu.FILE_PRIVATE
    )


def split(areas: Sequence[Area], chosen: Sequence[Mapped], *, file_id: int) -> list[bytes]:
    """The messages of all areas, with `chosen` as mappings of file `file_id`."""
    new: list[bytes] = []
    last: tuple[int, int, bytes] | None = None  # where the mapping ends that was added last, in memory and in the file
    begin_of_last = (0, 0)

    def add(mapping: bytes, run: Run) -> None:
        """A mapping; it continues the one before where it can."""
        nonlocal last, begin_of_last
        if last == (run.start, run.offset_bytes, mapping):
            new.pop()
        else:
            begin_of_last = run.start, run.offset_bytes
        new.append(criu.placed(mapping, begin_of_last[0], run.end, begin_of_last[1]))
        last = run.end, run.offset_bytes + run.end - run.start, mapping

    at = 0
    for number, area in enumerate(areas):
        first = at
        while at < len(chosen) and chosen[at].area == number:
            at += 1
        if first == at:
            new.append(area.raw)
            last = None
            continue
        start, anonymous = area.start, bool(area.flags & criu.MAP_ANONYMOUS)
        rest = area.anonymous() if anonymous else area.other_mapping(area.shmid)
        mapping = area.mapping(file_id) if anonymous else area.other_mapping(file_id)
        for run in [*(mapped.run for mapped in chosen[first:at]), Run(area.end, area.end, 0)]:
            if start < run.start:
                offset = None if anonymous else area.pgoff + start - area.start
                new.append(criu.placed(rest, start, run.start, offset))
                last = None
            if run.start < run.end:
                add(mapping, run)
            start = run.end
    return new


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays in the page map, and the ranges (offset, length in bytes) of the page file that hold it."""

    entries: list[bytes]
    ranges: list[tuple[int, int]]

    @property
    def total_bytes(self) -> int:
        """How much is copied on each restore."""
        return sum(length for _, length in self.ranges)


def keep(found: PageMap, chosen: Sequence[Mapped]) -> Kept:
    """All pages but those of `chosen`."""
    ends = found.ends
    entries: list[bytes] = []
    ranges: list[tuple[int, int]] = []
    low, offset = 0, 0
    for start, end, begin in [
        *((mapped.run.start, mapped.run.end, mapped.run.offset_bytes) for mapped in chosen),
        (1 << 64, 1 << 64, found.bytes_in_file),
    ]:
        if begin > offset:
            ranges.append((offset, begin - offset))
        entries += _between(found, ends, low, start)
        low, offset = end, begin + end - start
    return Kept(entries, ranges)


def _between(found: PageMap, ends: list[int], low: int, high: int) -> list[bytes]:
    """The entries of the addresses low ≤ address < high, those at the borders cut."""
    first, last = bisect_right(ends, low), bisect_left(found.starts, high)
    if first >= last or low >= high:
        return []
    entries = found.raw[first:last]
    for index in {first, last - 1}:
        start, end = max(found.starts[index], low), min(ends[index], high)
        if (start, end) != (found.starts[index], ends[index]):
            entries[index - first] = pagemap.entry(start, (end - start) // PAGE_BYTES, found.flags[index])
    return entries
