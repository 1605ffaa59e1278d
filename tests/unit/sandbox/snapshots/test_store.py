"""What the store keeps, finds, holds and gives up."""

import asyncio
import dataclasses
import errno
import os
import time
from pathlib import Path

import pytest

from tests.unit.sandbox.snapshots.making import NOW, Clock, add, hostile, manifest
from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    InvalidRequestError,
    SnapshotCorruptError,
    SnapshotIncompatibleError,
    SnapshotNotFoundError,
)
from warmcell.sandbox.models import SandboxId, SnapshotId
from warmcell.sandbox.snapshots import checks, disk
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.snapshots.store import SnapshotStore, new_id


def plant(root: Path, name: str) -> None:
    """A snapshot as a keeper before left it."""
    snapshot_id = new_id()
    (root / snapshot_id / "layer").mkdir(parents=True)
    plain = manifest(name)
    info = dataclasses.replace(plain.info, id=snapshot_id)
    manifests.write(root / snapshot_id, dataclasses.replace(plain, info=info, uid=os.getuid()), durable=False)


async def again(store: SnapshotStore) -> SnapshotStore:
    """The store as the next keeper finds it."""
    await store.close()
    opened = SnapshotStore(store.root)
    await opened.open()
    return opened


async def test_a_snapshot_outlives_its_keeper(store: SnapshotStore) -> None:
    """Manifest and layer are there after opening again, with owner and sizes filled in."""
    snapshot_id = await add(store, "one", content=b"x" * 10_000)
    opened = await again(store)
    found = opened.get("one", kernel_id="k1")
    assert (found.info.id, found.uid, found.layer.entries) == (snapshot_id, os.getuid(), 1)
    assert found.info.layer_bytes >= 10_000
    async with opened.use(snapshot_id) as held:
        assert (held.layer / "file").read_bytes() == b"x" * 10_000
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert (store.root / snapshot_id).stat().st_mode & 0o777 == 0o700
    await opened.close()


async def test_an_abandoned_draft_leaves_nothing(store: SnapshotStore) -> None:
    """Nor does one whose maker failed; its id is free again."""
    snapshot_id = new_id()
    with pytest.raises(RuntimeError):
        async with store.draft(snapshot_id) as draft:
            hostile(draft.layer)
            assert snapshot_id in store.ids
            raise RuntimeError
    assert os.listdir(store.root) == ["store.json"]
    assert store.ids == frozenset()
    async with store.draft(snapshot_id) as draft:
        await draft.commit(manifest())
    with pytest.raises(ConflictError):
        await store.draft(snapshot_id).begin()
    with pytest.raises(ConflictError):
        await draft.commit(manifest())
    await draft.abandon()
    assert store.get(snapshot_id)


@pytest.mark.parametrize("ref", ["", "../../etc/xyz", "ABCDEFGHIJKL", "abc"])
def test_only_ids_become_paths(store: SnapshotStore, ref: str) -> None:
    """Nothing else is ever joined to the store's directory."""
    with pytest.raises(InvalidRequestError):
        store.draft(SnapshotId(ref))
    with pytest.raises(SnapshotNotFoundError):
        store.get(ref)


async def test_names_are_looked_for_within_a_kernel(store: SnapshotStore) -> None:
    """Two kernels may use one name; without a kernel that is a conflict, and an id always works."""
    mine = await add(store, "one")
    other = await add(store, "one", kernel_id="k2", sandbox_id=SandboxId("b" * 12))
    assert store.get("one", kernel_id="k1").info.id == mine
    assert store.get("one", sandbox_id=SandboxId("b" * 12)).info.id == other
    assert store.get(other, kernel_id="k1").info.id == other
    with pytest.raises(ConflictError) as raised:
        store.get("one")
    assert mine in raised.value.hint
    assert [info.id for info in store.infos(kernel_id="k2")] == [other]


async def test_a_name_that_is_not_there_gets_a_hint(store: SnapshotStore) -> None:
    """Near names are proposed, and those of another kernel are not."""
    await add(store, "before-training")
    await add(store, "before-lunch", kernel_id="k2", sandbox_id=None)
    with pytest.raises(SnapshotNotFoundError) as raised:
        store.get("before-trainin", kernel_id="k1")
    assert "before-training" in raised.value.hint
    assert "lunch" not in raised.value.hint


