"""The store's directory on the disk: its form, and the steps by which a snapshot comes, changes and goes.

Everything here blocks, and raises OSError where the disk does not do as it should.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.errors import SnapshotIncompatibleError, WarmcellError
from warmcell.sandbox.models import ErrorInfo, SnapshotId
from warmcell.sandbox.paths import private_directory
from warmcell.sandbox.snapshots import cold, contents, disk
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.manifest import Manifest

ID = re.compile(r"[a-z0-9]{12}")
STORE = "store.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A snapshot that is there but cannot be used."""

    id: SnapshotId
    error: ErrorInfo
    """Why: `snapshot_incompatible` for one of another version or user, else `snapshot_corrupt`."""


def hide(path: Path, gone: Path) -> None:
    """Take a snapshot's name away, so that it is none any more even after a crash."""
    disk.remove(gone)
    os.rename(path, gone)
    manifests.sync_directory(path.parent)


def set_used(directory: Path, when: float) -> None:
    """Note when it was last used."""
    os.utime(directory / manifests.MANIFEST, (when, when))


def rewrite(directory: Path, manifest: Manifest, used_at: float, *, durable: bool) -> None:
    """Put another manifest in the place of its own."""
    manifests.write(directory, manifest, durable=durable)
    set_used(directory, used_at)


def has_sums(directory: Path) -> bool:
    """Whether the contents of its layer have been summed up."""
    return (directory / contents.SUMS).exists()


def load(root: Path) -> tuple[list[tuple[Manifest, float]], list[Unreadable]]:
    """Tidy up, and read what is there."""
    private_directory(root)
    _check_form(root)
    found, unreadable = [], []
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path = root / name
        if name.startswith("."):
            disk.remove(path)
        elif ID.fullmatch(name):
            try:
                manifest = manifests.read(path)
                cold.tidy(path, manifest)
                found.append((manifest, (path / manifests.MANIFEST).stat().st_mtime))
            except WarmcellError as error:
                unreadable.append(Unreadable(id=SnapshotId(name), error=ErrorInfo.from_json(error.to_json())))
    return found, unreadable


def _check_form(root: Path) -> None:
    """The store's format, written where there is none yet."""
    path = root / STORE
    try:
        found = json.loads(path.read_bytes())["format"]
    except FileNotFoundError:
        new = root / f".{STORE}"
        new.write_text(json.dumps({"format": FORMAT}) + "\n")
        os.rename(new, path)
        return
    except (ValueError, KeyError, TypeError):
        found = None
    if found != FORMAT:
        raise SnapshotIncompatibleError(
            f"The snapshots in {root} have format {found}, this version of Warmcell reads {FORMAT}",
            hint="Use the version of Warmcell that made them, or remove that directory.",
            details={"what": "format", "expected": FORMAT, "found": found},
        )
