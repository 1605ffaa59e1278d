"""All snapshots of one user: manifests and writable layers in one directory, owned by one keeper.

    root/store.json         the store's format
    root/ID/manifest.json   the point of truth; its modification time is when the snapshot was last used
    root/ID/layer/          the writable layer as it was at the freeze
    root/ID/layer.list      what is in it, and how large and old each file is
    root/ID/layer.sums      sums of its contents, made in the background
    root/ID/layer.tar.zst   instead of `layer/` where it is compressed
    root/.ID/               a draft; removed when the store is opened
    root/.ID.gone/          a snapshot that is being removed; as above

A snapshot comes and goes by one rename. What cannot be read is left where it is, told by `unreadable`, and goes only
when somebody asks for it by its id. The object lives on one event loop; file work runs in threads.
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import string
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from warmcell.sandbox.errors import (
    ConflictError,
    InvalidRequestError,
    SnapshotNotFoundError,
    WarmcellError,
    from_json,
)
from warmcell.sandbox.models import SandboxId, SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots import checks, cold, contents, directory, disk, lookup
from warmcell.sandbox.snapshots.directory import Unreadable
from warmcell.sandbox.snapshots.draft import LAYER, Draft, finish
from warmcell.sandbox.snapshots.lookup import Kind
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.snapshots.summing import Summing

log = logging.getLogger(__name__)

OnRemoved = Callable[[SnapshotId], Awaitable[None]]


def new_id() -> SnapshotId:
    """A fresh snapshot id: twelve lower-case letters and digits."""
    return SnapshotId("".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A snapshot that stays for as long as it is in use."""

    manifest: Manifest
    layer: Path
    """The writable layer; to be copied from, never changed."""


