"""A snapshot goes into one file and comes out of it as it was, or not at all."""

import asyncio
import dataclasses
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import zstandard
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from tests.unit.sandbox.snapshots.making import add, hostile, manifest
from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    SnapshotCorruptError,
    SnapshotIncompatibleError,
    SnapshotNotFoundError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots import listing, tarball
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.archive import NO_MEMORY, export_snapshot, import_snapshot
from warmcell.sandbox.snapshots.store import SnapshotStore, new_id
from warmcell.sandbox.snapshots.streams import compressed

MEMORY = os.urandom(300_000) + bytes(9 * 2**20)


class Images:
    """An engine's images as plain bytes."""

    def __init__(self, **known: bytes) -> None:
        self.known = dict(known)

    async def export_image(self, image: SnapshotId) -> AsyncGenerator[bytes, None]:
        for at in range(0, len(self.known[image]), 2**20):
            yield self.known[image][at : at + 2**20]

    async def import_image(self, image: SnapshotId, data: AsyncIterator[bytes]) -> int:
        self.known[image] = b"".join([piece async for piece in data])
        return len(self.known[image])

    async def compress_image(self, image: SnapshotId, told: Callable[[int, int], None]) -> None:
        told(len(self.known[image]), len(self.known[image]))

    async def verify_image(self, image: SnapshotId) -> bool:
        return image in self.known


async def exported(store: SnapshotStore, ref: str, path: Path, images: Images | None) -> Path:
    with path.open("wb") as file:
        async for piece in export_snapshot(store, ref, images=images):
            file.write(piece)
    return path


@pytest.fixture
async def snapshot_id(store: SnapshotStore) -> SnapshotId:
    async with store.draft(new_id()) as draft:
        hostile(draft.layer)
        if os.getuid() == 0:
            os.mknod(draft.layer / "removed", 0o20000, 0)
        await draft.commit(manifest("one", kind="suspended", principal="robot", image_bytes=len(MEMORY)))
    return draft.id


@pytest.fixture
async def elsewhere(tmp_path: Path) -> SnapshotStore:
    made = SnapshotStore(tmp_path / "elsewhere")
    await made.open()
    return made


async def test_it_comes_out_as_it_was(
    store: SnapshotStore, snapshot_id: SnapshotId, elsewhere: SnapshotStore, tmp_path: Path
) -> None:
    """Memory, every entry of the layer and the manifest; it is of no kernel there, and is checked like any other."""
    path = await exported(store, "one", tmp_path / "file", Images(**{snapshot_id: MEMORY}))
    assert path.stat().st_size < 2 * 2**20
    images = Images()
    info = await import_snapshot(elsewhere, path, images=images)
    assert images.known == {info.id: MEMORY}
    assert listing.scan(elsewhere.layer(info.id)).lines == listing.scan(store.layer(snapshot_id)).lines
    assert (info.id, info.name, info.kind, info.kernel_id) == (snapshot_id, "one", "named", None)
    assert info.principal is None  # Whoever brings it in has it, not who has that name here.
    assert elsewhere.get("one").kernel == {"key": "secret"}
    async with elsewhere.use("one"):
        pass
    await elsewhere.idle()
    assert await elsewhere.verify(info.id) is True
    with pytest.raises(ConflictError):
        await import_snapshot(elsewhere, path, images=images)
    again = await import_snapshot(elsewhere, path, images=images, name="two")
    assert again.id != snapshot_id


async def test_it_is_another_one_than_one_that_is_leaving(
    store: SnapshotStore, snapshot_id: SnapshotId, tmp_path: Path
) -> None:
    """Whose image goes a while after its name: what comes back meanwhile has an id, and so an image, of its own."""
    images = Images(**{snapshot_id: MEMORY})
    path = await exported(store, "one", tmp_path / "file", images)
    go, began = asyncio.Event(), asyncio.Event()

    async def drop(image: SnapshotId) -> None:
        began.set()
        await go.wait()
        del images.known[image]

    store.on_removed = drop
    await store.discard(snapshot_id)
    await began.wait()
    info = await import_snapshot(store, path, images=images)
    go.set()
    await store.all_gone()
    assert images.known == {info.id: MEMORY}
    assert [one.id for one in store.infos()] == [info.id]


