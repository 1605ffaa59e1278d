"""Whether snapshots are what was written, found by reading all of them.

A restore reads what it copies, and of the rest looks only at what the file system tells of it: its size and its times.
A bit that the disk has turned shows in neither.
"""

import time
from collections.abc import Callable

from warmcell.sandbox.errors import SnapshotCorruptError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.archive import NO_MEMORY, ImagePort
from warmcell.sandbox.snapshots.store import SnapshotStore


class Verifier:
    """Reads snapshots of one store; what is damaged the store knows from then on, and does not restore."""

    def __init__(
        self, store: SnapshotStore, images: ImagePort | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._images = images
        self._clock = clock
        self._read_at: dict[SnapshotId, float] = {}

    def next(self) -> SnapshotId | None:
        """The one that was not read for the longest time; None if there is none."""
        infos = [info for info in self._store.infos() if info.kind != "fork"]
        self._read_at = {info.id: self._read_at[info.id] for info in infos if info.id in self._read_at}
        oldest = sorted(infos, key=lambda info: (self._read_at.get(info.id, float("-inf")), info.created_at, info.id))
        return oldest[0].id if oldest else None

    async def verify(self, snapshot_id: SnapshotId) -> bool:
        """Read all of it; False where some sums are not known (yet): those of a new one are made in the background.

        Raises:
            SnapshotNotFoundError: There is none.
            SnapshotCorruptError: It is not what was written.
        """
        self._read_at[snapshot_id] = self._clock()
        try:
            complete = await self._store.verify(snapshot_id)
            if self._store.get(snapshot_id).info.engine != NO_MEMORY:
                complete = self._images is not None and await self._images.verify_image(snapshot_id) and complete
        except SnapshotCorruptError as error:
            self._store.damaged[snapshot_id] = error
            raise
        self._store.damaged.pop(snapshot_id, None)
        return complete
