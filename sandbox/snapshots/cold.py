"""Layers that nobody has used for long, as one compressed file. Everything here blocks.

The manifest says which of the two forms counts; the other one, which a crash may have left, is removed when the store
is opened.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from warmcell.sandbox.snapshots import checks, disk, listing, streams
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.draft import LAYER
from warmcell.sandbox.snapshots.manifest import Manifest, corrupt
from warmcell.sandbox.snapshots.tarball import END, Unpacker, pack

log = logging.getLogger(__name__)

PACKED = "layer.tar.zst"


def compress(directory: Path, manifest: Manifest) -> Manifest:
    """Put the layer into one file; the manifest as it is then.

    Raises:
        OSError: It could not be written; the layer is as before.
        SnapshotCorruptError: The layer is not what was written.
    """
    checks.layer(directory, manifest)
    new = directory / f".{PACKED}"
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            for piece in streams.compressed(_members(directory / LAYER)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, directory / PACKED)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    size = (directory / PACKED).stat().st_size
    changed = _with(manifest, compressed=True, layer_bytes=size)
    manifests.write(directory, changed)
    _drop(directory / LAYER)
    return changed


def expand(directory: Path, manifest: Manifest) -> Manifest:
    """Make the layer a directory again; the manifest as it is then.

    Raises:
        OSError: It could not be written; it is compressed still.
        SnapshotCorruptError: What is in the file is not what was put into it; as before.
    """
    new = directory / f".{LAYER}"
    disk.remove(new)
    new.mkdir(mode=0o700)
    try:
        with open(directory / PACKED, "rb") as file:
            _unpack(file, new)
        found = listing.scan(new)
        if found.sha256 != manifest.layer.sha256:
            raise corrupt(f"The compressed files of snapshot {manifest.info.id} are not what was compressed")
        disk.sync_filesystem(new)
        disk.remove(directory / LAYER)
        os.rename(new, directory / LAYER)
    except BaseException:
        disk.remove(new)
        raise
    changed = _with(manifest, compressed=False, layer_bytes=found.disk_bytes)
    manifests.write(directory, changed)
    _drop(directory / PACKED)
    return changed


def check(directory: Path, manifest: Manifest) -> None:
    """Read all of the compressed layer.

    Raises:
        SnapshotCorruptError: What is in the file is not what was put into it.
    """
    try:
        with open(directory / PACKED, "rb") as file, streams.members(file) as archive:
            for _, content in archive:
                while content is not None and content.read(streams.PIECE):
                    pass
    except OSError as error:
        raise corrupt(f"The files of snapshot {manifest.info.id} cannot be read: {error.strerror}") from error


def tidy(directory: Path, manifest: Manifest) -> None:
    """Remove the form that does not count, and what is half written."""
    counts, other = (PACKED, LAYER) if manifest.info.compressed else (LAYER, PACKED)
    leftovers = [name for name in os.listdir(directory) if name.startswith(".")]
    if os.path.lexists(directory / counts):
        leftovers.append(other)
    for name in leftovers:
        disk.remove(directory / name)


def _drop(path: Path) -> None:
    """Remove the form that counts no more. What stays of it is removed when the store is opened."""
    try:
        disk.remove(path)
    except OSError as error:
        log.warning("%s is of no use any more, and could not be removed: %s", path, error)


def _with(manifest: Manifest, *, compressed: bool, layer_bytes: int) -> Manifest:
    info = dataclasses.replace(manifest.info, compressed=compressed, layer_bytes=layer_bytes)
    return dataclasses.replace(manifest, info=info)


def _members(layer: Path) -> Iterator[bytes]:
    yield from pack(layer, "")
    yield END


def _unpack(file: IO[bytes], layer: Path) -> None:
    unpacker = Unpacker(layer, ours=True)
    with streams.members(file) as archive:
        for member, content in archive:
            unpacker.put(member.name, member, content)
    unpacker.finish()
