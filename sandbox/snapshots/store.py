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
import logging
import secrets
import string
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.errors import ConflictError, InvalidRequestError, from_json
from warmcell.sandbox.models import SandboxId, SnapshotId
from warmcell.sandbox.snapshots import checks, directory, disk, lookup
from warmcell.sandbox.snapshots.changing import Changing, taken
from warmcell.sandbox.snapshots.draft import Draft, finish
from warmcell.sandbox.snapshots.known import Entry
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.snapshots.removing import Removing

log = logging.getLogger(__name__)

SOUND_S = 1.0
"""For how long what was found of a snapshot's files holds for others who come meanwhile."""


def new_id() -> SnapshotId:
    """A fresh snapshot id: twelve lower-case letters and digits."""
    return SnapshotId("".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A snapshot that stays for as long as it is in use."""

    manifest: Manifest
    layer: Path
    """The writable layer; to be copied from, never changed."""


class SnapshotStore(Removing, Changing):
    """The snapshots below `root`. Call `open` first."""

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
        self._entries = {manifest.info.id: Entry(manifest, used_at) for manifest, used_at in found}
        self._unreadable = {one.id: one for one in unreadable}
        for one in unreadable:
            log.warning("Snapshot %s cannot be used: %s", one.id, one.error.message)
        for manifest, _ in found:
            if not manifest.info.compressed and not directory.has_sums(self.root / manifest.info.id):
                self._summing.add(manifest.info.id)

    async def close(self) -> None:
        """End what runs in the background. Snapshots stay. Idempotent."""
        await self._summing.close()
        await self.all_gone()

    def draft(self, snapshot_id: SnapshotId) -> Draft:
        """Begin a snapshot: `async with store.draft(new_id()) as draft:`, or `await store.draft(...).begin()`.

        Args:
            snapshot_id: Of a snapshot that there is not yet; the engine's image has the same.

        Raises:
            InvalidRequestError: That is no id.
        """
        if not directory.ID.fullmatch(snapshot_id):
            raise InvalidRequestError(
                f"{snapshot_id!r} is no snapshot id", hint="Twelve lower-case letters and digits."
            )
        return Draft(self.root, snapshot_id, shelf=self)

    def begun(self, draft: Draft) -> None:
        """A draft takes its id (called by `Draft`)."""
        if self.is_taken(draft.id):
            raise ConflictError(f"There is a snapshot {draft.id} already", hint="Use another id.")
        self._drafts[draft.id] = draft

    def check_free(self, name: str, *, kernel_id: str | None, sandbox_id: SandboxId) -> None:
        """See, before anything is stopped for a snapshot, that it may have that name.

        Raises:
            InvalidRequestError: That is no name.
            ConflictError: Another one of the same kernel, or sandbox without one, has it.
        """
        lookup.check_name(name)
        scope = self.infos(kernel_id=kernel_id) if kernel_id else self.infos(sandbox_id=sandbox_id)
        if name and any(one.name == name for one in scope):
            raise taken(name)

    def claim(self, draft: Draft, manifest: Manifest) -> None:
        """A draft takes its name (called by `Draft`)."""
        info = manifest.info
        lookup.check_name(info.name)
        if not info.name:
            return
        claim = (lookup.scope(info), info.name)
        if claim in self._claims.values() or self._namesakes(info):
            raise taken(info.name)
        self._claims[draft.id] = claim

    async def committed(self, draft: Draft, manifest: Manifest, *, durable: bool) -> None:
        """A draft has become a snapshot (called by `Draft`)."""
        self._entries[draft.id] = Entry(manifest, self._clock())
        self.ended(draft)
        await self.touch(draft.id)
        if manifest.info.kind != "fork":
            self._summing.add(draft.id, sync=not durable)

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
        compressed layer is made a directory again, and stays one. What was found so a moment ago for another, who holds
        it still, is not looked at again: the clones of a fork all come at once.

        Raises:
            SnapshotNotFoundError: And the others of `get`.
            SnapshotCorruptError: It is not what was written, or was found not to be; nothing was restored.
        """
        snapshot_id = self._find(ref, sandbox_id=sandbox_id, kernel_id=kernel_id)
        entry = self._entries[snapshot_id]
        if snapshot_id in self.damaged:
            raise from_json(self.damaged[snapshot_id].to_json())
        entry.pins += 1
        try:
            async with entry.lock:
                if time.monotonic() > entry.sound_at + SOUND_S:
                    await asyncio.to_thread(checks.quick, self.root / snapshot_id, entry.manifest)
                    await finish(self._make_form(entry, compressed=False))
                    await self.touch(snapshot_id)
                    entry.sound_at = time.monotonic()
            yield Held(manifest=self._told(entry), layer=self.layer(snapshot_id))
        finally:
            entry.unpin()
            if entry.doomed and not entry.pins:
                await finish(self._remove(snapshot_id, entry))
