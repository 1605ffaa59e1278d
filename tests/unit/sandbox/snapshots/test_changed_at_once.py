"""Several change one snapshot at the same time: what each has changed stays so."""

import asyncio
import os

import pytest

from tests.unit.sandbox.snapshots.making import add
from warmcell.sandbox.errors import ConflictError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.store import SnapshotStore


async def until_changing(store: SnapshotStore, snapshot_id: SnapshotId) -> None:
    """Wait until somebody writes what it is."""
    while not store._entries[snapshot_id].lock.locked():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)


async def test_one_that_is_compressed_is_renamed_and_amended(store: SnapshotStore) -> None:
    """Its manifest says what is on the disk, so it can be used, also by who opens the store next."""
    one = await add(store, "one", content=os.urandom(1_000_000))
    compressing = asyncio.create_task(store.compress(one))
    await until_changing(store, one)
    await asyncio.gather(store.amend(one, kind="outlived", memory_bytes=7), store.rename(one, "two"))
    assert (await compressing).compressed
    again = SnapshotStore(store.root)
    await again.open()
    found = again.get("two").info
    assert (found.compressed, found.kind, found.memory_bytes) == (True, "outlived", 7)
    async with again.use("two") as held:
        assert os.listdir(held.layer) == ["file"]
    await again.close()


async def test_a_name_and_what_else_changes_both_stay(store: SnapshotStore) -> None:
    """Whoever is first: a kernel that has gone on must not be taken for one that is suspended."""
    one, two = await add(store, "one", kind="suspended"), await add(store, "two", kind="suspended")
    await asyncio.gather(store.rename(one, "three"), store.amend(one, kind="outlived"))
    await asyncio.gather(store.amend(two, kind="outlived"), store.rename(two, "four"))
    found = {name: store.get(name).info.kind for name in ("three", "four")}
    assert found == {"three": "outlived", "four": "outlived"}


async def test_one_name_for_two(store: SnapshotStore) -> None:
    """One of them gets it, and may give it back; one that has many names at once has the last."""
    one, two = await add(store, "one"), await add(store, "two")
    found = await asyncio.gather(store.rename(one, "x"), store.rename(two, "x"), return_exceptions=True)
    assert [type(answer) for answer in found].count(ConflictError) == 1
    await asyncio.gather(*(store.rename(one, name) for name in ("a", "b", "c")))
    assert store.get(one).info.name == "c"
    await store.rename(two, "a")
    await store.rename(one, "b")
    await add(store, "c")


async def test_a_name_is_free_again_where_it_could_not_be_written(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full now need not be so for the next one who wants it."""
    one = await add(store, "one")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr("warmcell.sandbox.snapshots.directory.rewrite", full)
        with pytest.raises(Exception, match="disk"):
            await store.rename(one, "x")
    assert store.get(one).info.name == "one"
    await add(store, "x")
