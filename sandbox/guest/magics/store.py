"""What lies in the run directory of one sandbox, where all its ranks map it.

Where the keeper hands over a descriptor of the file, it is written once, from where a value lies here; elsewhere it
goes through the connection, and is hashed meanwhile. What was written is compared with what a value has become, when
that is asked, rather than hashed in any case.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..values import ALIGN_BYTES
from . import stopping
from .api import PIECE_BYTES, KeeperError

if TYPE_CHECKING:
    from .api import Api
    from .sending import Version

FILES_MAX = 64

SMALL_BYTES = 2**20
"""Smaller buffers are known by their digest at once."""

SAMPLES = 64
SAMPLE_BYTES = 4096
"""Of a larger one so many parts are looked at before all of it is."""

COMPARED_BYTES = 256 * 1024
"""What is compared at a time, so that it stays in the processor's cache."""

HASHERS = 2

Progress = Callable[[int, int], None]
"""Told how many bytes of how many have gone."""


class Piece:
    """One buffer in a file."""

    def __init__(self, number: int, start: int, size: int, mark: bytes, *, whole: bool) -> None:
        self.number = number
        """Of its file."""
        self.start = start
        self.size = size
        self.mark = mark
        self.whole = whole
        """Whether the mark is of all of it, rather than of samples."""

    @property
    def place(self) -> tuple[str, int, int]:
        """File, start and size."""
        return f"values-{self.number}", self.start, self.size


