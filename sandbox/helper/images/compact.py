"""Give an image new page files in which only what it needs is left: one for each process, in the order of its memory.

    compacted = compact(image, page_file="k3v9x0c2m1ab")
    compacted = compact(image, page_file="k3v9x0c2m1ab", into=other)

An image whose kernel was suspended again and again needs the page files of all those times, of which it uses less and
less. For the helper: offline, when nobody restores from the image; every id of `lazy.page_files(image)` must be in
`image/memory/`. As after `lazy.edit`, the directory is a new one. Processes never share a page file here: CRIU takes
mappings of one file at one address in a parent and its child for the same memory.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.helper.images import areas as areas_of
from warmcell.sandbox.helper.images import criu, exchange, lazy, pagemap
from warmcell.sandbox.helper.images.areas import Mapped
from warmcell.sandbox.helper.images.criu import PAGE_BYTES, Area
from warmcell.sandbox.helper.images.errors import corrupt
from warmcell.sandbox.helper.images.pagemap import PageMap

_ZERO = bytes(PAGE_BYTES)
_STEP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Compacted:
    """What `compact` did.

    Attributes:
        page_files: Ids of the page files that a restore needs now.
        dropped: Those that it needs no more.
        memory_bytes: What the new page files take on disk.
        copied_bytes: Memory that each restore copies.
    """

    page_files: tuple[str, ...]
    dropped: tuple[str, ...]
    memory_bytes: int
    copied_bytes: int


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a part of the new page file comes from: an old page file or, where None, the dumped pages.

    One that lies `over` another must bring its zeros along.
    """

    page_file: str | None
    offset_bytes: int
    length_bytes: int
    to_bytes: int
    over: bool = False


@dataclass(slots=True)
class _Layout:
    """The new areas of a process, and what its page file is made of; later sources cover earlier ones."""

    areas: list[bytes]
    sources: list[_Source]
    length_bytes: int = 0


def compact(
    image: Path,
    *,
    page_file: str,
    prefix: str = lazy.PREFIX,
    least_pages: int = 16,
    most_mappings: int = 4096,
    durable: bool = True,
    into: Path | None = None,
) -> Compacted:
    """Rewrite an image, in place and all at once; also makes a plain one lazy.

    Args:
        image: The image's directory.
        page_file: Id of the first process's new page file; others get ids made from it.
        prefix: Where page files are in the mount namespace of a restore.
        least_pages: Shorter runs of dumped memory outside old mappings are copied on each restore.
        most_mappings: New ones per process.
        durable: Flush all that is written.
        into: Leave the image alone, and write what becomes different into this directory, which has what does not:
            all but page files and the processes' dumped pages.

    Raises:
        ImageError: The image is damaged, or of an unknown format or kind.
        OSError: The disk is full, or the directory cannot be written. The image is as it was.
    """
    criu.check_inventory(image)
    old = lazy.page_files(image, prefix=prefix)
    pids = lazy.processes(image)
    names = lazy.derived(page_file, len(pids))
    if set(names) & set(old):
        raise ValueError(f"the image has a page file {page_file} already")
    entries = criu.file_entries(image)
    top = max(map(criu.entry_id, entries), default=0)
    if top + len(pids) >= 1 << 31:
        raise corrupt("files.img uses ids that CRIU does not give")
    by_id = {file.id: file.path.rpartition("/")[2] for file in lazy.page_file_entries(entries, prefix)}
    entries = [entry for entry in entries if criu.entry_id(entry) not in by_id]
    copied = memory_bytes = 0
    made: list[str] = []
    with exchange.rewriting(image, durable=durable) if into is None else nullcontext(into) as new:
        (new / lazy.MEMORY).mkdir(mode=0o700, exist_ok=True)
        for file_id, (pid, name) in enumerate(zip(pids, names, strict=True), start=top + 1):
            mm = criu.only(image / f"mm-{pid}.img")
            areas = criu.areas(mm)
            found = lazy.read_pagemap(image, pid)
            lazy.check_flags(found)
            chosen = areas_of.choose(
                areas, found, least_pages=least_pages, most=most_mappings, page_file_ids=frozenset(by_id), again=False
            )
            over = _dumped_over(areas, found, by_id)
            taken = sorted([*chosen, *over], key=lambda mapped: mapped.run.start)
            kept = areas_of.keep(found, taken)
            if not kept.entries:
                chosen, taken = [], over
                kept = areas_of.keep(found, taken)
            layout = _lay_out(areas, chosen, over, by_id, file_id)
            copied += kept.total_bytes
            with ExitStack() as opened:
                pages = _open(opened, image / f"pages-{found.pages_id}.img")
                left = _create(opened, new / f"pages-{found.pages_id}.img")
                at = 0
                for offset, length in kept.ranges:
                    exchange.copy(pages, left, offset, length, to_bytes=at)
                    at += length
                if durable:
                    os.fsync(left)
                if layout.length_bytes:
                    target = _create(opened, new / lazy.MEMORY / name)
                    _fill(image, layout.sources, pages, target)
                    lazy.seal(target, length_bytes=layout.length_bytes)
                    if durable:
                        os.fsync(target)
                    memory_bytes += os.fstat(target).st_blocks * 512
                    made.append(name)
            if layout.length_bytes:
                file = lazy.regular(new / lazy.MEMORY / name, file_id, f"{prefix}/{name}")
                entries.append(criu.new_regular_file(file))
            mm = criu.with_areas(mm, layout.areas)
            exchange.write(new / f"mm-{pid}.img", criu.joined("mm", [mm]), durable=durable)
            kept_map = pagemap.joined(found.head, kept.entries)
            exchange.write(new / f"pagemap-{pid}.img", kept_map, durable=durable)
        exchange.write(new / "files.img", criu.joined("files", entries), durable=durable)
        for name in old:
            (new / lazy.MEMORY / name).unlink(missing_ok=True)
    return Compacted(tuple(made), old, memory_bytes, copied)


