"""Gives an image of a kernel that was saved again and again one new page file instead of all those of before.

It is done to a copy, which takes the image's place when it is complete and on disk. Until then a restore takes the old
one; while one runs the copy is given up, and the next snapshot is another chance.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from warmcell.sandbox.helper.images import areas as areas_of
from warmcell.sandbox.helper.images import criu, exchange, lazy
from warmcell.sandbox.helper.images.compact import compact
from warmcell.sandbox.helper.images.errors import ImageError
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.program import PLAIN_VARIABLE
from warmcell.sandbox.helper.seals import synced
from warmcell.sandbox.helper.shelf import ABOUT, MEMORY, Draft, Image, locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from warmcell.sandbox.helper.shelf import Shelf

LONG = 8
"""Page files for each process of the image: one comes with each snapshot."""

COPIED_BYTES = 64 << 20
"""Memory that each restore copies, as it was changed after it had been mapped; also a quarter of what is mapped."""

IDLE_BYTES = 256 << 20
"""What page files may take beyond twice what the image maps of them."""

JOINTS = 2048
"""Neighbours in memory, for each process, that are of different page files or parts of one, and could be one area."""

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
SAID_ANEW = frozenset({"id", "files", "plain", "memory", "boot_id", "finished"})


def attend(shelf: Shelf, image: str) -> bool:
    """Compact an image where that is worth it; whether it was done. Its page files of before may go then.

    Whatever stands in the way, a full disk for example, the image is as it was.
    """
    try:
        old = shelf.open(image)
    except HelperError:
        return False
    try:
        return not old.packed and _worth_it(old) and _compact(shelf, image, old)
    except (ImageError, HelperError, OSError):  # Such as one that was dropped meanwhile.
        return False
    finally:
        old.close()


def _compact(shelf: Shelf, image: str, old: Image) -> bool:
    inode = os.fstat(old.fd).st_ino
    draft = Draft(shelf, image)
    try:
        # No link to page files and dumped pages: it would change their inodes, and a restore would read them all then.
        _link(old.path, draft.path, without=_rewritten(Path(old.path)))
        name = "".join(secrets.choice(ALPHABET) for _ in range(12))
        compact(Path(old.path), page_file=name, durable=False, into=Path(draft.path))
        draft.seal({name: said for name, said in old.about.items() if name not in SAID_ANEW}, old_pages={})
        draft.finish()
        old.release()
        done = _put_in_place(shelf, draft, inode)
    finally:
        draft.close(keep=False)  # If it has taken its place, that is the image of before.
    if done:
        shelf.pages.collect()
    return done


def _put_in_place(shelf: Shelf, draft: Draft, inode: int) -> bool:
    place = shelf.place(draft.image)
    with contextlib.suppress(BlockingIOError), locked(place, exclusive=True, wait_s=0) as held:
        if os.fstat(held).st_ino == inode and os.stat(place).st_ino == inode:
            exchange.swap(Path(draft.path), Path(place))
            synced(shelf.path)
            return True
    return False


def _rewritten(image: Path) -> set[str]:
    """Files that compacting makes anew."""
    return {MEMORY, *(f"pages-{lazy.read_pagemap(image, pid).pages_id}.img" for pid in lazy.processes(image))}


def _link(source: str, target: str, *, without: Collection[str] = ()) -> None:
    for name in os.listdir(source):
        path = f"{source}/{name}"
        if name in without or name.startswith(ABOUT):
            continue
        if os.path.isdir(path):
            os.mkdir(f"{target}/{name}", 0o700)
            _link(path, f"{target}/{name}")
        else:
            os.link(path, f"{target}/{name}", follow_symlinks=False)


def _worth_it(image: Image) -> bool:
    names = image.about["memory"]
    if not names or os.environ.get(PLAIN_VARIABLE):
        return False
    if len(names) > LONG * max(1, len(image.about["pids"])):
        return True
    mapped, joints = _mapped(Path(image.path))
    if joints > JOINTS * max(1, len(image.about["pids"])):
        return True
    copied = sum(os.stat(f"{image.path}/{name}").st_size for name in image.about["plain"])
    on_disk = sum(os.stat(f"{image.path}/{MEMORY}/{name}").st_blocks * 512 for name in names)
    return (copied > COPIED_BYTES and 4 * copied > mapped) or on_disk > 2 * mapped + IDLE_BYTES


def _mapped(image: Path) -> tuple[int, int]:
    """What the image maps of its page files, in bytes, and how many joints are in it."""
    ids = frozenset(file.id for file in lazy.page_file_entries(criu.file_entries(image), lazy.PREFIX))
    mapped_bytes = joints = 0
    for pid in lazy.processes(image):
        areas = criu.areas(criu.only(image / f"mm-{pid}.img"))
        ours = (area for area in areas if area.status & criu.FILE_PRIVATE and area.shmid in ids)
        mapped_bytes += sum(area.end - area.start for area in ours)
        joints += areas_of.joints(areas, ids)
    return mapped_bytes, joints
