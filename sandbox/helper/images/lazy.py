"""Make a fresh CRIU dump restore by mapping its memory instead of copying it.

    edited = edit(image, page_file="k3v9x0c2m1ab")

For the helper: call it after the dump, when the tree runs again or is dead. Before a restore, every id in
`Edited.page_files` must be visible at `/.warmcell/ID`, read-only, as the file `image/memory/ID` itself (bind mount; not
with `noexec`, for programs make memory executable). Page files are sparse and *look* larger than a terabyte: count
`st_blocks`, never read one to its end. They must not change, and must keep at least one name (link) as long as a
process maps them: CRIU cannot dump a process again whose page file is unlinked. Page files of earlier restores are the
caller's to link into `image/memory/`. `edit` replaces the directory: open it anew afterwards. What an image
needs, `page_files(image)` says.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.helper.images import areas as areas_of
from warmcell.sandbox.helper.images import criu, exchange, pagemap, twins
from warmcell.sandbox.helper.images.areas import Kept, Mapped
from warmcell.sandbox.helper.images.criu import Area, RegularFile
from warmcell.sandbox.helper.images.errors import ImageError, corrupt
from warmcell.sandbox.helper.images.pagemap import PageMap

PREFIX = "/.warmcell"
MEMORY = "memory"
# A page file looks this much longer than it is: memory that mremap(2) adds to a mapping lies there, and must exist.
TAIL_BYTES = 1 << 40
_ID = re.compile(r"[a-z0-9]{12}")
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_O_LARGEFILE = 0o100000


@dataclass(frozen=True, slots=True)
class Edited:
    """What became of an image.

    Attributes:
        lazy: Something is mapped now that was copied before. If False the image is as it was.
        why_not: Why it stayed plain, else empty.
        page_files: Ids of all page files that a restore needs, old ones first. Some of before may not be among them.
        new_page_files: Those that lie in `memory/` since this edit.
        mapped_bytes: Memory that this edit took out of the copying.
        copied_bytes: Memory that each restore still copies.
    """

    lazy: bool
    why_not: str
    page_files: tuple[str, ...]
    new_page_files: tuple[str, ...]
    mapped_bytes: int
    copied_bytes: int


@dataclass(frozen=True, slots=True)
class _Process:
    """What is done to one process."""

    pid: int
    mm: bytes
    areas: list[Area]
    chosen: list[Mapped]
    kept: Kept
    pages_id: int
    length_bytes: int
    head: bytes

    @property
    def mapped_bytes(self) -> int:
        return sum(mapped.run.end - mapped.run.start for mapped in self.chosen)

    def left(self) -> Iterator[Area]:
        """Areas of which something stays what it was."""
        taken: dict[int, int] = {}
        for mapped in self.chosen:
            taken[mapped.area] = taken.get(mapped.area, 0) + mapped.run.end - mapped.run.start
        for number, area in enumerate(self.areas):
            if taken.get(number, 0) < area.end - area.start:
                yield area


def edit(
    image: Path,
    *,
    page_file: str,
    prefix: str = PREFIX,
    least_pages: int = 16,
    least_bytes: int = 1 << 20,
    most_mappings: int = 4096,
    durable: bool = True,
) -> Edited:
    """Turn a fresh dump into a lazy image, in place and all at once; an image that does not fit stays as it is.

    Args:
        image: The dump's directory; `.NAME.new` beside it is used meanwhile.
        page_file: Id of the first process's page file, twelve letters and digits; others get ids made from it.
        prefix: Where page files are in the mount namespace of a restore.
        least_pages: Shorter runs are copied on each restore, as before.
        least_bytes: So are processes that would gain less than this; a page file of their own is not worth it.
        most_mappings: Per process, so that it stays below `vm.max_map_count`.
        durable: Flush what is written, but for the dumped pages themselves.

    Raises:
        ImageError: The image is damaged, or of an unknown format.
        OSError: The disk is full, or the directory cannot be written. The image is as it was.
    """
    if not _ID.fullmatch(page_file):
        raise ValueError(f"{page_file!r} is no id of a page file")
    criu.check_inventory(image)
    ours = page_file_entries(criu.file_entries(image), prefix)
    twins.separate(image, frozenset(file.id for file in ours), durable=durable)
    entries = criu.file_entries(image)
    old = page_files(image, prefix=prefix)
    by_id = {file.id: file.path.rpartition("/")[2] for file in page_file_entries(entries, prefix)}
    if any((image / MEMORY / name).exists() for name in derived(page_file, len(criu.tasks(image)))):
        raise ValueError(f"the image has a page file {page_file} already")
    try:
        found = [
            _plan(image, pid, frozenset(by_id), least_pages, least_bytes, most_mappings) for pid in processes(image)
        ]
    except ImageError as reason:
        if reason.code != "snapshot_incompatible":
            raise
        return Edited(False, reason.message, old, (), 0, 0)
    copied = sum(process.kept.total_bytes for process in found)
    edited = [process for process in found if process.chosen]
    if not edited:
        return Edited(False, "too little of it could be mapped", old, (), 0, copied)
    if len({process.pages_id for process in found}) < len(found):
        return Edited(False, "two processes share a page file", old, (), 0, copied)

    names = derived(page_file, len(edited))
    file_id = max(map(criu.entry_id, entries), default=0)
    if file_id + len(edited) >= 1 << 31:
        raise corrupt("files.img uses ids that CRIU does not give")
    used = {area.shmid for process in found for area in process.left()}
    left = tuple(dict.fromkeys(name for number, name in by_id.items() if number in used))
    entries = [entry for entry in entries if (number := criu.entry_id(entry)) not in by_id or number in used]
    before = [(path, path.stat()) for path in (image / f"pages-{process.pages_id}.img" for process in edited)]
    try:
        with exchange.rewriting(image, durable=durable) as new:
            (new / MEMORY).mkdir(mode=0o700, exist_ok=True)
            for name, process in zip(names, edited, strict=True):
                file_id += 1
                file = _move_pages(new, process, name, durable=durable)
                entries.append(criu.new_regular_file(regular(file, file_id, f"{prefix}/{name}")))
                by_id[file_id] = name
                mm = criu.with_areas(process.mm, areas_of.split(process.areas, process.chosen, file_id=file_id))
                exchange.write(new / f"mm-{process.pid}.img", criu.joined("mm", [mm]), durable=durable)
                kept = pagemap.joined(process.head, process.kept.entries)
                exchange.write(new / f"pagemap-{process.pid}.img", kept, durable=durable)
            exchange.write(new / "files.img", criu.joined("files", entries), durable=durable)
            for name in set(old) - set(left):
                (new / MEMORY / name).unlink(missing_ok=True)
            # What was taken apart can have pieces at the same addresses in a parent and its child.
            twins.separate_in(new, frozenset(by_id), durable=durable)
    except BaseException:
        for path, status in before:
            _unseal(path, status)
        raise
    for name, process in zip(names, edited, strict=True):
        # What is copied by restores lies in a file of its own now. Not before: so far it was the old image's as well.
        long = (kept for kept in process.kept.ranges if kept[1] >= least_pages * criu.PAGE_BYTES)
        exchange.punch(image / MEMORY / name, long)
    return Edited(True, "", (*left, *names), tuple(names), sum(process.mapped_bytes for process in edited), copied)


def page_files(image: Path, *, prefix: str = PREFIX) -> tuple[str, ...]:
    """Ids of the page files that a restore of `image` needs, in the order of their file entries.

    Raises:
        ImageError: The image is damaged.
    """
    entries = page_file_entries(criu.file_entries(image), prefix)
    return tuple(dict.fromkeys(file.path.rpartition("/")[2] for file in entries))


def mapped(image: Path, *, prefix: str = PREFIX) -> list[tuple[str, int, int]]:
    """What the processes of `image` map of page files: the file's id, offset and length in bytes.

    Raises:
        ImageError: The image is damaged.
    """
    names = {file.id: file.path.rpartition("/")[2] for file in page_file_entries(criu.file_entries(image), prefix)}
    return [
        (names[area.shmid], area.pgoff, area.end - area.start)
        for pid in processes(image)
        for area in criu.areas(criu.only(image / f"mm-{pid}.img"))
        if area.status & criu.FILE_PRIVATE and area.shmid in names
    ]


def page_file_entries(entries: Iterable[bytes], prefix: str) -> list[RegularFile]:
    """Those of the messages of `files.img` that are page files."""
    found = []
    named = f"{prefix}/".encode()
    for file in filter(None, (criu.regular_file(entry) for entry in entries if named in entry)):
        directory, _, name = file.path.rpartition("/")
        if directory == prefix and _ID.fullmatch(name):
            found.append(file)
    return found


def derived(page_file: str, count: int) -> list[str]:
    """Ids for the page files of `count` processes: `page_file` itself, then ids made from it, always the same."""
    names = [page_file]
    while len(names) < count:
        number = int.from_bytes(hashlib.sha256(f"{page_file}/{len(names)}".encode()).digest()[:16], "big")
        names.append("".join(_ALPHABET[number // 36**place % 36] for place in range(12)))
    return names[:count]


def processes(image: Path) -> list[int]:
    """The processes that have an address space (those that have ended have none), root first."""
    return [task.pid for task in criu.tasks(image) if (image / f"mm-{task.pid}.img").exists()]


def _plan(
    image: Path, pid: int, page_file_ids: frozenset[int], least_pages: int, least_bytes: int, most: int
) -> _Process:
    mm = criu.only(image / f"mm-{pid}.img")
    areas = criu.areas(mm)
    found = read_pagemap(image, pid)
    check_flags(found)
    chosen = areas_of.choose(areas, found, least_pages=least_pages, most=most, page_file_ids=page_file_ids)
    kept = areas_of.keep(found, chosen)
    gained = found.bytes_in_file - kept.total_bytes
    if gained < least_bytes or not kept.entries:  # CRIU expects one entry at least
        chosen, kept = [], areas_of.keep(found, [])
    return _Process(pid, mm, areas, chosen, kept, found.pages_id, found.bytes_in_file, found.head)


def check_flags(found: PageMap) -> None:
    """Refuse a page map of which not all can be understood.

    Raises:
        ImageError: `snapshot_incompatible`.
    """
    seen = set(found.flags)
    if any(flag & pagemap.PARENT for flag in seen):
        raise ImageError("snapshot_incompatible", "the image is a part of a series of dumps")
    if any(flag & ~(pagemap.LAZY | pagemap.PRESENT) for flag in seen):
        raise ImageError("snapshot_incompatible", "the page map has marks that this version does not know")


def read_pagemap(image: Path, pid: int) -> PageMap:
    """The page map of one process.

    Raises:
        ImageError: It is damaged, or its page file is shorter than it says.
    """
    found = pagemap.read(image / f"pagemap-{pid}.img")
    size_bytes = _size(image / f"pages-{found.pages_id}.img") if found.bytes_in_file else 0
    if size_bytes < found.bytes_in_file:  # it may be longer: an edit that did not come to its end left it so
        raise corrupt(f"pages-{found.pages_id}.img has {size_bytes} bytes where {found.bytes_in_file} belong")
    return found


def _size(path: Path) -> int:
    try:
        status = path.stat(follow_symlinks=False)
    except OSError as error:
        raise corrupt(f"{path.name} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("snapshot_incompatible", f"{path.name} is no regular file")
    return status.st_size


def _move_pages(new: Path, process: _Process, name: str, *, durable: bool) -> Path:
    """Give the dumped pages their name in `memory/`, and write what is kept of them to a new, small file."""
    pages, memory = new / f"pages-{process.pages_id}.img", new / MEMORY / name
    pages.rename(memory)
    source = os.open(memory, os.O_RDWR | os.O_CLOEXEC)
    try:
        target = os.open(pages, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            at = 0
            for offset, length in process.kept.ranges:
                exchange.copy(source, target, offset, length, to_bytes=at)
                at += length
            if durable:
                os.fsync(target)
        finally:
            os.close(target)
        seal(source, length_bytes=process.length_bytes)
    finally:
        os.close(source)
    return memory


def seal(page_file: int, *, length_bytes: int) -> None:
    """Make a page file what a restore expects: long, read-only, and owned by whom this process runs as."""
    status = os.fstat(page_file)
    os.ftruncate(page_file, length_bytes + TAIL_BYTES)
    os.fchmod(page_file, 0o400)
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(page_file, os.geteuid(), os.getegid())


def _unseal(pages: Path, status: os.stat_result) -> None:
    """Take back what `seal` did to a file that is still the old image's, too."""
    if pages.stat().st_size != status.st_size:
        os.truncate(pages, status.st_size)
    os.chmod(pages, stat.S_IMODE(status.st_mode))
    if os.geteuid() == 0:
        os.chown(pages, status.st_uid, status.st_gid)


def regular(file: Path, file_id: int, path: str) -> RegularFile:
    """The file entry for a page file that is at `path` when the image is restored."""
    status = file.stat()
    return RegularFile(file_id, path, os.O_RDONLY | _O_LARGEFILE, status.st_size, status.st_mode)
