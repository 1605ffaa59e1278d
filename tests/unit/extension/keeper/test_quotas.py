"""What GPUs cost a principal, and what happens when it has had all its time. The clock is the test's own."""

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.leaks import Places
from warmcell.extension.keeper.principals import Principals, Quota
from warmcell.extension.keeper.quotas import CHARGE_EVERY_S, PrincipalQuotas
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.errors import ConflictError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend

GPUS = [{"name": "A100", "memory": "80GiB", "count": 4}]


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def principals(tmp_path: Path) -> Principals:
    made = Principals(tmp_path / "principals.json")
    made.create("ann", quota=Quota(gpu_seconds=100.0))
    return made


@pytest.fixture
async def service(places: Places) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends={"fake": FakeBackend()},
        default_backend="fake",
        gpus=GpuPool(SimulatedInventory(GPUS), LeaseDirectory(places.leases), most_parts=4),
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(),
        prepared_per_template=0,
    )
    yield made
    await made.close()


async def nothing(sandbox_id: SandboxId) -> None:
    """Nobody loses a GPU."""


async def box_of_ann(service: SandboxService, gpu: str) -> SandboxId:
    spec = SandboxSpec(python=sys.executable, network="host", preload=(), gpu=gpu)
    return (await service.create(spec, owner="client", principal="ann")).id


def quotas_of(
    service: SandboxService, principals: Principals, clock: Clock, exhausted: Callable[[SandboxId], Awaitable[None]]
) -> PrincipalQuotas:
    made = PrincipalQuotas(service, principals, exhausted=exhausted, clock=clock)
    for info in service.infos():
        made.note(info)
    return made


@pytest.mark.parametrize(("gpu", "cost"), [("A100", 8.0), ("A100:2", 16.0), ("A100/4", 2.0)])
async def test_gpus_cost_by_number_and_share(
    service: SandboxService, principals: Principals, clock: Clock, gpu: str, cost: float
) -> None:
    """In eight seconds two GPUs are sixteen, a quarter of one is two; on disk once it has ended."""
    box = await box_of_ann(service, gpu)
    quotas = quotas_of(service, principals, clock, nothing)
    clock.now += 8.0
    assert quotas.usage("ann").gpu_seconds == cost
    quotas.note(dataclasses.replace(service.info(box), state=State.STOPPED))
    assert principals.gpu_seconds("ann") == cost


async def test_gpus_that_cannot_be_taken_away_still_cost_and_are_tried_again(
    service: SandboxService, principals: Principals, clock: Clock
) -> None:
    """Whoever prevents that its sandbox is suspended has them no longer for free."""
    asked: asyncio.Queue[SandboxId] = asyncio.Queue()

    async def exhausted(sandbox_id: SandboxId) -> None:
        asked.put_nowait(sandbox_id)
        raise ConflictError("It cannot be now", hint="Try again.")

    box = await box_of_ann(service, "A100")
    quotas = quotas_of(service, principals, clock, exhausted)
    clock.now += 101.0
    metering = asyncio.create_task(quotas.run())
    try:
        async with asyncio.timeout(60):
            assert await asked.get() == box
            clock.now += CHARGE_EVERY_S + 1
            assert quotas.usage("ann").gpu_seconds >= 132.0
            service.live(box).tell(gpu_note="something has changed")
            assert await asked.get() == box
    finally:
        metering.cancel()
        await asyncio.gather(metering, return_exceptions=True)
    assert principals.gpu_seconds("ann") >= 132.0


async def test_one_that_is_slow_to_end_holds_up_no_other(
    service: SandboxService, principals: Principals, clock: Clock
) -> None:
    """What others have is metered, and taken away, while a sandbox of many gigabytes is being saved."""
    asked: asyncio.Queue[SandboxId] = asyncio.Queue()

    async def exhausted(sandbox_id: SandboxId) -> None:
        asked.put_nowait(sandbox_id)
        await asyncio.Event().wait()

    boxes = {await box_of_ann(service, "A100"), await box_of_ann(service, "A100")}
    quotas = quotas_of(service, principals, clock, exhausted)
    clock.now += 101.0
    metering = asyncio.create_task(quotas.run())
    try:
        async with asyncio.timeout(60):
            assert {await asked.get(), await asked.get()} == boxes
    finally:
        metering.cancel()
        await asyncio.gather(metering, return_exceptions=True)
