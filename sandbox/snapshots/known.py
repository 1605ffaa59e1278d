"""What a store knows of its snapshots, without a look at any file: which there are, and which one somebody means."""

import asyncio
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from warmcell.sandbox.errors import ConflictError, SnapshotCorruptError, SnapshotNotFoundError, from_json
from warmcell.sandbox.models import SandboxId, SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots import lookup
from warmcell.sandbox.snapshots.directory import Unreadable
from warmcell.sandbox.snapshots.draft import LAYER, Draft
from warmcell.sandbox.snapshots.lookup import Kind
from warmcell.sandbox.snapshots.manifest import Manifest

OnRemoved = Callable[[SnapshotId], Awaitable[None]]


@dataclass(slots=True)
class Entry:
    """One snapshot."""

    manifest: Manifest
    used_at: float
    pins: int = 0
    doomed: bool = False
    """To be removed when the last pin goes; nobody finds it any more."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    sound_at: float = -math.inf
    """When its files were found to be as they were written, with the layer as a directory, on the monotonic clock; of
    no meaning where nobody has held it since."""

    def unpin(self) -> None:
        """One who held it does so no more."""
        self.pins -= 1
        if not self.pins:
            self.sound_at = -math.inf

    def refuse_used(self, verb: str) -> None:
        """Raise `ConflictError` if somebody uses it."""
        if self.pins:
            raise ConflictError(
                f"Snapshot {self.manifest.info.id} is in use",
                hint=f"A kernel that was restored from it has its files; {verb} it when that kernel has ended.",
            )


class Known:
    """The snapshots below `root`."""

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
        self.remeasure: Callable[[], Awaitable[None]] | None = None
        """Awaited when it matters what images take, to have `shared` and their sizes as they are now."""
        self.shared: dict[SnapshotId, int] = {}
        """Of each snapshot its part of the memory that it has in common with others, in bytes."""
        self.damaged: dict[SnapshotId, SnapshotCorruptError] = {}
        """Those that were read whole and are not what was written; see `Verifier`."""
        self._clock = clock
        self._entries: dict[SnapshotId, Entry] = {}
        self._unreadable: dict[SnapshotId, Unreadable] = {}
        self._drafts: dict[SnapshotId, Draft] = {}
        self._claims: dict[SnapshotId, tuple[str, str]] = {}
        self._leaving: dict[SnapshotId, int] = {}
        """What nobody finds any more, and what it takes on the disk until it is gone, as far as that is known."""
        self._removals: set[asyncio.Task[None]] = set()

    @property
    def unreadable(self) -> Sequence[Unreadable]:
        """What is in the directory but cannot be used, with the reason."""
        return tuple(self._unreadable.values())

    @property
    def ids(self) -> frozenset[SnapshotId]:
        """Every id that the store has something of, drafts and the unreadable included; their images must stay."""
        return frozenset({*self._entries, *self._unreadable, *self._drafts})

    def is_taken(self, snapshot_id: SnapshotId) -> bool:
        """Whether a new one cannot have that id: with one that is leaving its image goes, whoever has it by then."""
        return snapshot_id in self.ids or snapshot_id in self._leaving

    @property
    def used_bytes(self) -> int:
        """What images and layers take together, as far as they can be read; what several share counts once."""
        return sum(lookup.size(entry.manifest.info, self.shared) for entry in self._entries.values())

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

    def _info(self, entry: Entry) -> SnapshotInfo:
        return dataclasses.replace(entry.manifest.info, last_used_at=entry.used_at)

    def _told(self, entry: Entry) -> Manifest:
        return dataclasses.replace(entry.manifest, info=self._info(entry))
