"""Whether a snapshot's files are what was written. Everything here blocks."""

import hashlib
from pathlib import Path

from warmcell.sandbox.snapshots import listing
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.draft import LAYER
from warmcell.sandbox.snapshots.manifest import Manifest, corrupt


def quick(directory: Path, expected: Manifest) -> None:
    """Check the manifest, the listing of the layer, and the layer by its listing: no file of it is read.

    Raises:
        SnapshotIncompatibleError: It belongs to another version or user.
        SnapshotCorruptError: Something is not as it was written.
    """
    found = manifests.read(directory)
    if found.layer != expected.layer:
        raise corrupt(f"The manifest of snapshot {expected.info.id} is not the one that was read before")
    try:
        saved = listing.load(directory)
        if hashlib.sha256(b"\n".join(saved)).hexdigest() != found.layer.sha256:
            raise corrupt(f"The listing of the files of snapshot {expected.info.id} is not what was written")
        now = listing.scan(directory / LAYER)
    except OSError as error:
        raise corrupt(f"The files of snapshot {expected.info.id} cannot be read: {error.strerror}") from error
    if now.sha256 != found.layer.sha256:
        what = listing.difference(saved, now.lines)
        raise corrupt(f"The files of snapshot {expected.info.id} are not what was written: {what!r} differs")
