"""Tar streams within zstd, both ways. Everything here blocks."""

import contextlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO

import zstandard

from warmcell.sandbox.snapshots.manifest import corrupt

LEVEL = 3
PIECE = 2**20
PACKED_PIECE = 4096
"""Read at a time: some thousand times as much may come of it."""
WINDOW_MAX = 2**27
"""Bytes of memory that a frame may ask for to be read."""

Member = tuple[tarfile.TarInfo, IO[bytes] | None]


class Frame:
    """One zstd frame with a checksum of its own, made bit by bit."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()

    def put(self, plain: bytes) -> bytes:
        """What comes of it so far; may be nothing."""
        return self._compressor.compress(plain)

    def take(self, plain: Iterator[bytes]) -> bytes | None:
        """Take from `plain` until there is a piece worth sending; None when `plain` is at its end."""
        out = bytearray()
        ended = True
        for piece in plain:
            ended = False
            out += self._compressor.compress(piece)
            if len(out) >= PIECE:
                break
        return None if ended else bytes(out)

    def end(self, plain: bytes) -> bytes:
        """The last piece."""
        return self._compressor.compress(plain) + self._compressor.flush()


def compressed(plain: Iterable[bytes]) -> Iterator[bytes]:
    """All of `plain` as one frame."""
    frame = Frame()
    for piece in plain:
        yield frame.put(piece)
    yield frame.end(b"")


class _Plain(io.BytesIO):
    """What is in a frame; unlike the library's reader it knows whether the frame has come to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX).decompressobj()
        self._left = memoryview(b"")

    @property
    def whole(self) -> bool:
        """Whether the frame, with its checksum, is all that was in the file."""
        return self._decompressor.eof and not self._decompressor.unused_data and not self._file.read(1)

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes; nothing at the end."""
        while not self._left and not self._decompressor.eof:
            packed = self._file.read(PACKED_PIECE)
            if not packed:
                break
            self._left = memoryview(self._decompressor.decompress(packed))
        wanted = len(self._left) if size is None or size < 0 else size
        piece, self._left = bytes(self._left[:wanted]), self._left[wanted:]
        return piece


@contextlib.contextmanager
def members(file: IO[bytes]) -> Iterator[Iterator[Member]]:
    """The members of a compressed tar with their contents, in their order; each is to be read before the next.

    Raises:
        SnapshotCorruptError: It is none, or not what was written.
    """
    with reading():
        plain = _Plain(file)
        with tarfile.open(fileobj=plain, mode="r|", encoding="utf-8", errors="surrogateescape") as archive:
            yield ((member, archive.extractfile(member) if member.isreg() else None) for member in archive)
        while plain.read(PIECE):  # To its end, where the checksum is.
            pass
        if not plain.whole:
            raise corrupt("The archive is not whole")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What the libraries say of a file that is no archive, as one of ours."""
    try:
        yield
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise corrupt(f"The archive cannot be read: {error}") from error
