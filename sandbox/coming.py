"""A snapshot in the making: its files are there long before its memory is, for sandboxes that begin with both."""

import asyncio
import os
from pathlib import Path

from warmcell.sandbox.models import SnapshotId


class Coming:
    """Told of by whoever saves, waited for by whoever is to go on from it. On one loop; to be closed."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.stale = False
        """Whether its files are saved once more, so that sandboxes with the first ones are of no use, or fail."""
        self._layer: asyncio.Future[Path | None] = loop.create_future()
        self._snapshot: asyncio.Future[SnapshotId] = loop.create_future()
        self._fd = -1

    @property
    def has_files(self) -> bool:
        """Whether they are saved already."""
        return self._layer.done()

    async def layer(self) -> Path | None:
        """Its files, by a name that stays while they move; None if they come with its memory only."""
        return await asyncio.shield(self._layer)

    async def snapshot(self) -> SnapshotId:
        """Wait until all of it is there."""
        return await asyncio.shield(self._snapshot)

    @property
    def made(self) -> SnapshotId | None:
        """The snapshot, if all of it is there."""
        return self._snapshot.result() if self._snapshot.done() and not self._snapshot.cancelled() else None

    def files_go(self) -> None:
        """They are about to be removed, if there are any, and saved anew."""
        self.stale = self._layer.done()

    def files_are(self, layer: Path) -> None:
        """They are saved, and nothing of the kernel runs. Of use to nobody if they were there before."""
        if self.stale:
            return
        self._fd = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._layer.set_result(Path(f"/proc/{os.getpid()}/fd/{self._fd}"))

    def is_there(self, snapshot: SnapshotId) -> None:
        """All of it is."""
        if not self._layer.done():
            self._layer.set_result(None)
        self._snapshot.set_result(snapshot)

    def close(self) -> None:
        """Nobody waits any more. Idempotent."""
        self._layer.cancel()
        self._snapshot.cancel()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