class Marks:
    """What a buffer is known by; taken once, however many it is compared with."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self._of_all = b""
        self._of_samples = b""

    def mark(self, *, whole: bool) -> bytes:
        """Its digest, or that of samples."""
        if whole or self.view.nbytes < SMALL_BYTES:
            self._of_all = self._of_all or hashlib.sha256(self.view).digest()
            return self._of_all
        self._of_samples = self._of_samples or _samples(self.view)
        return self._of_samples


class Store:
    """What is in the run directory of one sandbox, and what each of its ranks has loaded."""

    def __init__(self, api: Api, sandbox_id: str, limit: int) -> None:
        self.limit = limit
        """Bytes that may be sent at a time."""
        self.sent = 0
        """Bytes so far."""
        self.held: dict[int, dict[str, str]] = {}
        """Rank to the tags of what it has, by name."""
        self.versions: dict[str, Version] = {}
        """Tag to what was sent under it."""
        self.theirs: dict[int, dict[str, object]] = {}
        """Rank to names that its cells may have assigned, each with what it was here then."""
        self.modules: dict[int, dict[str, str]] = {}
        """Rank to the sources of the notebook's own modules that it was given: name to what they were."""
        self._api = api
        self._id = sandbox_id
        self._files: dict[int, int] = {}
        self._pieces: list[Piece] = []
        self._count = 0
        self._handed_over = True
        """Whether the keeper hands over descriptors, as far as is known."""

    def put(self, views: Sequence[memoryview], known: Sequence[Piece | None], progress: Progress) -> list[Piece]:
        """Have these buffers in the sandbox; where each is.

        Args:
            views: Buffers.
            known: Where each is believed to be.
            progress: Told as they are sent.

        Raises:
            KeeperError: They do not fit, or the sandbox is gone.
        """
        marks = [Marks(view) for view in views]
        found = [
            piece if piece is not None and piece.number in self._files else self._find(one)
            for one, piece in zip(marks, known)
        ]
        missing = [one for one, piece in zip(marks, found) if piece is None]
        new = iter(self._send(missing, progress) if missing else [])
        return [next(new) if piece is None else piece for piece in found]

    def same(self, now: Marks, piece: Piece) -> bool:
        """Whether a buffer is now what was written there."""
        size = now.view.nbytes
        if piece.number not in self._files or size != piece.size or now.mark(whole=piece.whole) != piece.mark:
            return False
        return piece.whole or size < SMALL_BYTES or self._equal(now.view, piece)

    def lose(self, rank: int) -> None:
        """The rank was started anew, or nobody knows what it has."""
        self.held.pop(rank, None)
        self.theirs.pop(rank, None)
        self.modules.pop(rank, None)

    def missed(self, rank: int, names: Iterable[str]) -> None:
        """The rank has said that it does not have these; its modules are looked at again."""
        for known in (self.held.get(rank, {}), self.theirs.get(rank, {})):
            for name in ("", *names):
                known.pop(name, None)

    def is_theirs(self, rank: int, name: str, value: object) -> bool:
        """Whether the rank may have one of its own under that name, which has stayed the same here since."""
        known = self.theirs.get(rank, {})
        return name in known and known[name] is value

    def _find(self, now: Marks) -> Piece | None:
        """Where what is the same lies already."""
        return next((piece for piece in self._pieces if self.same(now, piece)), None)

    def _equal(self, view: memoryview, piece: Piece) -> bool:
        """Byte by byte; read rather than mapped, as a rank could make the file shorter meanwhile."""
        buffer = bytearray(COMPARED_BYTES)
        try:
            with self._api.written_values(self._id, piece.number) as fd:
                for at in range(0, piece.size, COMPARED_BYTES):
                    part = view[at : at + COMPARED_BYTES]
                    read = os.preadv(fd, [memoryview(buffer)[: part.nbytes]], piece.start + at)
                    if read != part.nbytes or bytes(part) != buffer[:read]:
                        return False
        except (KeeperError, OSError):
            return False
        return True

    def _send(self, new: Sequence[Marks], progress: Progress) -> list[Piece]:
        views = [one.view for one in new]
        number, starts, size = self._count + 1, [], 0
        for view in views:
            starts.append(size)
            size += view.nbytes + -view.nbytes % ALIGN_BYTES
        self._make_room(size)
        self._count = number
        whole = not (self._handed_over and self._write(number, size, list(zip(starts, views)), progress))
        if whole:
            with concurrent.futures.ThreadPoolExecutor(HASHERS) as pool:
                hashing = [pool.submit(one.mark, whole=True) for one in new]
                for sent in self._api.put_values(self._id, number, _padded(views), size):
                    progress(sent, size)
            marks = [one.result() for one in hashing]
        else:
            marks = [one.mark(whole=False) for one in new]
        self.sent += size
        self._files[number] = size
        pieces = [
            Piece(number, start, view.nbytes, mark, whole=whole) for start, view, mark in zip(starts, views, marks)
        ]
        self._pieces += pieces
        return pieces

    def _write(self, number: int, size: int, parts: list[tuple[int, memoryview]], progress: Progress) -> bool:
        """Write a file that the keeper hands over; False where it hands over none."""
        try:
            with self._api.new_values(self._id, number, size) as fd:
                for start, view in parts:
                    for at in range(0, view.nbytes, PIECE_BYTES):
                        stopping.check()
                        _write_all(fd, view[at : at + PIECE_BYTES], start + at)
                        progress(start + at, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise KeeperError(
                "The values do not fit into the sandbox beside what its ranks still have of earlier ones",
                "Delete variables there, or end the sandbox with %remote close.",
                "capacity",
            ) from error
        except KeeperError as error:
            if error.code != "unsupported":
                raise
            self._handed_over = False
            return False
        progress(size, size)
        return True

    def _make_room(self, size: int) -> None:
        """Remove the oldest files, so that those in use fit; what ranks have loaded of them they keep."""
        while self._files and (len(self._files) >= FILES_MAX or sum(self._files.values()) + size > self.limit):
            number = next(iter(self._files))
            del self._files[number]
            self._pieces = [piece for piece in self._pieces if piece.number != number]
            with contextlib.suppress(KeeperError):
                self._api.delete_values(self._id, number)
        tags = {tag for held in self.held.values() for tag in held.values()}
        self.versions = {tag: version for tag, version in self.versions.items() if tag in tags}


def address(view: memoryview) -> tuple[int, int] | None:
    """Where a buffer lies, where that can be known: arrays can come of numpy only."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    array = numpy.frombuffer(view, dtype="u1")
    return int(array.__array_interface__["data"][0]), int(array.nbytes)


def _samples(view: memoryview) -> bytes:
    """Of parts from the beginning to the end: what has changed differs there in nearly all cases."""
    mark = hashlib.sha256()
    for number in range(SAMPLES):
        at = number * (view.nbytes - SAMPLE_BYTES) // (SAMPLES - 1)
        mark.update(view[at : at + SAMPLE_BYTES])
    return mark.digest()


def _write_all(fd: int, view: memoryview, at: int) -> None:
    while view.nbytes:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def _padded(views: Iterable[memoryview]) -> Iterator[bytes | memoryview]:
    for view in views:
        yield view
        yield bytes(-view.nbytes % ALIGN_BYTES)
