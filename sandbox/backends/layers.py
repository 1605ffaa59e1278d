"""A sandbox's private files on disk: what of it is saved, how, and whether a saved layer fits a spec."""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import trees
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.errors import (
    SnapshotCorruptError,
    SnapshotError,
    SnapshotIncompatibleError,
    StorageFullError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.plain_files import read_plain

ABOUT = "layer.json"
ABOUT_MAX_BYTES = 2**20
"""A layer may have come in an archive from anywhere."""
VERSION = 1
OVERLAY_PARTS = ("environment", "workspace")
PLAIN_PARTS = ("tmp", "home", "shm")
SHARED = "shm"
"""The plain part through which processes share memory."""
DEVICES_MAX = 64
"""Of so many sandboxes the device numbers are known: what was shared before that is most likely shared no more."""
VOLUME = re.compile(r"volume\d{1,3}", re.ASCII)
"""Names of plain parts that are volumes of an image's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One private tree of a sandbox."""

    place: str
    """Below the stage's base."""
    most_bytes: int
    most_entries: int
    lowest: str = ""
    """What lies below an overlay's layers, likewise."""
    base: bool = False
    """Whether that part of the layer that the sandbox began with lies below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All private trees of a sandbox, and what a saved layer says of where it came from."""

    parts: Mapping[str, Part]
    marks: str
    """What overlays keep their marks in: "user" or "trusted" attributes."""
    fits: Mapping[str, str]
    """What must be equal for a sandbox that begins with the saved layer."""
    shown: tuple[str, ...] = ()
    """Places, below the same base, of what is the host's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A saved layer, looked at."""

    path: Path
    bytes: Mapping[str, int]
    devices: tuple[int, ...] = ()
    """Numbers that the file system for shared memory had, there and before: whoever knows files by such a number and
    theirs must not meet others with both, and a new file system counts its files from the beginning."""

    def part(self, name: str) -> Path | None:
        """Where a tree of it is, None where it has none."""
        return self.path / name if name in self.bytes else None

    @property
    def copied_bytes(self) -> int:
        """What a sandbox that begins with it gets copies of; the rest is shared."""
        return sum(size for name, size in self.bytes.items() if name not in OVERLAY_PARTS)

    def check(self, parts: Mapping[str, Part]) -> None:
        """See that it is what a sandbox with these parts can begin with.

        Raises:
            SnapshotIncompatibleError: It has other parts, or is larger than the limits allow.
        """
        # A part that it lacks begins empty: the workspace of a fork, which its source could write to directly.
        missing = sorted(set(self.bytes) - set(parts))
        _compare({"parts": missing}, {"parts": []})
        for name, size in self.bytes.items():
            most = parts[name].most_bytes
            if size > most:
                raise SnapshotIncompatibleError(
                    f"The saved files ({name}) take {size:,} bytes, and this sandbox may have {most:,}",
                    hint="Raise the limit to what it was: layer_bytes, or shm_bytes for shared memory.",
                    details={"expected": {name: size}, "found": {name: most}},
                )


def save(base: int, parts: Parts, target: Path, *, began_with: int) -> None:
    """Copy a sandbox's private trees into `target`, an empty directory. Blocks.

    Args:
        base: A descriptor of the stage's base.
        parts: What there is.
        target: It is removed if this fails.
        began_with: A descriptor of the layer that the sandbox began with, -1 where there is none.

    Raises:
        UnsupportedOperationError: There is a file that cannot be copied.
        StorageFullError: The disk is full, or the files exceed the sandbox's limits.
        SnapshotError: Anything else.
    """
    try:
        saved = {
            name: _save_part(base, name, part, parts.marks, target, began_with) for name, part in parts.parts.items()
        }
        about = {
            "version": VERSION,
            "fits": dict(parts.fits),
            "bytes": saved,
            "devices": _devices(base, parts, began_with),
        }
        with open(os.open(target / ABOUT, trees.CREATE, 0o600), "w") as file:
            json.dump(about, file)
    except BaseException as error:
        remove_tree(target)
        if isinstance(error, (OSError, trees.Refused)):
            raise _explain(error) from error
        raise


def _devices(base: int, parts: Parts, began_with: int) -> list[int]:
    """See `Saved.devices`; the last is that of now."""
    known: list[int] = []
    if began_with >= 0:
        with contextlib.suppress(FileNotFoundError), open(os.open(ABOUT, os.O_RDONLY, dir_fd=began_with)) as file:
            known = _device_numbers(json.load(file))
    if SHARED in parts.parts:
        known = [*known, os.stat(parts.parts[SHARED].place, dir_fd=base, follow_symlinks=False).st_dev]
    return known[-DEVICES_MAX:]


def _device_numbers(about: Mapping[str, Any]) -> list[int]:
    return [int(one) for one in about.get("devices", ())][-DEVICES_MAX:]


def _save_part(base: int, name: str, part: Part, marks: str, target: Path, began_with: int) -> int:
    (target / name).mkdir(mode=0o700)
    opened: list[int] = []
    try:
        source = trees.within(base, part.place)
        opened.append(source)
        opened.append(made := os.open(target / name, trees.DIRECTORY))
        below = lowest = -1
        if part.lowest:
            opened.append(lowest := trees.within(base, part.lowest))
        if part.base:
            opened.append(below := os.open(name, trees.DIRECTORY, dir_fd=began_with))
        copy = trees.Copy(
            source,
            made,
            most_bytes=part.most_bytes,
            most_entries=part.most_entries,
            owners=os.geteuid() == 0,
            overlay=marks if name in OVERLAY_PARTS else "",
            base=below,
            lowest=lowest,
        )
        return copy.run()
    finally:
        for handle in opened:
            os.close(handle)


def fill(base: int, saved: Saved, parts: Parts) -> None:
    """Copy what a saved layer has into a sandbox whose trees, empty so far, nobody uses yet. Blocks.

    Args:
        base: A handle of the directory below which the trees are.
        saved: What `look_at` has looked at.
        parts: Where they are.

    Raises:
        SnapshotCorruptError: It holds more than it says.
        SnapshotError: Anything else.
    """
    for name, part in parts.parts.items():
        source = saved.part(name)
        if source is None or name in OVERLAY_PARTS:  # Those are mounted.
            continue
        handles: list[int] = []
        try:
            handles.append(os.open(source, trees.DIRECTORY))
            handles.append(trees.within(base, part.place))
            trees.Copy(
                *handles[:2],
                most_bytes=part.most_bytes,
                most_entries=part.most_entries,
                owners=os.geteuid() == 0,
                onto=True,
            ).run()
        except trees.Refused:
            raise _corrupt(saved.path) from None
        except OSError as error:
            raise _explain(error) from error
        finally:
            for handle in handles:
                os.close(handle)


def look_at(path: Path, *, fits: Mapping[str, str]) -> Saved:
    """A saved layer, if it is of a sandbox that was planned alike. Blocks.

    Raises:
        SnapshotCorruptError: It is not what `save` wrote.
        SnapshotIncompatibleError: It is of another spec.
    """
    try:
        about = json.loads(read_plain(path / ABOUT, most_bytes=ABOUT_MAX_BYTES))
        version, there = about["version"], dict(about["fits"])
        sizes = {str(name): int(size) for name, size in about["bytes"].items()} if version == VERSION else {}
        devices = tuple(_device_numbers(about))
        whole = all(size >= 0 and stat.S_ISDIR((path / name).lstat().st_mode) for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _corrupt(path) from None
    if not whole or not all(name in (*OVERLAY_PARTS, *PLAIN_PARTS) or VOLUME.fullmatch(name) for name in sizes):
        raise _corrupt(path)
    if "workspace" not in sizes:
        there, fits = ({name: value for name, value in each.items() if name != "workspace"} for each in (there, fits))
    _compare({"version": version, **there}, {"version": VERSION, **fits})
    return Saved(path=path, bytes=sizes, devices=devices)


def _compare(expected: Mapping[str, object], found: Mapping[str, object]) -> None:
    for name in sorted({*expected, *found}):
        was, now = expected.get(name), found.get(name)
        if was != now:
            raise SnapshotIncompatibleError(
                f"The saved files are of another sandbox: {name} was {was!r} and is {now!r} now",
                hint="Restore it as it was saved, or start anew.",
                details={"expected": {name: was}, "found": {name: now}},
            )


def _corrupt(path: Path) -> SnapshotCorruptError:
    return SnapshotCorruptError(
        f"The saved files in {path} are not whole", hint="Remove this snapshot, and start the kernel anew."
    )


def _explain(error: OSError | trees.Refused) -> WarmcellError:
    if isinstance(error, trees.Refused):
        if error.full:
            return StorageFullError(str(error), hint="Remove files from the sandbox, or give it a larger layer_bytes.")
        return UnsupportedOperationError(
            f"The sandbox's files cannot be saved: {error}", hint="Remove what is named, then try again."
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(
            "The sandbox's files cannot be saved: the disk is full", hint="Free space where Warmcell keeps its state."
        )
    return SnapshotError(
        f"The sandbox's files cannot be saved: {error.strerror or error}",
        hint="The state directory must be on a disk that has links and extended attributes, such as ext4 or XFS.",
    )


def marks(*, as_root: bool) -> str:
    """What an overlay of a sandbox keeps its marks in.

    Attributes of the user's, which a layer can be saved and shared with by anybody, where file systems in memory have
    them. Root can do with its own.
    """
    return "trusted" if as_root and memory_lacks_attributes() else "user"


def marks_option(*, as_root: bool) -> str:
    """The same, as an option of the mount; features that the user's attributes rule out are off in any case."""
    return ",userxattr" if marks(as_root=as_root) == "user" else ",redirect_dir=off,index=off,metacopy=off"


def memory_lacks_attributes() -> bool:
    """Whether memory file systems have no attributes of users: Linux before 6.6."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return release is not None and tuple(map(int, release.groups())) < (6, 6)
