"""A service with a sandbox that can be parked, above a backend and a driver of the tests' own."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.leaks import Places
from warmcell.sandbox import errors
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.parking import ParkingPlace, SimulatedParking
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import GIB, GpuDevice, Parked, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend

KINDS = [{"name": "A100", "memory": "80GiB", "count": 2, "used": "1GiB"}]


class Engine(SimulatedParking):
    """A driver that fails when it is told to, or takes until it is let."""

    def __init__(self) -> None:
        self.fails: dict[str, errors.WarmcellError] = {}
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.begun = asyncio.Event()
        self.stops_at = ""
        """The step that waits until it is let; empty: each."""
        self.done: list[str] = []

    async def park(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> Parked:
        await self._step("park")
        return await super().park(devices, pids)

    async def unpark(self, parked: Parked, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        await self._step("unpark")
        await super().unpark(parked, devices, pids)

    async def _step(self, step: str) -> None:
        if self.stops_at in ("", step):
            self.begun.set()
            await self.may_end.wait()
        self.done.append(step)
        if step in self.fails:
            raise self.fails[step]


@dataclass
class Front:
    """Who speaks with the kernel: notes what is asked."""

    asked: list[str] = field(default_factory=list)
    fails: errors.WarmcellError | None = None

    def record(self) -> Mapping[str, Any]:
        return {}

    async def pause(self, *, token: str, offload: str = "") -> int:
        self.asked.append(f"pause {offload}".rstrip())
        return 3 * GIB if offload else 0

    async def go_on(
        self,
        kernel: KernelProcess,
        record: Mapping[str, Any],
        *,
        token: str,
        restored: bool,
        clone: bool,
        undone: bool = False,
    ) -> None:
        self.asked.append("go_on")
        if self.fails is not None:
            raise self.fails

    async def undone(self) -> None:
        self.asked.append("undone")

    async def sleep(self, record: Mapping[str, Any]) -> None:
        self.asked.append("sleep")


@dataclass
class Here:
    """A service with one sandbox that has a kernel and a GPU."""

    service: SandboxService
    gpus: GpuPool
    engine: Engine
    box: LiveSandbox
    front: Front
    free_bytes: int = 10 * GIB

    async def held(self) -> list[str | None]:
        return [row["lease"] and row["lease"]["sandbox_id"] for row in await self.gpus.status()]


@contextlib.asynccontextmanager
async def made_here(places: Places) -> AsyncIterator[Here]:
    """It, until it is left."""
    gpus = GpuPool(SimulatedInventory(KINDS), LeaseDirectory(places.leases))
    engine, front = Engine(), Front()
    service = SandboxService(
        backends={"fake": FakeBackend()},
        default_backend="fake",
        gpus=gpus,
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(backends=("fake",)),
        prepared_per_template=0,
        parking=ParkingPlace(engine, 2 * GIB, lambda: made.free_bytes),
    )
    spec = SandboxSpec(python=sys.executable, network="host", preload=(), gpu="A100")
    info = await service.create(spec, owner="notebook")
    await service.start_kernel(info.id, env={}, cwd="/")
    box = service.live(info.id)
    box.frontend = front
    made = Here(service, gpus, engine, box, front)
    try:
        yield made
    finally:
        engine.may_end.set()  # Also where a test has failed in the middle of it.
        await service.close()
