"""A whole snapshot as one file, to be kept elsewhere or taken to another machine.

It is a tar stream in one zstd frame. Its members, in this order: `warmcell.json` (the archive's format),
`manifest.json`, `layer/…`, `image/NNNNNNNN` (pieces of what the engine gives, where the memory is in it) and
`end.json`, without which it is not whole.
"""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

from warmcell.sandbox.errors import SnapshotIncompatibleError, UnsupportedOperationError, WarmcellError
from warmcell.sandbox.models import SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots import disk, streams
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.manifest import Manifest, corrupt
from warmcell.sandbox.snapshots.store import SnapshotStore, new_id
from warmcell.sandbox.snapshots.tarball import END, Unpacker, header, pack, padding

FORMAT = 1
NO_MEMORY = "none"
"""The engine of a snapshot that has a layer but no memory."""

_FIRST, _MANIFEST, _LAYER, _IMAGE, _LAST = "warmcell.json", "manifest.json", "layer/", "image/", "end.json"
_SMALL = 16 * 2**20
_PIECE = 4 * 2**20
_ROOM = 64 * 2**20
"""Made at once where an archive holds more than it says."""


class ImagePort(Protocol):
    """What an engine has whose images can be taken out and brought in."""

    def export_image(self, image: SnapshotId) -> AsyncGenerator[bytes, None]:
        """The image as a stream.

        Raises:
            SnapshotNotFoundError: There is none.
        """

    async def import_image(self, image: SnapshotId, data: AsyncIterator[bytes]) -> int:
        """Make an image of a stream, checked as input that nobody vouches for; none is left where that fails.

        Returns:
            What it takes on the disk, in bytes.

        Raises:
            SnapshotCorruptError: It is no image.
            SnapshotIncompatibleError: It is of a machine that is not like this one.
            StorageFullError: The disk is full.
        """

    async def compress_image(self, image: SnapshotId, told: Callable[[int, int], None]) -> None:
        """Compress its memory, until it is used again; `told` is told how many bytes of how many are done.

        Raises:
            SnapshotNotFoundError: There is none.
            SnapshotCorruptError: It is not what was written; it is left alone.
            ConflictError: It is in use, or so new that it is not on the disk yet.
            StorageFullError: The disk is full; as before.
        """

    async def verify_image(self, image: SnapshotId) -> bool:
        """Read all of an image and compare it with its sums; False where some are not known yet.

        Raises:
            SnapshotNotFoundError: There is none.
            SnapshotCorruptError: It is not what was written.
        """


async def export_snapshot(store: SnapshotStore, ref: str, *, images: ImagePort | None) -> AsyncGenerator[bytes, None]:
    """The archive of a snapshot, piece by piece; the snapshot is in use meanwhile.

    Args:
        store: Where it is.
        ref: Its id, or its name.
        images: Where its memory is. None: the archive is without the memory, as a look at its files.

    Raises:
        SnapshotNotFoundError: There is none.
        SnapshotCorruptError: It is not what was written.
    """
    async with store.use(ref) as held:
        info = held.manifest.info
        frame = streams.Frame()
        plain = _beginning(held.manifest, held.layer)
        while (piece := await asyncio.to_thread(frame.take, plain)) is not None:
            yield piece
        count = 0
        if images is not None and info.engine != NO_MEMORY:
            async with contextlib.aclosing(images.export_image(info.id)) as image:
                async for data in image:
                    for at in range(0, len(data), _PIECE):
                        member = _member(f"{_IMAGE}{count:08}", data[at : at + _PIECE])
                        yield await asyncio.to_thread(frame.put, member)
                        count += 1
        yield await asyncio.to_thread(frame.end, _member(_LAST, _json({"image_pieces": count})) + END)


async def import_snapshot(
    store: SnapshotStore, file: Path, *, images: ImagePort | None, name: str = ""
) -> SnapshotInfo:
    """Make a snapshot of an archive. It is of no sandbox and no kernel, and a named one whatever it was.

    Its spec and its mounts are as they were where it came from: whoever restores it must hold them against this
    machine's bounds.

    Args:
        store: Where it goes.
        file: The archive.
        images: Where its memory goes.
        name: What it is called here; empty: as it was.

    Raises:
        SnapshotCorruptError: The archive is not whole, or not what was written; nothing is left of it.
        SnapshotIncompatibleError: Another version of Warmcell wrote it.
        UnsupportedOperationError: It has memory in it, and `images` is None.
        CapacityError: It does not fit into the quota or on the disk.
        ConflictError: Another imported snapshot has its name.
    """
    with contextlib.ExitStack() as open_files:
        reader = _Reader(open_files)
        manifest = await asyncio.to_thread(reader.begin, file)
        info = manifest.info
        room = _Room(store)
        await room.make(info.image_bytes + info.layer_bytes)
        snapshot_id = new_id() if store.is_taken(info.id) else info.id
        async with store.draft(snapshot_id) as draft:
            try:
                await asyncio.to_thread(reader.layer, draft.layer, room)
                if reader.has_image:
                    if images is None:
                        raise UnsupportedOperationError(
                            "The archive has a kernel's memory in it, which cannot be brought in here",
                            hint="Export it again with `--files-only`, or use an engine that can import.",
                        )
                    image_bytes = await images.import_image(snapshot_id, reader.image(room))
                    info = dataclasses.replace(info, image_bytes=image_bytes)
                await asyncio.to_thread(reader.end)
                told = dataclasses.replace(
                    info,
                    id=snapshot_id,
                    name=name or info.name,
                    kind="named",
                    principal=None,
                    sandbox_id=None,
                    kernel_id=None,
                    parent=None,
                    expires_at=None,
                )
                if not reader.had_image:
                    told = dataclasses.replace(told, engine=NO_MEMORY, image_bytes=0, memory_bytes=0)
                written = await draft.commit(dataclasses.replace(manifest, info=told))
            except BaseException as error:
                if reader.had_image and store.on_removed is not None:
                    await store.on_removed(snapshot_id)
                if isinstance(error, OSError) and not isinstance(error, WarmcellError):
                    raise disk.failure(error, "import the snapshot") from error
                raise
        return written.info


