"""What is done with snapshots while nobody asks for anything.

Those whose time is over go, cold ones get smaller, and one after the other is read to see whether it is whole.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from warmcell.sandbox.errors import ConflictError, SnapshotCorruptError, WarmcellError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.compressing import Compressor
from warmcell.sandbox.snapshots.store import SnapshotStore
from warmcell.sandbox.snapshots.verifying import Verifier

log = logging.getLogger(__name__)

EVERY_S = 600.0
FIRST_S = 60.0
"""After the keeper has come up: there is more urgent work at first."""

LEAST_BYTES = 1 << 20
"""A layer that takes less is left alone."""


class Upkeep:
    """Looks after one store."""

    def __init__(
        self,
        store: SnapshotStore,
        *,
        compress_after_s: float | None,
        remeasure: Callable[[], Awaitable[None]] | None = None,
        verifier: Verifier | None = None,
        compressor: Compressor | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is done yet.

        Args:
            store: Whose snapshots.
            compress_after_s: Seconds after its last use at which a snapshot's files are compressed. None: never.
            remeasure: Finds out what images take on the disk now.
            verifier: Reads one snapshot in each round, so that what the disk has damaged is found before it is missed.
            compressor: Compresses memory as well, of the same snapshots; None: files alone are compressed.
            clock: As the store's: Unix time in seconds.
        """
        self._store = store
        self._compress_after_s = compress_after_s
        self._remeasure = remeasure
        self._verifier = verifier
        self._compressor = compressor
        self._clock = clock

    async def run(self) -> None:
        """For ever."""
        await asyncio.sleep(FIRST_S)
        while True:
            await self.once()
            await asyncio.sleep(EVERY_S)

    async def once(self) -> None:
        """Look through all of them. What fails is logged; the others are looked at in any case."""
        try:
            for gone in await self._store.expire():
                log.info("snapshot %s went: its time was over", gone)
            if self._remeasure is not None:
                await self._remeasure()
        except WarmcellError as error:
            log.warning("snapshots cannot be looked after: %s", error)
        await self._compress_memory()
        for snapshot in self._cold():
            try:
                made = await self._store.compress(snapshot)
                log.info("the files of snapshot %s were compressed to %d bytes", snapshot, made.layer_bytes)
            except WarmcellError as error:
                log.warning("snapshot %s was not compressed: %s", snapshot, error)

        await self._verify_one()

    async def _compress_memory(self) -> None:
        if self._compressor is None or self._compress_after_s is None:
            return
        for snapshot in self._compressor.cold(before=self._clock() - self._compress_after_s):
            try:
                made = await self._compressor.compress(snapshot, lambda done, of: None)
                log.info("the memory of snapshot %s was compressed to %d bytes", snapshot, made.image_bytes)
            except ConflictError as error:  # A kernel that came from it runs.
                log.debug("the memory of snapshot %s was not compressed: %s", snapshot, error)
            except WarmcellError as error:
                log.warning("the memory of snapshot %s was not compressed: %s", snapshot, error)

    async def _verify_one(self) -> None:
        snapshot = None if self._verifier is None else self._verifier.next()
        if self._verifier is None or snapshot is None:
            return
        try:
            await self._verifier.verify(snapshot)
        except SnapshotCorruptError as error:
            log.error("snapshot %s is damaged: %s", snapshot, error)
        except WarmcellError as error:
            log.debug("snapshot %s was not read: %s", snapshot, error)

    def _cold(self) -> list[SnapshotId]:
        if self._compress_after_s is None:
            return []
        since = self._clock() - self._compress_after_s
        infos = self._store.infos()
        return [
            info.id
            for info in infos
            if info.last_used_at <= since
            and not info.compressed
            and info.layer_bytes >= LEAST_BYTES
            and info.id not in self._store.damaged
        ]