async def test_files_alone(
    store: SnapshotStore, snapshot_id: SnapshotId, elsewhere: SnapshotStore, tmp_path: Path
) -> None:
    """An archive without memory gives a snapshot that says so."""
    path = await exported(store, "one", tmp_path / "file", None)
    info = await import_snapshot(elsewhere, path, images=None)
    assert (info.engine, info.image_bytes, info.memory_bytes) == (NO_MEMORY, 0, 0)
    with pytest.raises(SnapshotNotFoundError):
        await exported(store, "nothing", tmp_path / "other", None)


async def test_memory_needs_an_engine_that_takes_it(
    store: SnapshotStore, snapshot_id: SnapshotId, elsewhere: SnapshotStore, tmp_path: Path
) -> None:
    """Without one nothing is left of the attempt."""
    path = await exported(store, "one", tmp_path / "file", Images(**{snapshot_id: MEMORY}))
    with pytest.raises(UnsupportedOperationError):
        await import_snapshot(elsewhere, path, images=None)
    assert os.listdir(elsewhere.root) == ["store.json"]


async def test_it_must_fit(
    store: SnapshotStore, snapshot_id: SnapshotId, elsewhere: SnapshotStore, tmp_path: Path
) -> None:
    """Into the quota, before anything is written."""
    path = await exported(store, "one", tmp_path / "file", Images(**{snapshot_id: MEMORY}))
    elsewhere.quota_bytes = len(MEMORY)
    with pytest.raises(CapacityError):
        await import_snapshot(elsewhere, path, images=Images())