@dataclass(slots=True)
class _Entry:
    manifest: Manifest
    used_at: float
    pins: int = 0
    doomed: bool = False
    """To be removed when the last pin goes; nobody finds it any more."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SnapshotStore:
    """The snapshots below `root`. Call `open` first."""

    def __init__(
        self,
        root: Path,
        *,
        quota_bytes: int | None = None,
        ttl_s: float | None = None,
        on_removed: OnRemoved | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is touched yet.

        Args:
            quota_bytes: Cap for images and layers together, held by `make_room`. None: no cap.
            ttl_s: Seconds after its last use at which a snapshot expires. None: never by age.
            on_removed: Awaited for each snapshot that was removed, to drop the engine's image.
            clock: Unix time in seconds.
        """
        self.root = root
        self.quota_bytes = quota_bytes
        self.ttl_s = ttl_s
        self.on_removed = on_removed
        self._clock = clock
        self._entries: dict[SnapshotId, _Entry] = {}
        self._unreadable: dict[SnapshotId, Unreadable] = {}
        self._drafts: dict[SnapshotId, Draft] = {}
        self._claims: dict[SnapshotId, tuple[str, str]] = {}
        self._summing = Summing(root, self._keep_sums)

    async def open(self) -> None:
        """Make the directory, remove what a killed keeper left of drafts and removals, and read all manifests.

        Raises:
            SnapshotIncompatibleError: A newer version of Warmcell has changed the store's form.
            BackendUnavailableError: The directory cannot be made or is not this user's.
            SnapshotError: It cannot be read or written.
        """
        try:
            found, unreadable = await asyncio.to_thread(directory.load, self.root)
        except OSError as error:
            raise disk.failure(error, f"open the snapshots in {self.root}") from error
        self._entries = {manifest.info.id: _Entry(manifest, used_at) for manifest, used_at in found}
        self._unreadable = {one.id: one for one in unreadable}
        for one in unreadable:
            log.warning("Snapshot %s cannot be used: %s", one.id, one.error.message)
        for manifest, _ in found:
            if not manifest.info.compressed and not directory.has_sums(self.root / manifest.info.id):
                self._summing.add(manifest.info.id)

    async def close(self) -> None:
        """End what runs in the background. Snapshots stay. Idempotent."""
        await self._summing.close()

    async def idle(self) -> None:
        """Wait until nothing runs in the background."""
        await self._summing.idle()

    # What is there

    @property
    def unreadable(self) -> Sequence[Unreadable]:
        """What is in the directory but cannot be used, with the reason."""
        return tuple(self._unreadable.values())

    @property
    def ids(self) -> frozenset[SnapshotId]:
        """Every id that the store has something of, drafts and the unreadable included; their images must stay."""
        return frozenset({*self._entries, *self._unreadable, *self._drafts})

    @property
    def used_bytes(self) -> int:
        """What images and layers take together, as far as they can be read."""
        return sum(lookup.size(entry.manifest.info) for entry in self._entries.values())

    def infos(
        self, *, sandbox_id: SandboxId | None = None, kernel_id: str | None = None, kind: Kind | None = None
    ) -> list[SnapshotInfo]:
        """Those of a sandbox or kernel (of all where neither is given), the newest first."""
        infos = (self._info(entry) for entry in self._entries.values() if not entry.doomed)
        return lookup.select(infos, sandbox_id=sandbox_id, kernel_id=kernel_id, kind=kind)

    def get(self, ref: str, *, sandbox_id: SandboxId | None = None, kernel_id: str | None = None) -> Manifest:
        """The snapshot of that id or name; a name is looked for within the sandbox or kernel, if one is given.

        Raises:
            SnapshotNotFoundError: There is none; the hint has names that are near.
            ConflictError: Snapshots of several kernels have this name, and none was given.
            SnapshotIncompatibleError: It is there, but another version or another user made it.
            SnapshotCorruptError: It is there, but broken.
        """
        return self._told(self._entries[self._find(ref, sandbox_id=sandbox_id, kernel_id=kernel_id)])

    def layer(self, snapshot_id: SnapshotId) -> Path:
        """Where its writable layer lies; only to be relied on within `use`."""
        return self.root / snapshot_id / LAYER

    # Making and using

    def draft(self, snapshot_id: SnapshotId, *, replace: bool = False) -> Draft:
        """Begin a snapshot: `async with store.draft(new_id()) as draft:`, or `await store.draft(...).begin()`.

        Args:
            snapshot_id: Of a snapshot that there is not yet; the engine's image has the same.
            replace: Where the same kernel has a snapshot of the same name, that one goes once this one is
                committed. Otherwise `commit` raises `ConflictError` for it.

        Raises:
            InvalidRequestError: That is no id.
        """
        if not directory.ID.fullmatch(snapshot_id):
            raise InvalidRequestError(
                f"{snapshot_id!r} is no snapshot id", hint="Twelve lower-case letters and digits."
            )
        return Draft(self.root, snapshot_id, shelf=self, replace=replace)

    def begun(self, draft: Draft) -> None:
        """A draft takes its id (called by `Draft`)."""
        if draft.id in self.ids:
            raise ConflictError(f"There is a snapshot {draft.id} already", hint="Use another id.")
        self._drafts[draft.id] = draft

    def claim(self, draft: Draft, manifest: Manifest) -> None:
        """A draft takes its name (called by `Draft`)."""
        info = manifest.info
        lookup.check_name(info.name)
        if not info.name:
            return
        claim = (lookup.scope(info), info.name)
        if claim in self._claims.values() or (self._namesakes(info) and not draft.replace):
            raise _taken(info.name)
        self._claims[draft.id] = claim

    async def committed(self, draft: Draft, manifest: Manifest, *, durable: bool) -> None:
        """A draft has become a snapshot (called by `Draft`)."""
        older = self._namesakes(manifest.info)
        self._entries[draft.id] = _Entry(manifest, self._clock())
        self.ended(draft)
        await self.touch(draft.id)
        if manifest.info.kind != "fork":
            self._summing.add(draft.id, sync=not durable)
        for one in older:
            await self._doom(one)

    def ended(self, draft: Draft) -> None:
        """A draft is none any more (called by `Draft`)."""
        self._claims.pop(draft.id, None)
        if self._drafts.get(draft.id) is draft:
            del self._drafts[draft.id]

    @contextlib.asynccontextmanager
    async def use(
        self, ref: str, *, sandbox_id: SandboxId | None = None, kernel_id: str | None = None
    ) -> AsyncIterator[Held]:
        """Hold a snapshot while a restore of it runs; whoever would remove it meanwhile gets a `ConflictError`.

        Its manifest and the listing of its layer are checked against their sums, and a layer that is not large (see
        `checks.QUICK_ENTRIES`) against its listing, so that nothing is restored of what is not as it was written. A
        compressed layer is made a directory again, and stays one.

        Raises:
            SnapshotNotFoundError: And the others of `get`.
            SnapshotCorruptError: Manifest or layer are not what was written; nothing was restored.
        """
        snapshot_id = self._find(ref, sandbox_id=sandbox_id, kernel_id=kernel_id)
        entry = self._entries[snapshot_id]
        entry.pins += 1
        try:
            async with entry.lock:
                await asyncio.to_thread(checks.quick, self.root / snapshot_id, entry.manifest)
            await self._form(entry, compressed=False)
            await self.touch(snapshot_id)
            yield Held(manifest=self._told(entry), layer=self.layer(snapshot_id))
        finally:
            entry.pins -= 1
            if entry.doomed and not entry.pins:
                await finish(self._remove(snapshot_id, entry))

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
            CapacityError: The disk is full; it has its name still.
        """
        lookup.check_name(name)
        entry = self._entries[self._find_id(snapshot_id)]
        wanted = dataclasses.replace(entry.manifest.info, name=name)
        claim = (lookup.scope(wanted), name)
        others = [one for one in self._namesakes(wanted) if one != snapshot_id]
        if name and (others or claim in self._claims.values()):
            raise _taken(name)
        await self._change(entry, dataclasses.replace(entry.manifest, info=wanted))
        return self._info(entry)

    async def amend(
        self,
        snapshot_id: SnapshotId,
        *,
        kind: Kind | None = None,
        image_bytes: int | None = None,
        memory_bytes: int | None = None,
        versions: Mapping[str, str] | None = None,
        phases_ms: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Change what its manifest says, where something is given; on the disk a moment later, as nobody need wait.

        Raises:
            SnapshotNotFoundError: There is none.
            CapacityError: The disk is full; it is as it was.
        """
        entry = self._entries[self._find_id(snapshot_id)]
        info = entry.manifest.info
        changed = dataclasses.replace(
            info,
            kind=info.kind if kind is None else kind,
            image_bytes=info.image_bytes if image_bytes is None else image_bytes,
            memory_bytes=info.memory_bytes if memory_bytes is None else memory_bytes,
            phases_ms=info.phases_ms if phases_ms is None else phases_ms,
        )
        manifest = dataclasses.replace(
            entry.manifest, info=changed, versions=entry.manifest.versions if versions is None else versions
        )
        await self._change(entry, manifest, durable=False)
        if changed.kind != "fork":
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
            CapacityError: The disk is full; as before.
        """
        entry = self._entries[self._find(snapshot_id)]
        _refuse_used(entry, "compress")
        with self._pinned(entry):
            await self._form(entry, compressed=True)
        return self._info(entry)

    # Removing

    async def discard(self, snapshot_id: SnapshotId) -> None:
        """Remove it as soon as nobody uses it; nobody finds it from now on. One that is gone is no error."""
        entry = self._entries.get(snapshot_id)
        if entry is not None and not entry.doomed:
            await finish(self._doom(snapshot_id))

    async def remove(self, snapshot_id: SnapshotId) -> None:
        """Remove it with its layer and its image; one that cannot be read as well.

        Raises:
            SnapshotNotFoundError: There is none.
            ConflictError: It is in use.
            SnapshotError: It could not be removed, and is as before.
        """
        if self._unreadable.pop(snapshot_id, None) is not None:
            await finish(self._discard(snapshot_id))
            return
        entry = self._entries[self._find_id(snapshot_id)]
        _refuse_used(entry, "remove")
        await finish(self._remove(snapshot_id, entry))

    async def expire(self) -> list[SnapshotId]:
        """Remove those whose time is over and that nobody uses; their ids."""
        now = self._clock()
        over = [
            info.id for info in self.infos() if lookup.is_expired(info, now=now, ttl_s=self.ttl_s) and self._free(info)
        ]
        return await self._remove_all(over)

    async def make_room(self, wanted_bytes: int) -> list[SnapshotId]:
        """See that `wanted_bytes` more stay within the quota; the ids of those that were removed for it.

        Raises:
            CapacityError: Removing all that may go would not be enough; nothing was removed.
        """
        if self.quota_bytes is None:
            return []
        spare = [info for info in self.infos() if self._free(info)]
        going = lookup.room(spare, used_bytes=self.used_bytes, wanted_bytes=wanted_bytes, quota_bytes=self.quota_bytes)
        return await self._remove_all(going)

    async def _remove_all(self, ids: list[SnapshotId]) -> list[SnapshotId]:
        removed = []
        for one in ids:
            entry = self._entries.get(one)
            if entry is not None and not entry.pins:
                await finish(self._remove(one, entry))
                removed.append(one)
        return removed

    async def _doom(self, snapshot_id: SnapshotId) -> None:
        """Remove one that was replaced, now or when it is no longer used."""
        entry = self._entries[snapshot_id]
        entry.doomed = True
        if not entry.pins:
            try:
                await self._remove(snapshot_id, entry)
            except WarmcellError as error:
                log.warning("Snapshot %s, which was replaced, could not be removed: %s", snapshot_id, error)

    async def _remove(self, snapshot_id: SnapshotId, entry: _Entry) -> None:
        if self._entries.pop(snapshot_id, None) is None:
            return  # Somebody else is at it.
        async with entry.lock:
            try:
                await self._discard(snapshot_id)
            except WarmcellError:
                self._entries[snapshot_id] = entry
                raise

    async def _discard(self, snapshot_id: SnapshotId) -> None:
        """Off the disk, and its image with it. Only the first step can fail."""
        gone = self.root / f".{snapshot_id}.gone"
        try:
            await asyncio.to_thread(directory.hide, self.root / snapshot_id, gone)
        except OSError as error:
            raise disk.failure(error, f"remove snapshot {snapshot_id}") from error
        if self.on_removed is not None:
            try:
                await self.on_removed(snapshot_id)
            except WarmcellError as error:  # An image without a manifest is dropped when the keeper next starts.
                log.warning("The image of snapshot %s could not be dropped: %s", snapshot_id, error)
        try:
            await asyncio.to_thread(disk.remove, gone)
        except OSError as error:  # It is hidden, and goes when the store is next opened.
            log.warning("Files of snapshot %s could not be removed: %s", snapshot_id, error)

    # Inside

    async def _change(self, entry: _Entry, manifest: Manifest, *, durable: bool = True) -> None:
        async def change() -> None:
            async with entry.lock:
                self._find_id(manifest.info.id)
                try:
                    at = self.root / manifest.info.id
                    await asyncio.to_thread(directory.rewrite, at, manifest, entry.used_at, durable=durable)
                except OSError as error:
                    raise disk.failure(error, f"change snapshot {manifest.info.id}") from error
                entry.manifest = manifest

        await finish(change())

    async def _form(self, entry: _Entry, *, compressed: bool) -> None:
        """Make the layer one file or a directory, if it is not."""

        async def change() -> None:
            async with entry.lock:
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

        await finish(change())

    @contextlib.contextmanager
    def _pinned(self, entry: _Entry) -> Iterator[None]:
        entry.pins += 1
        try:
            yield
        finally:
            entry.pins -= 1

    async def _keep_sums(self, snapshot_id: SnapshotId, sums: dict[str, str]) -> None:
        entry = self._entries.get(snapshot_id)
        if entry is not None:
            async with entry.lock:
                if not entry.manifest.info.compressed and self._entries.get(snapshot_id) is entry:
                    await asyncio.to_thread(contents.save, self.root / snapshot_id, sums)

    def _find(self, ref: str, *, sandbox_id: SandboxId | None = None, kernel_id: str | None = None) -> SnapshotId:
        try:
            return lookup.find(self.infos(), ref, sandbox_id=sandbox_id, kernel_id=kernel_id)
        except SnapshotNotFoundError:
            if ref in self._unreadable:
                raise from_json(self._unreadable[SnapshotId(ref)].error.to_json()) from None
            raise

    def _find_id(self, snapshot_id: SnapshotId) -> SnapshotId:
        entry = self._entries.get(snapshot_id)
        if entry is None or entry.doomed:
            raise SnapshotNotFoundError(
                f"There is no snapshot {snapshot_id!r}", hint="`warmcell snapshots ls` lists what there is."
            )
        return snapshot_id

    def _namesakes(self, info: SnapshotInfo) -> list[SnapshotId]:
        """Those of the same kernel that have its name already."""
        if not info.name:
            return []
        claim = (lookup.scope(info), info.name)
        return [one.id for one in self.infos() if (lookup.scope(one), one.name) == claim]

    def _free(self, info: SnapshotInfo) -> bool:
        return not self._entries[info.id].pins

    def _info(self, entry: _Entry) -> SnapshotInfo:
        return dataclasses.replace(entry.manifest.info, last_used_at=entry.used_at)

    def _told(self, entry: _Entry) -> Manifest:
        return dataclasses.replace(entry.manifest, info=self._info(entry))


def _refuse_used(entry: _Entry, verb: str) -> None:
    if entry.pins:
        raise ConflictError(
            f"Snapshot {entry.manifest.info.id} is in use",
            hint=f"A kernel that was restored from it has its files; {verb} it when that kernel has ended.",
        )


def _taken(name: str) -> ConflictError:
    return ConflictError(
        f"This kernel has a snapshot {name!r} already", hint="Use another name, or remove that snapshot first."
    )