def _dumped_over(areas: Sequence[Area], found: PageMap, by_id: dict[int, str]) -> list[Mapped]:
    """The dumped pages that lie over mappings of old page files."""
    return list(
        areas_of.within(
            areas, pagemap.runs(found), lambda area: area.end if _page_file(area, by_id) is not None else area.start
        )
    )


def _page_file(area: Area, by_id: dict[int, str]) -> str | None:
    private = area.status & criu.FILE_PRIVATE and not area.status & criu.MEMFD
    return by_id.get(area.shmid) if private else None


def _lay_out(
    areas: Sequence[Area], chosen: Sequence[Mapped], over: Sequence[Mapped], by_id: dict[int, str], file_id: int
) -> _Layout:
    layout = _Layout([], [])
    last: tuple[int, bytes] | None = None  # where the mapping ends that was added last, and what it is like
    start_of_last = offset_of_last = 0
    by_area: dict[int, list[Mapped]] = {}
    for mapped in (*chosen, *over):
        by_area.setdefault(mapped.area, []).append(mapped)

    def add(area: Area, start: int, end: int, *, anonymous: bool) -> None:
        """A mapping; it continues the one before where it can."""
        nonlocal last, start_of_last, offset_of_last
        like = area.mapping(file_id) if anonymous else area.other_mapping(file_id)
        if last == (start, like):
            layout.areas.pop()
        else:
            start_of_last, offset_of_last = start, layout.length_bytes
        layout.areas.append(criu.placed(like, start_of_last, end, offset_of_last))
        last = (end, like)

    for number, area in enumerate(areas):
        name = _page_file(area, by_id)
        parts = by_area.get(number, [])
        if name is not None:
            add(area, area.start, area.end, anonymous=False)
            layout.sources.append(_Source(name, area.pgoff, area.end - area.start, layout.length_bytes))
            for part in parts:
                run = part.run
                to_bytes = layout.length_bytes + run.start - area.start
                layout.sources.append(_Source(None, run.offset_bytes, run.end - run.start, to_bytes, over=True))
            layout.length_bytes += area.end - area.start
        elif parts:
            start, anonymous = area.start, bool(area.flags & criu.MAP_ANONYMOUS)
            for run in (part.run for part in parts):
                if start < run.start:
                    layout.areas.append(area.part(start, run.start))
                add(area, run.start, run.end, anonymous=anonymous)
                layout.sources.append(_Source(None, run.offset_bytes, run.end - run.start, layout.length_bytes))
                layout.length_bytes += run.end - run.start
                start = run.end
            if start < area.end:
                layout.areas.append(area.part(start, area.end))
        else:
            layout.areas.append(area.raw)
    return layout


def _fill(image: Path, sources: Sequence[_Source], pages: int, target: int) -> None:
    with ExitStack() as opened:
        files: dict[str, int] = {}
        for source in sources:
            if source.over:
                exchange.copy(pages, target, source.offset_bytes, source.length_bytes, to_bytes=source.to_bytes)
                continue
            if source.page_file is not None and source.page_file not in files:
                files[source.page_file] = _open(opened, image / lazy.MEMORY / source.page_file)
            file = pages if source.page_file is None else files[source.page_file]
            for offset, length in _content(file, source.offset_bytes, source.length_bytes):
                exchange.copy(file, target, offset, length, to_bytes=source.to_bytes + offset - source.offset_bytes)


def _content(file: int, offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int]]:
    """The ranges (offset, length) that are neither holes nor pages of zeros."""
    end = min(offset_bytes + length_bytes, os.fstat(file).st_size)
    at = offset_bytes
    while at < end:
        try:
            at = os.lseek(file, at, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
        except OSError:  # only a hole is left
            return
        if at >= end:
            return
        hole = -(-os.lseek(file, at, os.SEEK_HOLE) // PAGE_BYTES) * PAGE_BYTES
        until = min(hole, end, at + _STEP_BYTES)
        yield from _without_zeros(file, max(at, offset_bytes), until)
        at = until


def _without_zeros(file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    base = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(file, end - base, access=mmap.ACCESS_READ, offset=base) as view:
        first = start
        for index, byte in enumerate(view[start - base :: PAGE_BYTES]):  # a page that begins with another byte is none
            page = start + index * PAGE_BYTES
            if not byte and view[page - base : page - base + PAGE_BYTES] == _ZERO:
                if first < page:
                    yield first, page - first
                first = page + PAGE_BYTES
        if first < end:
            yield first, end - first


def _open(opened: ExitStack, path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise corrupt(f"{path.parent.name}/{path.name} is missing") from error
    opened.callback(os.close, descriptor)
    return descriptor


def _create(opened: ExitStack, path: Path) -> int:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, descriptor)
    return descriptor
