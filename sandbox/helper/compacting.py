"""Gives an image of a kernel that was saved again and again one new page file instead of all those of before.

It is done to a copy, which takes the image's place when it is complete and on disk. Until then a restore takes the old
one; while one runs the copy is given up, and the next snapshot is another chance.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from warmcell.sandbox.helper.images import criu, exchange, lazy
from warmcell.sandbox.helper.images.compact import compact
from warmcell.sandbox.helper.images.errors import ImageError
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.program import PLAIN_VARIABLE
from warmcell.sandbox.helper.seals import synced
from warmcell.sandbox.helper.shelf import ABOUT, MEMORY, Draft, Image, locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from warmcell.sandbox.helper.shelf import Shelf

LONG = 8
"""Page files for each process of the image: one comes with each snapshot."""

COPIED_BYTES = 64 << 20
"""Memory that each restore copies, as it was changed after it had been mapped; also a quarter of what is mapped."""

IDLE_BYTES = 256 << 20
"""What page files may take beyond twice what the image maps of them."""

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
        return _worth_it(old) and _compact(shelf, image, old)
    except (ImageError, HelperError, OSError):  # Such as one that was dropped meanwhile.
        return False
    finally:
        old.close()


def _compact(shelf: Shelf, image: str, old: Image) -> bool:
    inode = os.fstat(old.fd).st_ino
    draft = Draft(shelf, image)
    try:
        with shelf.pages.undisturbed(old.about["memory"]):
            _link(old.path, draft.path)
            name = "".join(secrets.choice(ALPHABET) for _ in range(12))
            compact(Path(draft.path), page_file=name, durable=False)
            draft.reopen()
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


def _link(source: str, target: str) -> None:
    for name in os.listdir(source):
        path = f"{source}/{name}"
        if os.path.isdir(path):
            os.mkdir(f"{target}/{name}", 0o700)
            _link(path, f"{target}/{name}")
        elif not name.startswith(ABOUT):
            os.link(path, f"{target}/{name}", follow_symlinks=False)


def _worth_it(image: Image) -> bool:
    names = image.about["memory"]
    if not names or os.environ.get(PLAIN_VARIABLE):
        return False
    if len(names) > LONG * max(1, len(image.about["pids"])):
        return True
    mapped = _mapped_bytes(Path(image.path))
    copied = sum(os.stat(f"{image.path}/{name}").st_size for name in image.about["plain"])
    on_disk = sum(os.stat(f"{image.path}/{MEMORY}/{name}").st_blocks * 512 for name in names)
    return (copied > COPIED_BYTES and 4 * copied > mapped) or on_disk > 2 * mapped + IDLE_BYTES


def _mapped_bytes(image: Path) -> int:
    """What the image maps of its page files."""
    ids = {file.id for file in lazy.page_file_entries(criu.file_entries(image), lazy.PREFIX)}
    areas = [area for pid in lazy.processes(image) for area in criu.areas(criu.only(image / f"mm-{pid}.img"))]
    return sum(area.end - area.start for area in areas if area.status & criu.FILE_PRIVATE and area.shmid in ids)
