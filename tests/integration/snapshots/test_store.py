"""The store against a killed keeper, a full disk and another user."""

import asyncio
import dataclasses
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.snapshots import committing
from tests.unit.sandbox.snapshots.making import manifest
from warmcell.sandbox.errors import CapacityError, StorageFullError, WarmcellError
from warmcell.sandbox.snapshots.archive import export_snapshot, import_snapshot
from warmcell.sandbox.snapshots.store import SnapshotStore, new_id

TRIALS = 50
GENERATIONS = 12


async def killed_at(root: Path, trial: int) -> int:
    """Start commits, kill them at some moment; the last generation that was told to be committed."""
    rng = random.Random(trial)
    child = subprocess.Popen(
        [sys.executable, committing.__file__, str(root), str(trial)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        # When it dies is what varies between trials: how many it has told, and where it is in the next one.
        first = ""
        for generation in range(rng.randrange(1, GENERATIONS)):
            first = await asyncio.wait_for(asyncio.to_thread(child.stdout.readline), 60)
            assert first == f"{generation}\n"
        await asyncio.sleep(rng.random() * 0.01)
    finally:
        child.kill()
        rest, _ = await asyncio.to_thread(child.communicate)
    return int((first + rest).split()[-1])


async def test_killed_while_committing(tmp_path: Path) -> None:
    """Whenever the keeper dies, the next one finds the old or the new, whole, and nothing else."""
    roots = [tmp_path / f"{trial}" for trial in range(TRIALS)]
    slots = asyncio.Semaphore(2)

    async def one(trial: int) -> int:
        async with slots:
            return await killed_at(roots[trial], trial)

    told = await asyncio.gather(*(one(trial) for trial in range(TRIALS)))
    for root, last in zip(roots, told, strict=True):
        store = SnapshotStore(root)
        await store.open()
        assert store.unreadable == ()
        found = {info.id: store.get(info.id).kernel["generation"] for info in store.infos()}
        newest = max(found.values())
        assert last <= newest <= last + 1
        assert sorted(found.values()) in ([newest], [newest - 1, newest])
        for one, generation in found.items():
            async with store.use(one) as held:
                files = [path.read_bytes() for path in held.layer.iterdir()]
                assert files
                assert all(data[:4] == generation.to_bytes(4) == data[-4:] for data in files)
        await store.close()
        for one in found:
            inside = {path.name for path in (root / one).iterdir()}
            assert inside - {"layer.sums"} == {"manifest.json", "layer", "layer.list"}
        assert not [name for name in os.listdir(root) if name.startswith(".")]
    assert len(set(told)) > GENERATIONS // 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four MiB."""
    at = tmp_path / "disk"
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(at)]
    mounted = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"only root can mount: {mounted.stderr.strip()}")
    yield at
    subprocess.run(["umount", str(at)], check=True, timeout=60)


async def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """Wherever it fills up: a capacity error with its cure, what was there is there, and room comes back."""
    store = SnapshotStore(small_disk / "store")
    await store.open()
    async with store.draft(new_id()) as draft:
        (draft.layer / "file").write_bytes(os.urandom(1_000_000))
        await draft.commit(manifest("kept"))
    archive = tmp_path / "archive"
    with archive.open("wb") as file:
        async for piece in export_snapshot(store, "kept", images=None):
            file.write(piece)
    before = sorted(os.listdir(store.root))
    filler = small_disk / "filler"
    room = os.statvfs(small_disk)
    for spare in (0, 1, 3, 40, 200):
        filler.write_bytes(b"x" * (room.f_bavail - spare) * room.f_bsize)
        with pytest.raises(CapacityError) as raised:
            await _all_that_writes(store, archive)
        assert "rm" in raised.value.hint
        assert sorted(os.listdir(store.root)) == before
        assert store.get("kept").info.name == "kept"
        filler.unlink()
    async with store.use("kept") as held:
        assert (held.layer / "file").stat().st_size == 1_000_000
    assert (await import_snapshot(store, archive, images=None, name="other")).name == "other"
    await store.close()


async def _all_that_writes(store: SnapshotStore, archive: Path) -> None:
    """Each must fail with the same error for the disk to count as full; the last one's is raised."""
    kept = store.get("kept").info.id
    failures = []
    for attempt in (_commit_much(store), store.rename(kept, "x" * 200), import_snapshot(store, archive, images=None)):
        try:
            await attempt
        except WarmcellError as error:
            failures.append(error)
    if store.get(kept).info.name != "kept":
        await store.rename(kept, "kept")
    assert failures
    assert {type(error) for error in failures} == {StorageFullError}
    raise failures[-1]


async def _commit_much(store: SnapshotStore) -> None:
    async with store.draft(new_id()) as draft:
        much = dataclasses.replace(manifest("much"), kernel={"much": "x" * 4 * 2**20})
        await draft.commit(much)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
async def test_a_snapshot_of_another_user_is_refused(tmp_path: Path) -> None:
    """It is told as not usable, and neither given out nor removed by age or for room."""
    store = SnapshotStore(tmp_path / "store")
    await store.open()
    async with store.draft(new_id()) as draft:
        await draft.commit(manifest("theirs"))
    await store.close()
    for path in [store.root / draft.id, *(store.root / draft.id).iterdir()]:
        os.chown(path, 12345, 12345)
    opened = SnapshotStore(store.root, quota_bytes=1, ttl_s=0.0, clock=lambda: time.time() + 10**9)
    await opened.open()
    (refused,) = opened.unreadable
    assert (refused.id, refused.error.code) == (draft.id, "snapshot_incompatible")
    with pytest.raises(WarmcellError, match="belongs to user 12345"):
        async with opened.use(draft.id):
            pytest.fail("it was given out")
    assert await opened.expire() == []
    assert await opened.make_room(1) == []
    assert (store.root / draft.id).exists()
    await opened.close()
