"""What is in an image: its processes and the files they need.

    found = describe(image)
    for file in found.files: ...

For the helper: before a restore, every file here must be what it was (CRIU itself compares size, mode and build id);
`pinned` files are those to keep, because a package upgrade would change them under the snapshot.
"""

import stat
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.helper.images import criu, lazy
from warmcell.sandbox.helper.images.protobuf import numbers, repeated

_FDINFO_ID = 1
_REMAP_ORIGINAL = 1


@dataclass(frozen=True, slots=True)
class File:
    """A regular file that the image's processes have open or mapped; paths as they see them.

    Attributes:
        size_bytes: As of the dump; None where CRIU did not say.
        mode: Type and permissions as in `st_mode`; None where CRIU did not say.
        mapped: Mapped into memory (or the program itself).
        executable: Mapped with leave to execute: programs and libraries.
        shared: Mapped so that writes reach the file.
        open_flags: Of each open description, as for open(2); empty if it is only mapped.
        unlinked: It had no name any more; CRIU brings it along.
    """

    path: str
    size_bytes: int | None
    mode: int | None
    mapped: bool
    executable: bool
    shared: bool
    open_flags: tuple[int, ...]
    unlinked: bool

    @property
    def pinned(self) -> bool:
        """A library or data file whose content the memory relies on: mapped, never written through the mapping."""
        return self.mapped and not self.shared and not self.unlinked


@dataclass(frozen=True, slots=True)
class Contents:
    """What `describe` found. Process and thread ids as the processes see them.

    Attributes:
        root_pid: The process at the top of the tree.
        pids: All processes, the root first.
        thread_ids: All ids that a restore needs free, those of the processes included.
        files: Regular files, page files left out; one entry for each path.
        page_files: Ids of the page files that a restore needs.
        copied_bytes: Memory that a restore copies.
    """

    root_pid: int
    pids: tuple[int, ...]
    thread_ids: tuple[int, ...]
    files: tuple[File, ...]
    page_files: tuple[str, ...]
    copied_bytes: int


def describe(image: Path, *, prefix: str = lazy.PREFIX) -> Contents:
    """Look through an image.

    Args:
        image: The image's directory, lazy or not.
        prefix: Where page files were when it was edited.

    Raises:
        ImageError: It is damaged, or of an unknown format.
    """
    criu.check_inventory(image)
    tasks = criu.tasks(image)
    mapped: dict[int, int] = defaultdict(int)
    shared: set[int] = set()
    copied = 0
    for task in tasks:
        if not (image / f"mm-{task.pid}.img").exists():
            continue
        mm = criu.only(image / f"mm-{task.pid}.img")
        mapped[criu.executable_id(mm)] |= criu.PROT_EXEC
        for area in criu.areas(mm):
            if area.status & (criu.FILE_PRIVATE | criu.FILE_SHARED) and not area.status & criu.MEMFD:
                mapped[area.shmid] |= area.prot
                if area.status & criu.FILE_SHARED:
                    shared.add(area.shmid)
        copied += lazy.read_pagemap(image, task.pid).bytes_in_file
    opened = {
        numbers(entry).get(_FDINFO_ID, 0) for path in sorted(image.glob("fdinfo-*.img")) for entry in criu.read(path)
    }
    needed = lazy.page_files(image, prefix=prefix)
    return Contents(
        root_pid=tasks[0].pid,
        pids=tuple(task.pid for task in tasks),
        thread_ids=tuple(sorted({number for task in tasks for number in (task.pid, *task.threads)})),
        files=_files(image, {f"{prefix}/{name}" for name in needed}, mapped, shared, opened),
        page_files=needed,
        copied_bytes=copied,
    )


def _files(
    image: Path, left_out: set[str], mapped: dict[int, int], shared: set[int], opened: set[int]
) -> tuple[File, ...]:
    unlinked = _unlinked(image)
    by_path: dict[str, list[criu.RegularFile]] = defaultdict(list)
    for entry in criu.file_entries(image):
        file = criu.regular_file(entry)
        used = file is not None and (file.id in mapped or file.id in opened)
        if file is not None and used and file.path not in left_out and stat.S_ISREG(file.mode or stat.S_IFREG):
            by_path[file.path].append(file)
    return tuple(
        File(
            path=path,
            size_bytes=entries[0].size_bytes,
            mode=entries[0].mode,
            mapped=any(file.id in mapped for file in entries),
            executable=any(mapped.get(file.id, 0) & criu.PROT_EXEC for file in entries),
            shared=any(file.id in shared for file in entries),
            open_flags=tuple(file.flags for file in entries if file.id in opened),
            unlinked=any(file.id in unlinked for file in entries),
        )
        for path, entries in by_path.items()
    )


def _unlinked(image: Path) -> set[int]:
    path = image / "remap-fpath.img"
    if not path.exists():
        return set()
    return {number for entry in criu.read(path) for number in repeated(entry, _REMAP_ORIGINAL)}