async def test_a_name_is_taken_until_who_has_it_is_discarded(store: SnapshotStore, dropped: list[SnapshotId]) -> None:
    """A second one is refused; one that is discarded is found no more, and goes once it is no longer used."""
    old = await add(store, "one")
    with pytest.raises(ConflictError):
        await add(store, "one")
    assert [info.id for info in store.infos()] == [old]
    async with store.use(old):
        await store.discard(old)
        new = await add(store, "one")
        assert store.get("one").info.id == new
        assert (store.layer(old) / "file").exists()
        assert dropped == []
    await store.all_gone()
    assert dropped == [old]
    assert sorted(os.listdir(store.root)) == sorted([new, "store.json"])


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", " a", "x" * 201, "a\u202eb"])
async def test_names_can_be_printed(store: SnapshotStore, name: str) -> None:
    """A name that would garble a terminal is refused, when it is made and when it is changed."""
    snapshot_id = await add(store, "one")
    with pytest.raises(InvalidRequestError):
        await add(store, name)
    with pytest.raises(InvalidRequestError):
        await store.rename(snapshot_id, name)


async def test_it_is_renamed(store: SnapshotStore) -> None:
    """On the disk too, without counting as used; a taken name is refused."""
    one, two = await add(store, "one"), await add(store, "two")
    with pytest.raises(ConflictError):
        await store.rename(one, "two")
    await store.rename(one, "three")
    await store.rename(two, "")
    opened = await again(store)
    assert opened.get("three").info.id == one
    assert opened.get(two).info.name == ""
    with pytest.raises(SnapshotNotFoundError):
        await opened.rename(new_id(), "x")
    await opened.close()


async def test_it_is_amended(store: SnapshotStore) -> None:
    """What is given changes, on the disk too; the rest and the name stay."""
    one = await add(store, "one", image_bytes=1)
    await store.amend(one, kind="outlived", memory_bytes=7)
    told = await store.amend(one, image_bytes=5, versions={"criu": "4.2.1"})
    opened = await again(store)
    found = opened.get("one")
    assert found == told
    assert (found.info.kind, found.info.memory_bytes, found.info.image_bytes) == ("outlived", 7, 5)
    assert found.versions == {"criu": "4.2.1"}
    with pytest.raises(SnapshotNotFoundError):
        await opened.amend(new_id(), image_bytes=1)
    await opened.close()


async def test_nobody_waits_for_the_room_of_what_was_discarded(store: SnapshotStore) -> None:
    """Nobody finds it any more, also not a keeper that comes after a crash; who removes for room waits for that."""
    may_go = asyncio.Event()

    async def drop(snapshot_id: SnapshotId) -> None:
        await may_go.wait()

    store.on_removed = drop
    let_go, discarded, removed = [await add(store, name) for name in ("one", "two", "three")]
    async with asyncio.timeout(30):
        new = await add(store, "four")
        async with store.use(let_go):
            await store.discard(let_go)
        await store.discard(discarded)
        removing = asyncio.create_task(store.remove(removed))
        gone = [f".{one}.gone" for one in (let_go, discarded, removed)]
        while sorted(os.listdir(store.root)) != sorted([*gone, new, "store.json"]):  # noqa: ASYNC110 - a thread does it
            await asyncio.sleep(0.01)
        assert [info.id for info in store.infos()] == [new]
        assert not removing.done()
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
        assert not closing.done()
        may_go.set()
        await removing
        await closing
    assert sorted(os.listdir(store.root)) == sorted([new, "store.json"])


async def test_what_was_being_removed_when_a_keeper_was_killed_goes_when_the_next_begins(store: SnapshotStore) -> None:
    """With the files that were hidden, and nothing else."""
    kept, doomed = await add(store, "kept"), await add(store, "doomed")
    killed = asyncio.Event()

    async def drop(snapshot_id: SnapshotId) -> None:
        await killed.wait()

    store.on_removed = drop
    await store.discard(doomed)
    assert f".{doomed}.gone" in os.listdir(store.root)
    opened = SnapshotStore(store.root)
    await opened.open()
    assert opened.ids == {kept}
    assert sorted(os.listdir(store.root)) == sorted([kept, "store.json"])
    killed.set()


async def test_one_in_use_is_not_removed(store: SnapshotStore, dropped: list[SnapshotId]) -> None:
    """Neither by hand nor by age nor for room; afterwards it is, with its image."""
    snapshot_id = await add(store, "one", image_bytes=100, expires_at=NOW - 1)
    store.quota_bytes = 1
    async with store.use("one"):
        with pytest.raises(ConflictError):
            await store.remove(snapshot_id)
        assert await store.expire() == []
        with pytest.raises(CapacityError):
            await store.make_room(1)
    await store.remove(snapshot_id)
    assert dropped == [snapshot_id]
    assert os.listdir(store.root) == ["store.json"]
    with pytest.raises(SnapshotNotFoundError):
        await store.remove(snapshot_id)


