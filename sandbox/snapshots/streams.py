"""Tar streams within zstd, both ways. Everything here blocks."""

import contextlib
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO

import zstandard

from warmcell.sandbox.snapshots.manifest import corrupt

LEVEL = 3
Member = tuple[tarfile.TarInfo, IO[bytes] | None]


def compressed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces as one zstd frame with a checksum of its own."""
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
    for piece in pieces:
        out = compressor.compress(piece)
        if out:
            yield out
    yield compressor.flush()


@contextlib.contextmanager
def members(file: IO[bytes]) -> Iterator[Iterator[Member]]:
    """The members of a compressed tar with their contents, in their order; each is to be read before the next.

    Raises:
        SnapshotCorruptError: It is none, or not what was written.
    """
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(file) as plain:
            with tarfile.open(fileobj=plain, mode="r|", encoding="utf-8", errors="surrogateescape") as archive:
                yield ((member, archive.extractfile(member) if member.isreg() else None) for member in archive)
            while plain.read(2**20):  # To its end, where the checksum is.
                pass
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise corrupt(f"The archive cannot be read: {error}") from error
