"""What a kernel was suspended as before goes only when what it is suspended as now is known to be on the disk."""

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.unit.sandbox.snapshots.making import NOW, add
from warmcell.sandbox.errors import OperationTimeoutError, SnapshotCorruptError, SnapshotError
from warmcell.sandbox.models import SandboxSpec, SnapshotId
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.saved import Saved
from warmcell.sandbox.snapshots import disk
from warmcell.sandbox.snapshots.store import SnapshotStore

SPEC = SandboxSpec(python="/usr/bin/python3")


class Engine:
    """Says of each image whether it is on the disk."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def settle(self, image: SnapshotId) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def saved(store: SnapshotStore, engine: Engine, tmp_path: Path) -> Saved:
    nothing: Any = None
    made = Saved(
        engine=nothing,
        store=store,
        backend_of=nothing,
        paths=Paths(runtime=tmp_path, state=tmp_path, leases=tmp_path),
        release_gpus=lambda sandbox_id: None,
        turn=nothing,
    )

    async def check(spec: SandboxSpec) -> Engine:
        return engine

    setattr(made, "check", check)  # noqa: B010 - the engine of this test
    return made


async def suspended(store: SnapshotStore, number: int) -> SnapshotId:
    """The same kernel once more."""
    return await add(store, kind="outlived" if number < 2 else "suspended", created_at=NOW + number)


async def test_a_helper_that_does_not_answer_costs_no_state(saved: Saved, store: SnapshotStore, engine: Engine) -> None:
    """The older one stays; the next suspension that is known to be on the disk removes it with the one between."""
    first, second = await suspended(store, 0), await suspended(store, 1)
    engine.error = OperationTimeoutError("The snapshot helper did not finish settle in 660 s", hint="Its log.")
    await saved.supersede(first, second, SPEC)
    assert set(store.ids) == {first, second}
    engine.error, third = None, await suspended(store, 2)
    await saved.supersede(second, third, SPEC)
    assert set(store.ids) == {third}


async def test_a_disk_that_could_not_be_synced_costs_no_state(
    saved: Saved, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not though a later attempt succeeds: what could not be written then is gone, and Linux says so only once."""
    first, second = await suspended(store, 0), await suspended(store, 1)

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync_filesystem", broken)
        await saved.supersede(first, second, SPEC)
        with pytest.raises(SnapshotError, match="not known whether"):
            await store.written(second)
    third = await suspended(store, 2)
    await store.written(third)
    await saved.supersede(first, second, SPEC)
    assert set(store.ids) == {first, second, third}
    await saved.supersede(second, third, SPEC)
    assert set(store.ids) == {third}


async def test_a_store_that_closes_costs_no_state(saved: Saved, store: SnapshotStore) -> None:
    """Whoever waits for the disk as the keeper goes is told that nothing is known of it."""
    first, second = await suspended(store, 0), await suspended(store, 1)
    await store.close()
    await saved.supersede(first, second, SPEC)
    assert set(store.ids) == {first, second}


async def test_what_did_not_outlive_a_loss_of_power_is_not_preferred(
    saved: Saved, store: SnapshotStore, engine: Engine
) -> None:
    """That is said, and the older one stays."""
    first, second = await suspended(store, 0), await suspended(store, 1)
    engine.error = SnapshotCorruptError("Its memory was not on the disk when the machine stopped", hint="Go back.")
    with pytest.raises(SnapshotCorruptError):
        await saved.supersede(first, second, SPEC)
    assert set(store.ids) == {first, second}


async def test_what_has_a_name_stays(saved: Saved, store: SnapshotStore) -> None:
    """A snapshot that somebody has named, and a later one, are nobody's state before."""
    named = await add(store, "mine", created_at=NOW - 1)
    first, second = await suspended(store, 0), await suspended(store, 2)
    later = await suspended(store, 3)
    await saved.supersede(first, second, SPEC)
    assert set(store.ids) == {named, second, later}
