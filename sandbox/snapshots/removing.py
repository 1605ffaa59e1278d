"""How snapshots go: by name, by age, for room, or when the last who uses them has let go of them.

A snapshot is gone with one rename. To take its gigabytes off the disk takes a while, for which only those wait who have
asked for the room: a kernel that is saved does not wait for the end of what it was saved as before.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots import directory, disk, lookup
from warmcell.sandbox.snapshots.draft import finish
from warmcell.sandbox.snapshots.known import Entry, Known

log = logging.getLogger(__name__)


class Removing(Known):
    """Takes snapshots off the disk, and their images with them."""

    async def discard(self, snapshot_id: SnapshotId) -> None:
        """Remove it as soon as nobody uses it; nobody finds it from now on. One that is gone is no error.

        Its room is free a while later.
        """
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
            await finish(self._remove_unreadable(snapshot_id))
            return
        entry = self._entries[self._find_id(snapshot_id)]
        entry.refuse_used("remove")
        await finish(self._remove(snapshot_id, entry, wait=True))

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
            CapacityError: Removing all that may go would not be enough.
        """
        removed: list[SnapshotId] = []
        while self.quota_bytes is not None:
            if self.remeasure is not None:  # What one has shared is on the disk until the last of them has gone.
                with contextlib.suppress(WarmcellError):
                    await self.remeasure()
            going = lookup.room(
                [info for info in self.infos() if self._free(info)],
                used_bytes=self.used_bytes,
                wanted_bytes=wanted_bytes,
                quota_bytes=self.quota_bytes,
                shared=self.shared,
            )
            gone = await self._remove_all(going)
            removed += gone
            if not gone:
                await self._until_free(self.quota_bytes - self.used_bytes - wanted_bytes)
                break
        return removed

    async def _until_free(self, spare_bytes: int) -> None:
        """Wait until what is leaving takes no more than that."""
        while self._removals and sum(self._leaving.values()) > spare_bytes:
            await asyncio.wait(self._removals, return_when=asyncio.FIRST_COMPLETED)

    async def _remove_all(self, ids: list[SnapshotId]) -> list[SnapshotId]:
        removed = []
        for one in ids:
            entry = self._entries.get(one)
            if entry is not None and not entry.pins:
                await finish(self._remove(one, entry, wait=True))
                removed.append(one)
        return removed

    async def _doom(self, snapshot_id: SnapshotId) -> None:
        """Remove one that nobody needs, now or when it is no longer used."""
        entry = self._entries[snapshot_id]
        entry.doomed = True
        if not entry.pins:
            try:
                await self._remove(snapshot_id, entry)
            except WarmcellError as error:
                log.warning("Snapshot %s, which nobody needs, could not be removed: %s", snapshot_id, error)

    async def _remove(self, snapshot_id: SnapshotId, entry: Entry, *, wait: bool = False) -> None:
        """Nobody finds it any more when this is done; with `wait` its room is free as well."""
        if self._entries.pop(snapshot_id, None) is None:
            return  # Somebody else is at it.
        async with entry.lock:
            try:
                rest = await self._leave(snapshot_id, lookup.size(entry.manifest.info, self.shared))
            except WarmcellError:
                self._entries[snapshot_id] = entry
                raise
            self.damaged.pop(snapshot_id, None)
        if wait:
            await rest

    async def _remove_unreadable(self, snapshot_id: SnapshotId) -> None:
        await (await self._leave(snapshot_id, 0))

    async def _leave(self, snapshot_id: SnapshotId, size_bytes: int) -> "asyncio.Task[None]":
        """It is none any more when this is done; what takes the rest of it away. Nothing new has its id until then."""
        self._leaving[snapshot_id] = size_bytes
        try:
            gone = await self._hide(snapshot_id)
        except BaseException:
            del self._leaving[snapshot_id]
            raise
        rest = asyncio.create_task(self._take_away(snapshot_id, gone))
        self._removals.add(rest)
        rest.add_done_callback(lambda done: self._left(done, snapshot_id))
        return rest

    def _left(self, removal: "asyncio.Task[None]", snapshot_id: SnapshotId) -> None:
        self._removals.discard(removal)
        del self._leaving[snapshot_id]

    async def all_gone(self) -> None:
        """Wait until the room of all that was removed is free."""
        while self._removals:
            await asyncio.wait(self._removals)

    async def _hide(self, snapshot_id: SnapshotId) -> Path:
        """It is none any more, also after a crash: where its files are now. All that can fail of a removal."""
        gone = self.root / f".{snapshot_id}.gone"
        try:
            await asyncio.to_thread(directory.hide, self.root / snapshot_id, gone)
        except OSError as error:
            raise disk.failure(error, f"remove snapshot {snapshot_id}") from error
        return gone

    async def _take_away(self, snapshot_id: SnapshotId, gone: Path) -> None:
        """Its image, and its files. What of them stays goes when a keeper next starts."""
        if self.on_removed is not None:
            try:
                await self.on_removed(snapshot_id)
            except WarmcellError as error:
                log.warning("The image of snapshot %s could not be dropped: %s", snapshot_id, error)
        try:
            await asyncio.to_thread(disk.remove, gone)
        except OSError as error:
            log.warning("Files of snapshot %s could not be removed: %s", snapshot_id, error)
