"""A store in a temporary directory, with a clock of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.sandbox.snapshots.making import Clock
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.store import SnapshotStore


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dropped() -> list[SnapshotId]:
    """Images that the engine was told to drop."""
    return []


@pytest.fixture
async def store(tmp_path: Path, clock: Clock, dropped: list[SnapshotId]) -> AsyncIterator[SnapshotStore]:
    async def drop(snapshot_id: SnapshotId) -> None:
        dropped.append(snapshot_id)

    made = SnapshotStore(tmp_path / "store", on_removed=drop, clock=clock)
    await made.open()
    yield made
    await made.close()
