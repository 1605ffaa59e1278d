"""`warmcell clean` where kernels would be saved for the keeper to come."""

import asyncio
from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import configure, keeper, notebook, processes_of
from tests.leaks import Places
from warmcell.extension.cleaning import Cleaning
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]


async def test_kernels_end_and_nobody_takes_them_up(places: Places, tmp_path: Path) -> None:
    """One that runs and one that is suspended are gone, not saved and not lost; what was given a name stays."""
    configure(places)
    async with (
        await KeeperClient.connect() as client,
        notebook(client, tmp_path) as awake,
        notebook(client, tmp_path) as asleep,
    ):
        await awake.do("snapshot", name="kept")
        await asleep.do("suspend")
        report = await asyncio.to_thread(Cleaning(Paths.default()).clean)
    assert report.keeper is not None
    assert not report.killed
    assert processes_of(places) == []
    assert not Paths.default().ledger.exists()
    async with keeper(places) as second:
        kernels = await second.get("/kernels")
        assert (kernels["kernels"], kernels["lost"]) == ([], [])
        [left] = (await second.get("/snapshots"))["snapshots"]
        assert left["name"] == "kept"
        await second.delete(f"/snapshots/{left['id']}")
