"""Whether a snapshot's files are what was written. Everything here blocks."""

import hashlib
from pathlib import Path

from warmcell.sandbox.snapshots import contents, listing
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.draft import LAYER
from warmcell.sandbox.snapshots.manifest import Manifest, corrupt

QUICK_ENTRIES = 1000
"""In a layer of more than these `quick` does not look at each: that would be felt."""


def quick(directory: Path, expected: Manifest) -> None:
    """Check the manifest, the listing of the layer, and a layer that is not large by its listing; no file is read.

    Raises:
        SnapshotIncompatibleError: It belongs to another version or user.
        SnapshotCorruptError: Something is not as it was written.
    """
    found = manifests.read(directory)
    if found.layer != expected.layer:
        raise corrupt(f"The manifest of snapshot {expected.info.id} is not the one that was read before")
    layer(directory, found, entries_max=QUICK_ENTRIES)


def layer(directory: Path, manifest: Manifest, *, entries_max: int | None = None) -> None:
    """Check the listing, and the layer by it, if it is there to be looked at and has no more than `entries_max`.

    Raises:
        SnapshotCorruptError: One of them is not as it was written.
    """
    snapshot_id = manifest.info.id
    try:
        saved = listing.load(directory)
        if hashlib.sha256(b"\n".join(saved)).hexdigest() != manifest.layer.sha256:
            raise corrupt(f"The listing of the files of snapshot {snapshot_id} is not what was written")
        if manifest.info.compressed or (entries_max is not None and manifest.layer.entries > entries_max):
            return
        now = listing.scan(directory / LAYER)
    except OSError as error:
        raise corrupt(f"The files of snapshot {snapshot_id} cannot be read: {error.strerror}") from error
    if now.sha256 != manifest.layer.sha256:
        what = listing.difference(saved, now.lines)
        raise corrupt(f"The files of snapshot {snapshot_id} are not what was written: {what!r} differs")


def full(directory: Path, expected: Manifest) -> bool:
    """Check as `quick` does, and read all files of the layer; False where their sums are not known yet.

    Raises:
        SnapshotIncompatibleError: It belongs to another version or user.
        SnapshotCorruptError: Something is not as it was written.
    """
    quick(directory, expected)
    layer(directory, expected)
    sums = contents.load(directory)
    if sums is None or expected.info.compressed:
        return False
    try:
        found = contents.layer_sums(directory / LAYER) or {}
    except OSError as error:
        raise corrupt(f"The files of snapshot {expected.info.id} cannot be read: {error.strerror}") from error
    changed = sorted(name for name in {*sums, *found} if sums.get(name) != found.get(name))
    if changed:
        raise corrupt(f"The files of snapshot {expected.info.id} are not what was written: {changed[0]!r} differs")
    return True