class _Room:
    """Room in the store for what comes out of an archive, which may be more than the archive says."""

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._made = 0
        self._taken = 0

    async def make(self, more_bytes: int) -> None:
        """Have that much more; raises `CapacityError` where there is none."""
        self._made += more_bytes
        await self._store.make_room(self._made)

    async def take(self, count: int) -> None:
        """So many bytes are about to be written; raises as `make`."""
        self._taken += count
        if self._taken > self._made:
            await self.make(self._taken - self._made + _ROOM)

    def take_now(self, count: int) -> None:
        """The same for other threads."""
        asyncio.run_coroutine_threadsafe(self.take(count), self._loop).result()


class _Reader:
    """The members of an archive, in their order."""

    def __init__(self, open_files: contextlib.ExitStack) -> None:
        self._open = open_files
        self._members: Iterator[streams.Member] = iter(())
        self._next: streams.Member | None = None
        self._pieces = 0

    @property
    def has_image(self) -> bool:
        """Whether pieces of memory come next."""
        return self._next is not None and self._next[0].name.startswith(_IMAGE)

    @property
    def had_image(self) -> bool:
        """Whether there was memory in what has been read."""
        return self._pieces > 0

    def begin(self, path: Path) -> Manifest:
        """Read up to the manifest."""
        try:
            data = path.open("rb")
        except OSError as error:
            raise disk.failure(error, f"open {path}") from error
        file = self._open.enter_context(data)
        self._members = self._open.enter_context(streams.members(file))
        self._advance()
        found = _object(self._small(_FIRST), "archive")
        if found != FORMAT:
            raise SnapshotIncompatibleError(
                f"The archive has format {found}, this version of Warmcell reads {FORMAT}",
                hint="Use the version of Warmcell that made it.",
                details={"what": "format", "expected": FORMAT, "found": found},
            )
        return manifests.decode(self._small(_MANIFEST), where="the archive's manifest")

    def layer(self, layer: Path, room: _Room) -> None:
        """Make the layer."""
        unpacker = Unpacker(layer, ours=False)
        while self._next is not None and self._next[0].name.startswith(_LAYER):
            member, content = self._next
            room.take_now(member.size)
            unpacker.put(member.name.removeprefix(_LAYER), member, content)
            self._advance()
        unpacker.finish()

    async def image(self, room: _Room) -> AsyncIterator[bytes]:
        """The pieces of the memory."""
        while self.has_image:
            piece = await asyncio.to_thread(self._piece)
            await room.take(len(piece))
            yield piece

    def end(self) -> None:
        """See that it is whole."""
        if _object(self._small(_LAST), "image_pieces") != self._pieces or self._next is not None:
            raise corrupt("The archive is not whole")
        self._open.close()

    def _piece(self) -> bytes:
        data = self._small(f"{_IMAGE}{self._pieces:08}")
        self._pieces += 1
        return data

    def _small(self, name: str) -> bytes:
        """The content of the next member, which must be of that name."""
        if self._next is None or self._next[0].name != name or self._next[1] is None:
            raise corrupt(f"The archive lacks {name}")
        member, content = self._next
        if member.size > _SMALL or content is None:
            raise corrupt(f"The archive has a {name} that is too large")
        with streams.reading():
            data = content.read()
        if len(data) != member.size:
            raise corrupt(f"The archive ends within {name}")
        self._advance()
        return data

    def _advance(self) -> None:
        with streams.reading():
            self._next = next(self._members, None)


def _beginning(manifest: Manifest, layer: Path) -> Iterator[bytes]:
    yield _member(_FIRST, _json({"archive": FORMAT}))
    yield _member(_MANIFEST, manifests.encode(manifest))
    yield from pack(layer, _LAYER)


def _member(name: str, data: bytes) -> bytes:
    return b"".join((header(name, len(data)), data, padding(len(data))))


def _json(what: dict[str, int]) -> bytes:
    return json.dumps(what).encode("ascii")


def _object(data: bytes, key: str) -> object:
    try:
        found: object = json.loads(data)[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise corrupt("The archive cannot be read") from error
    return found
