"""Images of whole sandboxes on disk: what runsc wrote, and beside it what a restore needs to be equal."""

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.gvisor import find, shape_of
from warmcell.sandbox.errors import (
    SnapshotCorruptError,
    SnapshotIncompatibleError,
    SnapshotNotFoundError,
)
from warmcell.sandbox.models import SandboxSpec, SnapshotId
from warmcell.sandbox.paths import Paths, private_directory
from warmcell.sandbox.snapshots.base import ImageInfo
from warmcell.sandbox.snapshots.disk import remove, sync_filesystem

log = logging.getLogger(__name__)

ABOUT = "about.json"
TRIED = ".tried.json"
VERSION = 1
_WORDS = {"runsc": "version of runsc", "cpu": "kind of processor", "shape": "kind of sandbox"}


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is told of an image beside it."""

    until: str
    pid: int
    shape: str
    versions: Mapping[str, str]
    image_bytes: int
    memory_bytes: int
    created_at: float


class WholeImages:
    """Those of one user. Everything here blocks."""

    def __init__(self, paths: Paths) -> None:
        """Nothing is made yet."""
        self._paths = paths
        self._base = paths.state / "whole"

    def path(self, image: SnapshotId) -> Path:
        """Where an image is."""
        return self._base / image

    def about(self, image: SnapshotId) -> About:
        """What is told of an image.

        Raises:
            SnapshotNotFoundError: There is no such image.
            SnapshotCorruptError: It is not what was written.
        """
        path = self._base / image
        if not path.is_dir():
            raise SnapshotNotFoundError(f"There is no image {image}", hint="It was removed; start the kernel anew.")
        try:
            said = json.loads((path / ABOUT).read_text())
            sizes = said.pop("sizes")
            format_version = said.pop("version")
            whole = all((path / name).stat().st_size == size for name, size in sizes.items())
            about = About(**said)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole, format_version, about = False, VERSION, None
        if not whole or about is None or format_version != VERSION:
            raise SnapshotCorruptError(
                f"The image {image} is not whole", hint="Remove this snapshot, and start the kernel anew."
            )
        return about

    def fit(self, image: SnapshotId, spec: SandboxSpec) -> tuple[About, bool]:
        """What is told of an image that goes on here in a sandbox of that spec.

        With it comes whether it gets a copy-on-write folder where the saved one had it as it is.

        Raises:
            SnapshotIncompatibleError: It does not: it is of another runsc, machine or spec.
        """
        about = self.about(image)
        beside, shape = False, shape_of(spec)
        if shape != about.shape and spec.workspace is not None and spec.workspace.mode == "cow":
            as_it_was = replace(spec, workspace=replace(spec.workspace, mode="rw"))
            beside, shape = True, shape_of(as_it_was)
        self.check(about, shape)
        return about, beside

    def check(self, about: About, shape: str) -> None:
        """See that an image goes on here in a sandbox of that shape.

        Raises:
            SnapshotIncompatibleError: It does not: it is of another runsc, machine or spec.
        """
        expected, found = {**about.versions, "shape": about.shape}, {**versions(), "shape": shape}
        for name, value in expected.items():
            if found.get(name) != value:
                raise SnapshotIncompatibleError(
                    f"The snapshot needs another {_WORDS.get(name, name)}: {value}, not {found.get(name)}",
                    hint="Restore it where and as it was saved, or start the kernel anew.",
                    details={"expected": {name: value}, "found": {name: found.get(name)}},
                )

    def draft(self, image: SnapshotId) -> Path:
        """A directory that an image is written to."""
        private_directory(self._paths.state)
        draft = private_directory(self._base) / f".{image}"
        draft.mkdir(mode=0o700)
        return draft

    def finish(self, image: SnapshotId, **about: Any) -> About:
        """Describe what was written, put it on the disk, and give it its name.

        Raises:
            OSError: The disk could not take it.
        """
        draft = self._base / f".{image}"
        sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
        made = About(
            image_bytes=sum(path.stat().st_blocks * 512 for path in draft.iterdir()),
            memory_bytes=sizes.get("pages.img", 0),
            created_at=time.time(),
            **about,
        )
        told = {name: getattr(made, name) for name in About.__slots__}
        (draft / ABOUT).write_text(json.dumps({"version": VERSION, "sizes": sizes, **told}))
        sync_filesystem(draft)
        os.rename(draft, self._base / image)
        return made

    def drop(self, image: SnapshotId) -> None:
        """Remove an image, also one that is not finished. Idempotent."""
        for name in (f".{image}", image):
            remove(self._base / name)

    def all(self) -> list[ImageInfo]:
        """Those that are finished."""
        found = []
        for path in sorted(self._base.glob("*")) if self._base.is_dir() else []:
            if path.name.startswith("."):
                continue
            image = SnapshotId(path.name)
            try:
                about = self.about(image)
            except SnapshotCorruptError:  # It is told all the same: else nobody would ever remove it.
                size = sum(file.stat().st_blocks * 512 for file in path.iterdir())
                found.append(ImageInfo(id=image, image_bytes=size, created_at=path.stat().st_mtime))
            except SnapshotNotFoundError:
                continue
            else:
                found.append(ImageInfo(id=image, image_bytes=about.image_bytes, created_at=about.created_at))
        return found

    def sweep(self) -> None:
        """Remove what a keeper that was killed was writing. Nothing is being saved yet."""
        for path in self._base.glob(".*") if self._base.is_dir() else []:
            if path.is_dir():
                log.warning("removed %s, of an image that was never finished", path.name)
                remove(path)

    def tried(self, versions: Mapping[str, str]) -> bool:
        """Whether it was found to work with these, since the machine started."""
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads((self._base / TRIED).read_text()) == {**versions, "boot": _boot()})
        return False

    def note(self, versions: Mapping[str, str]) -> None:
        """It works with these."""
        (private_directory(self._base) / TRIED).write_text(json.dumps({**versions, "boot": _boot()}))


def versions() -> dict[str, str]:
    """What a restore needs to be equal.

    Raises:
        BackendUnavailableError: There is no runsc.
    """
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return {"runsc": find().version, "machine": platform.machine(), "cpu": " ".join(sorted(flags.split()[2:]))}


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
