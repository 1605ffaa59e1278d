"""What is done to snapshots when nobody waits for it: put on the disk, and summed up, one at a time, in a thread."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots import contents, disk
from warmcell.sandbox.snapshots.draft import LAYER

log = logging.getLogger(__name__)

QUIET_S = 1.0
"""After a snapshot, before anything is done in the background."""

Keep = Callable[[SnapshotId, dict[str, str]], Awaitable[None]]


class Summing:
    """A queue of snapshots whose layers are to be put on the disk and summed up."""

    def __init__(self, root: Path, keep: Keep) -> None:
        """`keep` is awaited with each result."""
        self._root = root
        self._keep = keep
        self._waiting: dict[SnapshotId, bool] = {}
        self._task: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._hurry = asyncio.Event()

    def add(self, snapshot_id: SnapshotId, *, sync: bool = False) -> None:
        """Sum it up when those before it are done, and before that put it on the disk if `sync`."""
        self._waiting[snapshot_id] = sync
        if self._task is None or self._task.done():
            self._stop.clear()
            self._hurry.clear()
            self._task = asyncio.create_task(self._work())

    async def idle(self) -> None:
        """Wait until all are done, without waiting for quiet."""
        self._hurry.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def written(self) -> None:
        """Wait until all that is to be put on the disk is there."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Stop, in the middle of a layer if it must be; the machine puts on the disk what is not there. Idempotent."""
        self._waiting.clear()
        self._stop.set()
        await self.idle()

    async def _sync(self) -> None:
        """Put on the disk what is not there yet, all at once."""
        if any(self._waiting.values()):
            self._waiting = dict.fromkeys(self._waiting, False)
            await asyncio.to_thread(disk.sync_filesystem, self._root)

    async def _work(self) -> None:
        # Whoever has just taken a snapshot may be about to restore it: that should not have to share the disk.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUIET_S):
                await self._hurry.wait()
        while self._waiting:
            try:
                await self._sync()
            except OSError as error:
                log.warning("Snapshots could not be put on the disk: %s", error)
            snapshot_id = next(iter(self._waiting))
            del self._waiting[snapshot_id]
            layer = self._root / snapshot_id / LAYER
            if (self._root / snapshot_id / contents.SUMS).exists():
                continue
            try:
                sums = await asyncio.to_thread(contents.layer_sums, layer, stopped=self._stop.is_set)
                if sums is not None:
                    await self._keep(snapshot_id, sums)
            except FileNotFoundError:
                continue  # It was removed or compressed meanwhile.
            except OSError as error:
                log.warning("The files of snapshot %s could not be summed up: %s", snapshot_id, error)
