"""What becomes of a snapshot while it is kept: another name, sums, one compressed file and a directory again."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

from warmcell.sandbox.errors import ConflictError
from warmcell.sandbox.models import SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots import checks, cold, contents, directory, disk, lookup
from warmcell.sandbox.snapshots.draft import finish
from warmcell.sandbox.snapshots.known import Entry, Known
from warmcell.sandbox.snapshots.lookup import Kind
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.snapshots.summing import Summing


class Changing(Known):
    """Changes manifests and the form of layers; reads what is to be as it was written."""

    @functools.cached_property
    def _summing(self) -> Summing:
        return Summing(self.root, self._keep_sums)

    async def idle(self) -> None:
        """Wait until nothing runs in the background."""
        await self._summing.idle()

    async def written(self, snapshot_id: SnapshotId) -> None:
        """Wait until it is on the disk as it was committed and last changed, and outlives a loss of power.

        Raises:
            SnapshotError: It cannot be known whether it is.
        """
        await self._summing.written(snapshot_id)

    async def touch(self, snapshot_id: SnapshotId) -> None:
        """Count this moment as its last use."""
        entry = self._entries.get(snapshot_id)
        if entry is not None:
            entry.used_at = self._clock()
            with contextlib.suppress(OSError):  # It counts until the keeper ends.
                await asyncio.to_thread(directory.set_used, self.root / snapshot_id, entry.used_at)

    async def rename(self, snapshot_id: SnapshotId, name: str) -> SnapshotInfo:
        """Give it another name; an empty one takes its name away.

        Raises:
            SnapshotNotFoundError: There is none.
            ConflictError: Another one of the same kernel has the name.
            InvalidRequestError: That is no name.
            StorageFullError: The disk is full; it has its name still.
        """
        lookup.check_name(name)
        entry = self._entries[self._find_id(snapshot_id)]

        def renamed(manifest: Manifest) -> Manifest:
            wanted = dataclasses.replace(manifest.info, name=name)
            if name:
                claim = (lookup.scope(wanted), name)
                others = [one for one in self._namesakes(wanted) if one != snapshot_id]
                if others or claim in self._claims.values():
                    raise taken(name)
                self._claims[snapshot_id] = claim
            return dataclasses.replace(manifest, info=wanted)

        await self._change(entry, renamed)
        return self._info(entry)

    async def amend(
        self,
        snapshot_id: SnapshotId,
        *,
        kind: Kind | None = None,
        image_bytes: int | None = None,
        image_compressed: bool | None = None,
        memory_bytes: int | None = None,
        versions: Mapping[str, str] | None = None,
        phases_ms: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Change what its manifest says, where something is given; on the disk a moment later, as nobody need wait.

        Raises:
            SnapshotNotFoundError: There is none.
            StorageFullError: The disk is full; it is as it was.
        """
        entry = self._entries[self._find_id(snapshot_id)]

        def amended(manifest: Manifest) -> Manifest:
            info = manifest.info
            changed = dataclasses.replace(
                info,
                kind=info.kind if kind is None else kind,
                image_bytes=info.image_bytes if image_bytes is None else image_bytes,
                image_compressed=info.image_compressed if image_compressed is None else image_compressed,
                memory_bytes=info.memory_bytes if memory_bytes is None else memory_bytes,
                phases_ms=info.phases_ms if phases_ms is None else phases_ms,
            )
            return dataclasses.replace(
                manifest, info=changed, versions=manifest.versions if versions is None else versions
            )

        await self._change(entry, amended, durable=False)
        if entry.manifest.info.kind != "fork":
            self._summing.add(snapshot_id, sync=True)
        return self._told(entry)

    async def verify(self, snapshot_id: SnapshotId) -> bool:
        """Read all files of its layer; False where the sums to compare them with are not there (yet).

        Raises:
            SnapshotNotFoundError: There is none.
            SnapshotCorruptError: Something is not what was written.
        """
        entry = self._entries[self._find(snapshot_id)]
        with self._pinned(entry):
            await self.idle()  # Its sums may be made just now.
            async with entry.lock:
                if entry.manifest.info.compressed:  # Which has a sum of its own.
                    await asyncio.to_thread(checks.quick, self.root / snapshot_id, entry.manifest)
                    await asyncio.to_thread(cold.check, self.root / snapshot_id, entry.manifest)
                    return True
                return await asyncio.to_thread(checks.full, self.root / snapshot_id, entry.manifest)

    async def compress(self, snapshot_id: SnapshotId) -> SnapshotInfo:
        """Put its layer into one compressed file, until it is used again. No effect if it is so already.

        Raises:
            SnapshotNotFoundError: There is none.
            ConflictError: It is in use.
            SnapshotCorruptError: The layer is not what was written; it is left alone.
            StorageFullError: The disk is full; as before.
        """
        entry = self._entries[self._find(snapshot_id)]
        entry.refuse_used("compress")
        with self._pinned(entry):
            await self._form(entry, compressed=True)
        return self._info(entry)

    async def _change(self, entry: Entry, change_of: Callable[[Manifest], Manifest], *, durable: bool = True) -> None:
        """Write what becomes of its manifest, as that is once nobody else changes it.

        Args:
            entry: Whose.
            change_of: Gives the new one; it may claim the snapshot's name until that is written.
            durable: Have it on the disk.
        """
        snapshot_id = entry.manifest.info.id

        async def change() -> None:
            async with entry.lock:
                self._find_id(snapshot_id)
                try:
                    manifest, at = change_of(entry.manifest), self.root / snapshot_id
                    await asyncio.to_thread(directory.rewrite, at, manifest, entry.used_at, durable=durable)
                    entry.manifest = manifest
                except OSError as error:
                    raise disk.failure(error, f"change snapshot {snapshot_id}") from error
                finally:
                    self._claims.pop(snapshot_id, None)

        await finish(change())

    async def _form(self, entry: Entry, *, compressed: bool) -> None:
        """Make the layer one file or a directory, if it is not."""

        async def change() -> None:
            async with entry.lock:
                await self._make_form(entry, compressed=compressed)

        await finish(change())

    async def _make_form(self, entry: Entry, *, compressed: bool) -> None:
        """The same for who has its lock."""
        if entry.manifest.info.compressed == compressed:
            return
        work = cold.compress if compressed else cold.expand
        snapshot_id = entry.manifest.info.id
        try:
            entry.manifest = await asyncio.to_thread(work, self.root / snapshot_id, entry.manifest)
            await asyncio.to_thread(directory.set_used, self.root / snapshot_id, entry.used_at)
            if not compressed and not directory.has_sums(self.root / snapshot_id):
                self._summing.add(snapshot_id)
        except OSError as error:
            raise disk.failure(error, f"change the files of snapshot {snapshot_id}") from error

    @contextlib.contextmanager
    def _pinned(self, entry: Entry) -> Iterator[None]:
        entry.pins += 1
        try:
            yield
        finally:
            entry.unpin()

    async def _keep_sums(self, snapshot_id: SnapshotId, sums: dict[str, str]) -> None:
        entry = self._entries.get(snapshot_id)
        if entry is not None:
            async with entry.lock:
                if not entry.manifest.info.compressed and self._entries.get(snapshot_id) is entry:
                    await asyncio.to_thread(contents.save, self.root / snapshot_id, sums)


def taken(name: str) -> ConflictError:
    """The error for a name that another snapshot of the kernel has."""
    return ConflictError(
        f"This kernel has a snapshot {name!r} already", hint="Use another name, or remove that snapshot first."
    )