async def test_uses_and_removals_at_once(store: SnapshotStore, dropped: list[SnapshotId]) -> None:
    """Of many that use and remove one snapshot at a time each sees all of it or none; it goes exactly once."""
    for _ in range(20):
        snapshot_id = await add(store, content=b"whole")

        async def use(snapshot_id: SnapshotId = snapshot_id) -> str:
            try:
                async with store.use(snapshot_id) as held:
                    await asyncio.sleep(0)
                    assert (held.layer / "file").read_bytes() == b"whole"
                    return "used"
            except SnapshotNotFoundError:
                return "gone"

        async def remove(snapshot_id: SnapshotId = snapshot_id) -> str:
            try:
                await store.remove(snapshot_id)
            except ConflictError:
                return "refused"
            except SnapshotNotFoundError:
                return "gone"
            return "removed"

        told = await asyncio.gather(use(), remove(), use(), remove(), remove(), use())
        if "removed" not in told:
            await store.remove(snapshot_id)
        assert dropped.count(snapshot_id) == 1
        assert told.count("removed") <= 1
    assert os.listdir(store.root) == ["store.json"]


async def test_the_least_missed_go_for_room(store: SnapshotStore, clock: Clock) -> None:
    """Nameless before named, oldest use first, suspended kernels never, and not one too many."""
    made = {}
    for name in ("named-old", "named-new"):
        made[name] = await add(store, name, image_bytes=10**6)
    for label in ("old", "new"):
        made[label] = await add(store, image_bytes=10**6)
    made["suspended"] = await add(store, kind="suspended", image_bytes=10**6)
    for age, label in enumerate(("suspended", "new", "old", "named-new", "named-old")):
        clock.now = NOW - age
        await store.touch(made[label])
    store.quota_bytes = store.used_bytes
    assert await store.make_room(0) == []
    assert await store.make_room(1) == [made["old"]]
    assert await store.make_room(2_500_000) == [made["new"], made["named-old"]]
    before = store.ids
    with pytest.raises(CapacityError) as raised:
        await store.make_room(5 * 10**6)
    assert "snapshot_quota" in raised.value.hint
    assert store.ids == before == {made["named-new"], made["suspended"]}


async def test_what_is_leaving_takes_room_until_it_is_gone(store: SnapshotStore) -> None:
    """Who saves again and again fills no disk past the quota; who finds room besides waits for nothing."""
    may_go = asyncio.Event()

    async def drop(snapshot_id: SnapshotId) -> None:
        await may_go.wait()

    store.on_removed = drop
    replaced = await add(store, image_bytes=10**6)
    await store.discard(replaced)
    store.quota_bytes = 2 * 10**6
    async with asyncio.timeout(30):
        assert await store.make_room(10**6 - 10**5) == []
        making = asyncio.create_task(store.make_room(10**6 + 10**5))
        done, _ = await asyncio.wait({making}, timeout=0.1)
        may_go.set()
        assert not done
        assert await making == []
    assert os.listdir(store.root) == ["store.json"]
    with pytest.raises(CapacityError):
        await store.make_room(2 * 10**6 + 1)