async def test_a_damaged_archive_leaves_nothing(store: SnapshotStore, elsewhere: SnapshotStore, tmp_path: Path) -> None:
    """Wherever it is cut off and whatever bit flips: a typed error, no snapshot, no image."""
    snapshot_id = await add(store, "one", content=os.urandom(50_000))
    path = await exported(store, "one", tmp_path / "file", Images(**{snapshot_id: os.urandom(50_000)}))
    good = path.read_bytes()
    images = Images()

    async def drop(image: SnapshotId) -> None:
        images.known.pop(image, None)

    elsewhere.on_removed = drop
    rng = random.Random(3)
    for trial in range(60):
        data = bytearray(good)
        if trial % 2:
            del data[rng.randrange(len(data)) if trial > 4 else len(data) - trial :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises((SnapshotCorruptError, SnapshotIncompatibleError)) as raised:
            await import_snapshot(elsewhere, path, images=images)
        assert raised.value.hint
        assert os.listdir(elsewhere.root) == ["store.json"]
        assert images.known == {}
    path.write_bytes(good)
    assert await import_snapshot(elsewhere, path, images=images)


def entry(name: str, mode: int, content: bytes = b"", **changes: object) -> bytes:
    """A member as an archive of ours has it."""
    segments = ((0, len(content)),) if content else ()
    known = {"mode": mode, "uid": os.getuid(), "gid": os.getgid(), "mtime_ns": 0, "size": len(content)}
    told = {**known, "segments": segments, "attributes": {}, **changes}
    made = tarball.Entry.from_json(told)
    return tarball.header(name, len(content), made) + content + tarball.padding(len(content))


def link_and_file_through_it() -> bytes:
    return entry("layer/a", 0o120777, target="/tmp") + entry("layer/a/planted", 0o100644, b"x")


HOSTILE: dict[str, Callable[[], bytes]] = {
    "above": lambda: entry("layer/../planted", 0o100644, b"x"),
    "absolute": lambda: entry("layer//tmp/planted", 0o100644, b"x"),
    "at the root": lambda: entry("layer//planted", 0o104755, b"x"),
    "a tree at the root": lambda: entry("layer//planted", 0o40755) + entry("layer//planted/x", 0o100644, b"x"),
    "a dot": lambda: entry("layer/./planted", 0o100644, b"x"),
    "nothing between": lambda: entry("layer/a", 0o40755) + entry("layer/a//planted", 0o100644, b"x"),
    "parent that is not there": lambda: entry("layer/a/planted", 0o100644, b"x"),
    "through a link": link_and_file_through_it,
    "over a link": lambda: entry("layer/a", 0o120777, target="/tmp/planted") + entry("layer/a", 0o100644, b"x"),
    "a disk": lambda: entry("layer/sda", 0o60666, device=os.makedev(8, 0)),
    "memory": lambda: entry("layer/mem", 0o20666, device=os.makedev(1, 1)),
    "more than there is": lambda: entry("layer/a", 0o100644, b"x", segments=((0, 5),), size=5),
    "backwards": lambda: entry("layer/a", 0o100644, b"xy", segments=((1, 2), (0, 1))),
    "no time": lambda: entry("layer/a", 0o100644, mtime_ns=2**100),
    "no size": lambda: entry("layer/a", 0o100644, size=-1),
    "no attribute": lambda: entry("layer/a", 0o100644, attributes={"user.a": "zz"}),
    "a null": lambda: entry("layer/a", 0o120777, target="a\0b"),
    "not ours": lambda: tarball.header("layer/a", 0),
    "another member": lambda: entry("planted", 0o100644, b"x"),
}


def made_by_hand(whole: manifests.Manifest, path: Path, members: Sequence[bytes], *, image_pieces: int = 0) -> Path:
    """An archive of these members."""
    head = json.dumps({"archive": 1}).encode()
    data = b""
    for name, content in (("warmcell.json", head), ("manifest.json", manifests.encode(whole))):
        data += tarball.header(name, len(content)) + content + tarball.padding(len(content))
    data += b"".join(members)
    last = json.dumps({"image_pieces": image_pieces}).encode()
    data += tarball.header("end.json", len(last)) + last + tarball.padding(len(last)) + tarball.END
    path.write_bytes(b"".join(compressed([data])))
    return path


@pytest.mark.parametrize("what", HOSTILE)
async def test_an_archive_writes_nowhere_else(
    store: SnapshotStore, elsewhere: SnapshotStore, tmp_path: Path, what: str
) -> None:
    """An entry that no layer has is refused; nothing is left, here or outside."""
    await add(store, "one")
    whole = dataclasses.replace(store.get("one"), layer=manifests.LayerSummary())
    path = made_by_hand(whole, tmp_path / "file", [HOSTILE[what]()])
    with pytest.raises(WarmcellError):
        await import_snapshot(elsewhere, path, images=None)
    assert os.listdir(elsewhere.root) == ["store.json"]
    assert not Path("/tmp/planted").exists()
    assert not Path("/planted").exists()
    assert not (tmp_path / "planted").exists()


def odd_members() -> st.SearchStrategy[bytes]:
    """Entries of a layer, some of which say odd things of themselves, or have odd names, one after the other."""
    kinds = (0o100644, 0o40755, 0o120777, 0o10600, 0o140600, 0o20666, 0o60666, 0, 2**40)
    sound = {"mode": 0o100644, "uid": 0, "gid": 0, "mtime_ns": 5, "size": 3, "segments": [[0, 3]], "attributes": {}}
    empty = {**sound, "size": 0, "segments": []}
    told = changed(
        sound,
        {**sound, "size": 9, "segments": [[1, 2], [5, 7]]},
        {**empty, "attributes": {"user.a": "00", "trusted.b": "zz"}},
        *({**empty, "mode": kind, "target": "../../planted", "device": 5} for kind in kinds),
        names=("target", "device"),
    )
    names = st.sampled_from(
        ("a", "a", "a/b", "a/c", "b", "../planted", "/planted", "a//b", "a/../b", "./a", "", "a/", "n" * 300, "a\udcff")
    )
    texts = st.one_of(told.map(json.dumps), JSON.map(json.dumps), st.just("[" * 9000))

    return st.lists(st.tuples(names, texts).map(lambda one: member(*one)), max_size=5).map(b"".join)


def member(name: str, told: str) -> bytes:
    """One of which an archive says that, with three bytes where it may have some."""
    found = tarfile.TarInfo(name)
    found.size, found.pax_headers = 3 if "[0, 3]" in told or "[1, 2]" in told else 0, {tarball.HEADER: told}
    head = found.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return head + (b"abc" + tarball.padding(3) if found.size else b"")


@LENGTHS
def test_any_entry_is_made_where_it_belongs_or_refused(examples: int, tmp_path: Path) -> None:
    """In bounded memory, whatever an archive says of it."""

    def take(data: bytes) -> None:
        layer = tmp_path / "top" / "layer"
        layer.mkdir(parents=True)
        try:
            unpacker = tarball.Unpacker(layer, ours=False)
            with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
                for one in archive:
                    unpacker.put(one.name, one, archive.extractfile(one) if one.isreg() else None)
            unpacker.finish()
        finally:
            assert [os.listdir(tmp_path), os.listdir(tmp_path / "top")] == [["top"], ["layer"]]
            shutil.rmtree(tmp_path / "top")

    good = entry("a", 0o40755) + entry("a/b", 0o100644, b"x")
    give_anything(
        odd_members().map(lambda data: data + tarball.END),
        take,
        refusals=(SnapshotCorruptError, OSError),
        examples=examples,
        sound=[good + tarball.END],
        broken=[
            member("a", "[" * 9000) + tarball.END,
            good + good + tarball.END,
            entry("../planted", 0o100644, b"x") + tarball.END,
        ],
    )


@pytest.mark.parametrize("part", ["layer", "image"])
async def test_what_an_archive_says_of_its_size_is_not_believed(
    store: SnapshotStore, elsewhere: SnapshotStore, tmp_path: Path, part: str
) -> None:
    """It says that it is empty, and all of the disk could come out of it: refused as soon as that does not fit."""
    await add(store, "one")
    known = store.get("one")
    told = dataclasses.replace(known.info, layer_bytes=0, image_bytes=0)
    whole = dataclasses.replace(known, info=told, layer=manifests.LayerSummary())
    piece = bytes(4 * 2**20)
    names = [f"layer/{n}" for n in range(50)] if part == "layer" else [f"image/{n:08}" for n in range(50)]
    members = [
        entry(name, 0o100644, piece) if part == "layer" else tarball.header(name, len(piece)) + piece for name in names
    ]
    path = made_by_hand(whole, tmp_path / "file", members, image_pieces=0 if part == "layer" else 50)
    elsewhere.quota_bytes = 100 * 2**20
    images = Taking()
    with pytest.raises(CapacityError):
        await import_snapshot(elsewhere, path, images=images)
    assert os.listdir(elsewhere.root) == ["store.json"]
    assert images.most <= elsewhere.quota_bytes
    elsewhere.quota_bytes = 2**30
    assert await import_snapshot(elsewhere, path, images=images)


class Taking(Images):
    """Notes how much it was given at most."""

    most = 0

    async def import_image(self, image: SnapshotId, data: AsyncIterator[bytes]) -> int:
        taken = 0
        async for piece in data:
            taken += len(piece)
            self.most = max(self.most, taken)
        return taken


async def test_a_capability_of_a_file_is_not_taken(
    store: SnapshotStore, elsewhere: SnapshotStore, tmp_path: Path
) -> None:
    """Attributes that give rights on the host stay out; a guest's own come in."""
    await add(store, "one")
    if os.getuid() == 0:
        granted = bytes.fromhex("0100000202000000000000000000000000000000")
        os.setxattr(store.layer(store.get("one").info.id) / "file", "security.capability", granted)
    os.setxattr(store.layer(store.get("one").info.id) / "file", "user.note", b"n")
    layer = store.layer(store.get("one").info.id)
    data = b"".join(tarball.pack(layer, "")) + tarball.END
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    unpacker = tarball.Unpacker(unpacked, ours=False)
    (tmp_path / "tar").write_bytes(data)
    with tarfile.open(tmp_path / "tar") as archive:
        for member in archive:
            unpacker.put(member.name, member, archive.extractfile(member))
    unpacker.finish()
    assert os.listxattr(unpacked / "file") == ["user.note"]


async def test_any_tar_can_list_it(store: SnapshotStore, tmp_path: Path) -> None:
    """Without Warmcell the files can still be taken out."""
    await add(store, "one", content=b"precious")
    path = await exported(store, "one", tmp_path / "file", None)
    with (
        path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as plain,
        tarfile.open(fileobj=plain, mode="r|") as archive,
    ):
        found = {member.name: content.read() for member in archive if (content := archive.extractfile(member))}
    assert found["layer/file"] == b"precious"
    assert sorted(found) == ["end.json", "layer/file", "manifest.json", "warmcell.json"]


async def test_a_newer_archive_is_refused(elsewhere: SnapshotStore, tmp_path: Path) -> None:
    """With both versions in the details."""
    head = json.dumps({"archive": 2}).encode()
    path = tmp_path / "file"
    data = tarball.header("warmcell.json", len(head)) + head + tarball.padding(len(head)) + tarball.END
    path.write_bytes(b"".join(compressed([data])))
    with pytest.raises(SnapshotIncompatibleError) as raised:
        await import_snapshot(elsewhere, path, images=None)
    assert (raised.value.details["expected"], raised.value.details["found"]) == (1, 2)
