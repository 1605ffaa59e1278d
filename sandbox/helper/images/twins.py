"""Mappings that CRIU would take for shared memory of a parent and its child, though they are not.

On a restore CRIU lets a child inherit an area from its parent when both have it at the same addresses and from the same
file, without comparing where in the file it begins. With page files that can differ: mremap(2), which realloc(3) uses,
moves memory after a fork. Such an area gets a file entry of its own.
"""

from pathlib import Path

from warmcell.sandbox.helper.images import criu, exchange
from warmcell.sandbox.helper.images.criu import Area
from warmcell.sandbox.helper.images.protobuf import replaced


def separate(image: Path, page_file_ids: frozenset[int], *, durable: bool = True) -> int:
    """Give each such area a file entry that its parent does not have; how many there were.

    Args:
        image: The image's directory; it is replaced where there are any.
        page_file_ids: Ids of the file entries to look at.
        durable: Flush what is written.

    Raises:
        ImageError: The image is damaged.
        OSError: It cannot be written; it is as it was.
    """
    found, changed = _changes(image, page_file_ids)
    if changed:
        with exchange.rewriting(image, durable=durable) as new:
            _write(new, changed, durable=durable)
    return found


def separate_in(new: Path, page_file_ids: frozenset[int], *, durable: bool = True) -> int:
    """`separate`, in a directory that is being made and that no other needs.

    Raises:
        ImageError: The image is damaged.
        OSError: It cannot be written.
    """
    found, changed = _changes(new, page_file_ids)
    _write(new, changed, durable=durable)
    return found


def _changes(image: Path, page_file_ids: frozenset[int]) -> tuple[int, dict[str, bytes]]:
    """How many there are, and the files of the image without them."""
    tasks = [task for task in criu.tasks(image) if (image / f"mm-{task.pid}.img").exists()]
    if not page_file_ids or len(tasks) < 2:
        return 0, {}
    memory = {task.pid: criu.only(image / f"mm-{task.pid}.img") for task in tasks}
    areas = {pid: criu.areas(mm) for pid, mm in memory.items()}
    entries = criu.file_entries(image)
    by_id = {criu.entry_id(entry): entry for entry in entries}
    found = 0
    changed: dict[str, bytes] = {}
    for task in tasks:
        wrong = _twins(areas[task.pid], areas.get(task.parent, []), page_file_ids)
        if not wrong:
            continue
        found += len(wrong)
        new_ids: dict[int, int] = {}
        for shmid in dict.fromkeys(area.shmid for area in wrong):
            new_ids[shmid] = max(by_id) + 1
            by_id[new_ids[shmid]] = criu.renumbered(by_id[shmid], new_ids[shmid])
        apart = {area.start for area in wrong}
        parts = [
            replaced(area.raw, {criu.SHMID: new_ids[area.shmid]}) if area.start in apart else area.raw
            for area in areas[task.pid]
        ]
        changed[f"mm-{task.pid}.img"] = criu.joined("mm", [criu.with_areas(memory[task.pid], parts)])
    if changed:
        changed["files.img"] = criu.joined("files", by_id.values())
    return found, changed


def _write(new: Path, changed: dict[str, bytes], *, durable: bool) -> None:
    for name, data in changed.items():
        exchange.write(new / name, data, durable=durable)


def _twins(areas: list[Area], parents: list[Area], page_file_ids: frozenset[int]) -> list[Area]:
    begins = {(area.start, area.end, area.shmid): area.pgoff for area in parents if area.shmid in page_file_ids}
    return [
        area
        for area in areas
        if area.shmid in page_file_ids
        and area.status & criu.FILE_PRIVATE
        and begins.get((area.start, area.end, area.shmid), area.pgoff) != area.pgoff
    ]