async def test_shared_memory_is_there_until_its_last_snapshot_goes(store: SnapshotStore, clock: Clock) -> None:
    """It counts once within the quota, and what its other half keeps on the disk makes no room."""
    made = []
    for age in range(3):
        clock.now = NOW + age
        made.append(await add(store, image_bytes=0))
    store.quota_bytes = 10**6

    async def remeasure() -> None:
        sharing = [one for one in made[:2] if one in store.ids]
        store.shared = {one: 10**6 // len(sharing) for one in sharing}

    store.remeasure = remeasure
    await remeasure()
    assert store.used_bytes >= 10**6
    assert await store.make_room(500_000) == made[:2]
    assert store.ids == {made[2]}


async def test_a_last_use_outlives_the_keeper(store: SnapshotStore, clock: Clock) -> None:
    """And ends what age would: an unused one expires, a used one and a suspended one do not."""
    used, unused = await add(store, "used"), await add(store, "unused")
    suspended = await add(store, kind="suspended")
    own = await add(store, "own", expires_at=NOW + 10)
    clock.now += 50
    async with store.use(used):
        pass
    await store.close()
    opened = SnapshotStore(store.root, ttl_s=100, clock=clock)
    await opened.open()
    assert opened.get(used).info.last_used_at == NOW + 50
    assert await opened.expire() == [own]
    clock.now = NOW + 101
    assert await opened.expire() == [unused]
    clock.now = NOW + 10**9
    assert await opened.expire() == [used]
    assert opened.ids == {suspended}
    await opened.close()


@pytest.mark.parametrize("what", ["file", "size", "name", "link", "mode", "listing", "manifest", "other manifest"])
async def test_what_was_changed_is_not_restored(store: SnapshotStore, what: str) -> None:
    """Whatever of it is not as it was written is found before anybody gets it, and it is not removed."""
    async with store.draft(new_id()) as draft:
        hostile(draft.layer)
        await draft.commit(manifest("one"))
    top, layer = store.root / draft.id, store.layer(draft.id)
    if what == "file":
        (layer / "deep" / "data").write_bytes(b"y" * 200_000)
    elif what == "size":
        os.truncate(layer / "deep" / "data", 1)
    elif what == "name":
        (layer / "locked").rename(layer / "unlocked")
    elif what == "link":
        (layer / "link").unlink()
        (layer / "link").symlink_to("/etc/shadow")
    elif what == "mode":
        (layer / "deep" / "data").chmod(0o4755)
    elif what == "listing":
        data = bytearray((top / "layer.list").read_bytes())
        data[20] ^= 1
        (top / "layer.list").write_bytes(data)
    elif what == "manifest":
        data = bytearray((top / "manifest.json").read_bytes())
        data[len(data) // 2] ^= 1
        (top / "manifest.json").write_bytes(data)
    else:
        other = await add(store, "two")
        (top / "manifest.json").write_bytes((store.root / other / "manifest.json").read_bytes())
    with pytest.raises(SnapshotCorruptError) as raised:
        async with store.use("one"):
            pytest.fail("it was given out")
    assert raised.value.hint
    assert draft.id in store.ids


async def test_those_who_come_together_share_one_look(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds while somebody has the snapshot, and for a moment only."""
    looks: list[Path] = []

    def quick(directory: Path, expected: Manifest) -> None:
        looks.append(directory)
        found(directory, expected)

    found = checks.quick
    monkeypatch.setattr(checks, "quick", quick)
    ref = await add(store, content=b"as it was")

    async def hold() -> None:
        async with store.use(ref):
            await here.wait()

    here = asyncio.Barrier(8)
    await asyncio.gather(*(hold() for _ in range(8)))
    assert len(looks) == 1

    async with store.use(ref), store.use(ref):
        assert len(looks) == 2
        (store.layer(ref) / "file").write_bytes(b"something else")
        monkeypatch.setattr("warmcell.sandbox.snapshots.store.SOUND_S", 0.0)
        with pytest.raises(SnapshotCorruptError):
            async with store.use(ref):
                pytest.fail("it was used")


async def test_contents_are_summed_up_in_the_background(store: SnapshotStore) -> None:
    """A byte that rots without a trace in size or time is found by verify; sound layers pass, huge holes in no time."""
    async with store.draft(new_id()) as draft:
        hostile(draft.layer)
        await draft.commit(manifest("one"))
    await store.idle()
    took = []
    for _ in range(3):
        began = time.monotonic()
        assert await store.verify(draft.id) is True
        took.append(time.monotonic() - began)
    assert min(took) < 5, took
    path = store.layer(draft.id) / "deep" / "data"
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[150_000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(SnapshotCorruptError, match="deep/data"):
        await store.verify(draft.id)


async def test_a_cold_layer_is_compressed_until_it_is_used(store: SnapshotStore) -> None:
    """It takes less, says so after opening again, and comes back exactly as it was."""
    async with store.draft(new_id()) as draft:
        hostile(draft.layer)
        (draft.layer / "text").write_bytes(b"abc" * 300_000)
        await draft.commit(manifest("one"))
    plain = store.get("one").info.layer_bytes
    async with store.use("one"):
        with pytest.raises(ConflictError):
            await store.compress(draft.id)
    cold = await store.compress(draft.id)
    assert cold.compressed
    assert cold.layer_bytes < plain - 800_000
    assert not store.layer(draft.id).exists()
    opened = await again(store)
    async with opened.use("one") as held:
        assert not held.manifest.info.compressed
        assert os.readlink(held.layer / "link") == "/etc/passwd"
        assert (held.layer / "deep" / "data").stat().st_mtime_ns == 1_234_567_890_123_456_789
        assert (held.layer / "hole").stat().st_size == 10**12 + 3
    await opened.idle()
    assert await opened.verify(draft.id) is True
    await opened.close()


async def test_what_counts_no_more_and_cannot_be_removed_is_in_nobodys_way(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the manifest is written it is what counts, and the other form goes when the store is opened again."""
    made = await add(store, "mine", content=b"kept")
    layer = store.layer(made)
    with monkeypatch.context() as patch:
        remove = disk.remove

        def fails(path: Path) -> None:
            if path == layer:
                raise OSError(errno.EBUSY, "busy", str(path))
            remove(path)

        patch.setattr(disk, "remove", fails)
        assert (await store.compress(made)).compressed
    assert (store.get(made).info.compressed, layer.exists()) == (True, True)
    await store.close()
    again = SnapshotStore(store.root)
    await again.open()
    assert (again.get(made).info.compressed, layer.exists()) == (True, False)
    async with again.use(made) as held:
        assert (held.layer / "file").read_bytes() == b"kept"
    await again.close()


async def test_a_rotten_compressed_layer_is_found(store: SnapshotStore) -> None:
    """And it stays compressed, as it is."""
    snapshot_id = await add(store, "one", content=os.urandom(100_000))
    await store.compress(snapshot_id)
    path = store.root / snapshot_id / "layer.tar.zst"
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotCorruptError):
        async with store.use("one"):
            pytest.fail("it was given out")
    assert store.get("one").info.compressed
    assert not store.layer(snapshot_id).exists()


async def test_what_cannot_be_read_is_told_and_stays(store: SnapshotStore, dropped: list[SnapshotId]) -> None:
    """A newer one and a broken one are listed with the reason, keep their ids, and go when asked by id."""
    good, newer, broken = await add(store, "good"), await add(store, "newer"), await add(store, "broken")
    path = store.root / newer / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 9'))
    (store.root / broken / "manifest.json").unlink()
    (store.root / "notes.txt").write_text("not ours")
    await store.close()
    await store.open()
    assert {one.id: one.error.code for one in store.unreadable} == {
        newer: "snapshot_incompatible",
        broken: "snapshot_corrupt",
    }
    assert [info.id for info in store.infos()] == [good]
    assert store.ids == {good, newer, broken}
    with pytest.raises(SnapshotIncompatibleError):
        store.get(newer)
    await store.remove(broken)
    assert dropped == [broken]
    assert sorted(os.listdir(store.root)) == sorted([good, newer, "notes.txt", "store.json"])
    await store.close()
    await store.open()
    assert [one.id for one in store.unreadable] == [newer]


async def test_a_store_of_the_future_is_left_alone(store: SnapshotStore) -> None:
    """It is not opened, and nothing in it is touched."""
    await store.close()
    (store.root / "store.json").write_text('{"format": 2}')
    (store.root / ".draft").mkdir()
    with pytest.raises(SnapshotIncompatibleError):
        await SnapshotStore(store.root).open()
    assert (store.root / ".draft").exists()


async def test_a_thousand_snapshots(store: SnapshotStore) -> None:
    """They open within five seconds and list within a tenth of one, here and on a busy machine."""
    for number in range(1000):
        plant(store.root, f"n{number}")
    opening, listing = [], []
    for _ in range(3):
        began = time.perf_counter()
        opened = SnapshotStore(store.root)
        await opened.open()
        opening.append(time.perf_counter() - began)
        for _ in range(3):
            began = time.perf_counter()
            assert len(opened.infos()) == 1000
            listing.append(time.perf_counter() - began)
        await opened.close()
    assert min(opening) < 5, opening
    assert min(listing) < 0.1, listing


async def test_a_hostile_layer_goes_without_a_trace(store: SnapshotStore, tmp_path: Path) -> None:
    """Deeper than a path may be long, and with links to elsewhere, whose targets stay."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    async with store.draft(new_id()) as draft:
        hostile(draft.layer)
        (draft.layer / "out").symlink_to(outside)
        at = os.open(draft.layer, os.O_DIRECTORY)
        for _ in range(1500):
            os.mkdir("d" * 10, dir_fd=at)
            os.symlink(outside, "l", dir_fd=at)
            inner = os.open("d" * 10, os.O_DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        os.close(at)
        await draft.commit(manifest("one"))
    async with store.use("one"):
        pass
    await store.remove(draft.id)
    assert os.listdir(store.root) == ["store.json"]
    assert (outside / "kept").read_text() == "kept"


def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    """What an earlier attempt had moved up is no obstacle."""
    top = tmp_path / "top"
    (top / "..0" / "a").mkdir(parents=True)
    (top / "..1").mkdir()
    (top / "b" / "c" / "..0").mkdir(parents=True)
    disk.remove(top)
    disk.remove(top)
    assert not top.exists()
