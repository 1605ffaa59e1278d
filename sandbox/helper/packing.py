"""Memory of images that nobody has used for long, compressed; and as it was, before it is used again.

A page file is compressed once, for all images of a chain that share it, and only if nobody uses any of them: no
restore or snapshot of one is under way, and no sandbox has it mounted. The other form is written beside it, put on
disk, read back and compared; then names change, one after the other (`Pages.change_form`). Whatever ends that, each
image has one of both, whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets

from warmcell.sandbox.helper import zstd
from warmcell.sandbox.helper.pages import summed_bytes
from warmcell.sandbox.helper.problems import HelperError, corrupt, not_found
from warmcell.sandbox.helper.seals import READ_BYTES
from warmcell.sandbox.helper.shelf import ID, MEMORY, full, locked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from warmcell.sandbox.helper.shelf import Image, Shelf

    Told = Callable[[int, int], None]
    """Told how many bytes are done, of how many."""

BLOCK_BYTES = 64 << 10
_ZEROS = bytes(BLOCK_BYTES)
IN_USE = "A kernel that runs maps its memory, or another snapshot of it is just being made or restored."


def nobody(done: int, of: int) -> None:
    """Nobody is told."""


def opened(shelf: Shelf, image: str, *, told: Told = nobody) -> Image:
    """An image as `Shelf.open` gives it, with its memory as it was written: what is compressed is expanded first.

    Raises:
        HelperError: As `Shelf.open`; or the disk is full, and it is compressed still.
    """
    found = shelf.open(image)
    try:
        _expand(shelf, found, told)
    except BaseException as error:
        found.close()
        if isinstance(error, FileNotFoundError):  # It was dropped meanwhile.
            raise not_found(image) from None
        raise
    return found


def pack(shelf: Shelf, image: str, *, told: Told = nobody) -> None:
    """Compress an image's memory. No effect on what is compressed already.

    Raises:
        HelperError: Somebody uses it; it is damaged; there is none, or no zstd. Its memory is as it was.
        OSError: The disk is full; likewise.
    """
    shelf.clean()  # A link that somebody who was killed has left is a user like any other.
    found = shelf.open(image)
    try:
        names = [name for name in found.about["memory"] if name not in found.packed]
        if names and (shelf.pages.mounted(names) or any(_is_linked_elsewhere(shelf, name) for name in names)):
            raise _in_use(image)  # As it would turn out in the end, when all has been compressed.
        with _room(shelf, image) as room:
            done = _Done(told, of=2 * sum(summed_bytes(shelf.pages.known(name)[0]) for name in names))
            sums = {name: _compress(shelf, name, f"{room}/{name}", done) for name in names}
            found.release()
            for name in names:
                _put_in_place(shelf, image, name, f"{room}/{name}", sums[name])
    except FileNotFoundError:  # It, or another that shares its memory, was dropped meanwhile.
        raise _in_use(image) if os.path.exists(shelf.place(image)) else not_found(image) from None
    finally:
        found.close()


class _Done:
    """How far it is."""

    def __init__(self, told: Told, *, of: int) -> None:
        self._told, self._of, self._done = told, of, 0

    def more(self, count: int) -> None:
        self._done += count
        self._told(self._done, self._of)


def _compress(shelf: Shelf, name: str, target: str, done: _Done) -> str:
    """Write the compressed form, and see that it is the same; its SHA-256."""
    place = shelf.pages.place(name)
    size, known = shelf.pages.known(name)
    found = os.stat(place)
    sha256, out = hashlib.sha256(), _made(target, found)
    try:
        for piece in zstd.compressed(_pieces(place, summed_bytes(size), done)):
            sha256.update(piece)
            _write(out, piece)
        os.utime(out, ns=(found.st_atime_ns, found.st_mtime_ns))
        os.fsync(out)
    finally:
        os.close(out)
    again = hashlib.sha256()
    for piece in zstd.expanded(_pieces(target)):
        again.update(piece)
        done.more(len(piece))
    if again.hexdigest() != known:
        raise corrupt(f"the memory in {name} is not what was written")
    return sha256.hexdigest()


def _is_linked_elsewhere(shelf: Shelf, name: str) -> bool:
    """Whether somebody has a page file besides images that are complete: a snapshot that is being made, for one."""
    return os.stat(shelf.pages.place(name)).st_nlink != 1 + len(_links(shelf, name))


def _put_in_place(shelf: Shelf, image: str, name: str, new: str, sha256: str) -> None:
    """Have all images use it that use the file; nobody can begin to use one of them meanwhile."""
    with contextlib.ExitStack() as held:
        links = _links(shelf, name)
        try:
            for link in links:
                held.enter_context(locked(os.path.dirname(os.path.dirname(link)), exclusive=True, wait_s=0))
        except BlockingIOError:
            raise _in_use(image) from None
        done = not shelf.pages.mounted([name])
        if not done or not shelf.pages.change_form(name, new, images=links, packed_sha256=sha256):
            raise _in_use(image)


def _expand(shelf: Shelf, found: Image, told: Told) -> None:
    if not found.packed:
        return
    with _room(shelf, os.path.basename(found.about["id"])) as room:
        done = _Done(told, of=sum(summed_bytes(shelf.pages.known(name)[0]) for name in found.packed))
        for name in found.packed:
            packed = os.open(shelf.pages.place(name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(packed, fcntl.LOCK_EX)  # Several restores of one chain need it expanded once.
                if shelf.pages.is_packed(name):
                    _with_room(shelf, name, f"{room}/{name}", done)
                    shelf.pages.change_form(name, f"{room}/{name}", images=_links(shelf, name))
            finally:
                os.close(packed)
    found.packed = ()


def _with_room(shelf: Shelf, name: str, target: str, done: _Done) -> None:
    """Write the plain form; where the disk is full, in the place of what is kept for the next dump."""
    try:
        _decompress(shelf, name, target, done)
    except OSError as error:
        if full(error, shelf.path) is None or not shelf.pages.spare.is_there():
            raise
        shelf.pages.spare.discard()
        os.unlink(target)
        _decompress(shelf, name, target, done)


def _decompress(shelf: Shelf, name: str, target: str, done: _Done) -> None:
    """Write the plain form."""
    place = shelf.pages.place(name)
    size, known = shelf.pages.known(name)
    found = os.stat(place)
    sha256, out, at = hashlib.sha256(), _made(target, found), 0
    try:
        for piece in zstd.expanded(_pieces(place)):
            sha256.update(piece)
            for begin in range(0, len(piece), BLOCK_BYTES):
                block = piece[begin : begin + BLOCK_BYTES]
                if block != _ZEROS[: len(block)]:  # Else it stays a hole.
                    _write(out, block, at=at + begin)
            at += len(piece)
            done.more(len(piece))
        if sha256.hexdigest() != known:
            raise corrupt(f"the compressed memory in {name} is not what was written")
        os.ftruncate(out, size)
        os.utime(out, ns=(found.st_atime_ns, found.st_mtime_ns))
        os.fsync(out)
    finally:
        os.close(out)


def _links(shelf: Shelf, name: str) -> list[str]:
    """Of a page file in the images of this user."""
    links = [f"{shelf.path}/{image}/{MEMORY}/{name}" for image in os.listdir(shelf.path) if ID.fullmatch(image)]
    return [link for link in sorted(links) if os.path.lexists(link)]


@contextlib.contextmanager
def _room(shelf: Shelf, image: str) -> Iterator[str]:
    """A directory for what is being written; it goes with its lock, or with the image."""
    path = f"{shelf.path}/.new-{image}-{secrets.token_hex(4)}"
    os.mkdir(path, 0o700)
    try:
        with locked(path, exclusive=False):
            yield path
    finally:
        shelf.remove(path)


def _made(path: str, like: os.stat_result) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, like.st_mode & 0o777)
    return fd


def _pieces(path: str, length: int | None = None, done: _Done | None = None) -> Iterator[bytes]:
    left = os.stat(path).st_size if length is None else length
    with open(path, "rb", buffering=0) as file:
        while left and (piece := file.read(min(READ_BYTES, left))):
            left -= len(piece)
            yield piece
            if done is not None:
                done.more(len(piece))


def _write(fd: int, data: bytes, *, at: int | None = None) -> None:
    view = memoryview(data)
    while view:
        count = os.write(fd, view) if at is None else os.pwrite(fd, view, at)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, at = view[count:], None if at is None else at + count


def _in_use(image: str) -> HelperError:
    return HelperError(
        "conflict", f"Snapshot {image} is in use", hint=f"{IN_USE} Try again later.", details={"image": image}
    )
