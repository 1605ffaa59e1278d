"""A snapshot in the making: a hidden directory of the store that becomes the snapshot by one rename."""

import asyncio
import dataclasses
import logging
import os
import stat
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from warmcell.sandbox.errors import ConflictError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots import contents, disk, listing
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.manifest import LayerSummary, Manifest

log = logging.getLogger(__name__)

LAYER = "layer"
FEW = 64
"""Files that are put on the disk one by one: it costs a turn of the journal each, but not what others have written."""

Result = TypeVar("Result")


class Shelf(Protocol):
    """What a draft tells its store, in this order."""

    def begun(self, draft: "Draft") -> None:
        """It wants to begin; raises where its id is taken."""

    def claim(self, draft: "Draft", manifest: Manifest) -> None:
        """It wants to be committed so; raises where its name is bad or taken, else keeps the name for it."""

    async def committed(self, draft: "Draft", manifest: Manifest, *, durable: bool) -> None:
        """It is a snapshot now."""

    def ended(self, draft: "Draft") -> None:
        """It holds no id and no name any more. Idempotent."""


class Draft:
    """Fill `layer`, then `commit`; whatever else happens, `abandon` leaves nothing of it."""

    def __init__(self, root: Path, snapshot_id: SnapshotId, *, shelf: Shelf) -> None:
        """Made by `SnapshotStore.draft`."""
        self.id = snapshot_id
        self.path = root / f".{snapshot_id}"
        self.layer = self.path / LAYER
        """Directory for the writable layer, 0700; empty where there is none."""
        self._final = root / snapshot_id
        self._shelf = shelf
        self._open = False

    async def begin(self) -> Self:
        """Make the directory.

        Raises:
            ConflictError: There is a snapshot, or a draft, of this id.
            StorageFullError: The disk is full.
        """
        self._shelf.begun(self)
        try:
            await finish(asyncio.to_thread(self._make))
        except BaseException as error:
            await self._drop()
            if isinstance(error, OSError):
                raise disk.failure(error, "begin a snapshot") from error
            raise
        self._open = True
        return self

    async def empty(self) -> None:
        """Have an empty layer again."""
        await finish(asyncio.to_thread(self._make_layer))

    async def commit(self, manifest: Manifest, *, durable: bool = True) -> Manifest:
        """Make it a snapshot: from here on the store has it, and before not, whenever anything is killed.

        Args:
            durable: Wait until all of it is on the disk, so that it outlives a loss of power too. Otherwise it is put
                there in the background (that of a fork is not), and a loss of power before leaves a snapshot that
                is found to be broken.

        Returns:
            The manifest with owner, layer and sizes filled in.

        Raises:
            ConflictError: It is committed or abandoned already, or its name was taken meanwhile.
            StorageFullError: The disk is full. The draft is still there, to be abandoned.
            SnapshotError: It could not be written; as before.
        """
        if not self._open:
            raise ConflictError(f"The draft of snapshot {self.id} has ended", hint="Begin another.")
        self._shelf.claim(self, manifest)
        self._open = False
        return await finish(self._commit(manifest, durable))

    async def _commit(self, manifest: Manifest, durable: bool) -> Manifest:
        try:
            written = await asyncio.to_thread(self._write, manifest, durable)
        except BaseException as error:
            self._open = True
            if isinstance(error, OSError):
                raise disk.failure(error, "write the snapshot") from error
            raise
        await self._shelf.committed(self, written, durable=durable)
        return written

    async def abandon(self) -> None:
        """Remove what there is of it. Idempotent; no effect once it is committed."""
        if self._open:
            self._open = False
            await self._drop()

    async def _drop(self) -> None:
        try:
            await finish(asyncio.to_thread(disk.remove, self.path))
        except OSError as error:  # It is hidden, and goes when the store is next opened.
            log.warning("The draft of snapshot %s could not be removed: %s", self.id, error)
        finally:
            self._shelf.ended(self)

    def _make(self) -> None:
        self.path.mkdir(mode=0o700)
        self.layer.mkdir(mode=0o700)

    def _make_layer(self) -> None:
        if os.listdir(self.layer):  # A new directory: who has opened the old one sees nothing of what comes.
            disk.remove(self.layer)
            self.layer.mkdir(mode=0o700)

    def _write(self, manifest: Manifest, durable: bool) -> Manifest:
        found = listing.scan(self.layer)
        listing.save(self.path, found)
        written = dataclasses.replace(
            manifest,
            uid=os.getuid(),
            info=dataclasses.replace(
                manifest.info,
                id=self.id,
                layer_bytes=found.disk_bytes,
                compressed=False,
                image_compressed=False,
            ),
            layer=LayerSummary(entries=len(found.lines), sha256=found.sha256),
        )
        manifests.write(self.path, written, durable=False)
        if durable:
            self._sync(entries=len(found.lines))
        os.rename(self.path, self._final)
        if durable:
            manifests.sync_directory(self._final.parent)
        return written

    def _sync(self, *, entries: int) -> None:
        """Put it on the disk: file by file where these are few, else all that the file system has to write."""
        if entries > FEW:
            disk.sync_filesystem(self.path)
            return
        for path, found in listing.walk(self.path):
            if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
                with contents.opened(path) as descriptor:
                    os.fsync(descriptor)
        manifests.sync_directory(self.path)

    async def __aenter__(self) -> Self:
        return await self.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.abandon()


async def finish(work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work` to its end even if the caller is cancelled: a thread cannot be stopped in the middle of it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            await asyncio.wait([task])
        raise
