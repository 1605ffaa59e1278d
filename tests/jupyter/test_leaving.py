"""A server that ends leaves its kernels to the next one, each whatever happens to another."""

import asyncio
import logging
from typing import Any

import pytest
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager

from benchmarks.server import end_keeper
from tests.jupyter.warmcell_kernels import NAME, configure, kernelspec
from tests.leaks import Places
from warmcell.extension.server.keeping import keep_all
from warmcell.kernel_provisioner.provisioner import WarmcellProvisioner
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]


async def test_one_that_is_shut_down_meanwhile_costs_no_other(
    places: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of three kernels one is shut down by a page while all are saved, and another fails in an unforeseen way."""
    configure(places, keeper_idle_s=30.0)
    kernelspec(places)
    kernels: Any = AsyncMappingKernelManager(connection_dir=str(places.root))
    ids = [str(await kernels.start_kernel(kernel_name=NAME)) for _ in range(3)]
    gone, failing, kept = ids
    suspend = WarmcellProvisioner.suspend

    async def disturbed(self: WarmcellProvisioner, *, even_busy: bool = False) -> None:
        await suspend(self, even_busy=even_busy)
        if self.kernel_id == gone:
            await kernels.shutdown_kernel(gone, now=True)
        if self.kernel_id == failing:
            raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(WarmcellProvisioner, "suspend", disturbed)
    try:
        await asyncio.wait_for(keep_all(kernels, logging.getLogger("test")), 120)
        assert kernels.list_kernel_ids() == [failing]
        assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == [
            f"Warmcell: kernel {failing} is not left to the next server"
        ]
        async with await KeeperClient.connect(paths=Paths.default(), start=False) as keeper:
            told = {one["kernel_id"]: one["state"] for one in (await keeper.get("/sandboxes"))["sandboxes"]}
            assert told == {failing: "suspended", kept: "suspended"}
            await kernels.shutdown_all()
            await keeper.delete(f"/kernels/{kept}")
    finally:
        end_keeper(places)
