"""How the keeper puts down what is used: nothing is lost because it could not be written at once."""

import contextlib
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.leaks import Places
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.usage import Meter
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend
from warmcell.sandbox.usage import UsageStore


@pytest.fixture
def paths(places: Places) -> Paths:
    return Paths(places.runtime, places.state, places.leases).make()


@pytest.fixture
async def service(paths: Paths) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends={"fake": FakeBackend()},
        default_backend="fake",
        gpus=GpuPool(SimulatedInventory([]), LeaseDirectory(paths.leases)),
        paths=paths,
        bounds=Bounds(),
        prepared_per_template=0,
    )
    yield made
    await made.close()


async def test_what_could_not_be_written_is_written_later(
    service: SandboxService, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is locked for a while, or a disk that is full, takes nothing from the sums."""
    monkeypatch.setattr("warmcell.sandbox.usage.BUSY_S", 0.0)
    file = Path(paths.state) / "usage.sqlite"
    meter = Meter(service, Kernels(service, paths), UsageStore(file), busy=lambda sandbox_id: True)
    await service.create(SandboxSpec(python=sys.executable, network="host", preload=()), owner="client")
    await meter.rows(by="sandbox", days=None)
    first = await meter.rows(by="sandbox", days=None)
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN IMMEDIATE")
        unwritten = await meter.rows(by="sandbox", days=None)
        again = await meter.rows(by="sandbox", days=None)
    assert unwritten == again == first
    monkeypatch.setattr(meter, "_advance", lambda info: None)
    last = await meter.rows(by="sandbox", days=None)
    assert last[0].usage.wall_active_s > first[0].usage.wall_active_s


@pytest.mark.parametrize("works", [True, False])
async def test_a_sandbox_works_while_a_command_runs_though_its_kernel_does_not(
    service: SandboxService, paths: Paths, works: bool
) -> None:
    """What an agent has started beside the kernel is work, too."""
    info = await service.create(SandboxSpec(python=sys.executable, network="host", preload=()), owner="client")
    kernel = SimpleNamespace(sandbox_id=info.id, started=True, proxy=SimpleNamespace(idle_s=1e9))
    kernels = cast(Kernels, SimpleNamespace(of=lambda sandbox_id: kernel))
    meter = Meter(service, kernels, UsageStore(paths.usage), busy=lambda sandbox_id: works)
    await meter.rows(by="sandbox", days=None)
    used = (await meter.rows(by="sandbox", days=None))[0].usage
    assert (used.wall_active_s > 0, used.wall_idle_s > 0) == (works, not works)
