"""What is done to snapshots when nobody waits for it: put on the disk, and summed up, one at a time, in a thread."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from warmcell.sandbox.errors import SnapshotError
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
        self._waiting: dict[SnapshotId, None] = {}
        self._unwritten: set[SnapshotId] = set()
        """What is to be put on the disk."""
        self._doubtful: set[SnapshotId] = set()
        """What was to be put there when that failed: Linux says so once, and may have dropped what it had to write."""
        self._task: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._hurry = asyncio.Event()

    def add(self, snapshot_id: SnapshotId, *, sync: bool = False) -> None:
        """Sum it up when those before it are done, and before that put it on the disk if `sync`."""
        self._waiting[snapshot_id] = None
        if sync:
            self._unwritten.add(snapshot_id)
        if self._task is None or self._task.done():
            self._stop.clear()
            self._hurry.clear()
            self._task = asyncio.create_task(self._work())

    async def idle(self) -> None:
        """Wait until all are done, without waiting for quiet."""
        self._hurry.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def written(self, snapshot_id: SnapshotId) -> None:
        """Wait until a snapshot is on the disk.

        Raises:
            SnapshotError: It cannot be known whether it is.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
        if snapshot_id in self._unwritten | self._doubtful:
            raise SnapshotError(
                f"It is not known whether snapshot {snapshot_id} is on the disk",
                hint="Look after the disk of the state directory; keeper.log says what it complained about.",
            )

    async def close(self) -> None:
        """Stop, in the middle of a layer if it must be; the machine puts on the disk what is not there. Idempotent."""
        self._waiting.clear()
        self._stop.set()
        await self.idle()

    async def _sync(self) -> None:
        """Put on the disk what is not there yet, all at once."""
        if not self._unwritten:
            return
        written = frozenset(self._unwritten)
        try:
            await asyncio.to_thread(disk.sync_filesystem, self._root)
        except OSError as error:
            log.error("Snapshots could not be put on the disk: %s", error)
            self._doubtful |= written
        self._unwritten -= written

    async def _work(self) -> None:
        # Whoever has just taken a snapshot may be about to restore it: that should not have to share the disk.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUIET_S):
                await self._hurry.wait()
        while self._waiting:
            await self._sync()
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
