"""Snapshots that nobody has used for long, made smaller: their files by the store, their memory by the engine."""

from collections.abc import Awaitable, Callable

from warmcell.sandbox.models import SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots.archive import ImagePort
from warmcell.sandbox.snapshots.store import SnapshotStore

ENGINE = "criu"
"""Whose memory can be compressed; images of whole sandboxes stay as they are."""

PASSING = ("fork", "template")
"""Kinds that are not there to be kept: one is gone at once, the other is what starts are quick by."""


class Compressor:
    """Compresses snapshots of one store. What is used is expanded again by whoever uses it."""

    def __init__(
        self, store: SnapshotStore, images: ImagePort | None, *, remeasure: Callable[[], Awaitable[None]]
    ) -> None:
        """Nothing is done yet.

        Args:
            store: Whose.
            images: Where memory is; None: files alone are compressed.
            remeasure: Finds out what images take on the disk now.
        """
        self._store = store
        self._images = images
        self._remeasure = remeasure

    def cold(self, *, before: float) -> list[SnapshotId]:
        """Those of which something could be compressed, and that were last used before that Unix time.

        What is known to be damaged stays as it is: to find that out once more all of it would be read.
        """
        return [
            info.id
            for info in self._store.infos()
            if info.last_used_at <= before
            and info.kind not in PASSING
            and info.id not in self._store.damaged
            and self._is_large(info)
        ]

    async def compress(self, snapshot_id: SnapshotId, told: Callable[[int, int], None]) -> SnapshotInfo:
        """Compress it, files and memory; `told` is told how many bytes of how many are done. No effect if it is done.

        Raises:
            SnapshotNotFoundError: There is none.
            ConflictError: It is in use.
            SnapshotCorruptError: It is not what was written; what is not is left alone.
            StorageFullError: The disk is full; what is not done is as before.
        """
        if self._can(self._store.get(snapshot_id).info) and self._images is not None:
            await self._images.compress_image(snapshot_id, told)
            await self._remeasure()
        return await self._store.compress(snapshot_id)

    def _is_large(self, info: SnapshotInfo) -> bool:
        return self._can(info) and not info.image_compressed

    def _can(self, info: SnapshotInfo) -> bool:
        return self._images is not None and info.engine == ENGINE
