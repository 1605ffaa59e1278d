"""What is told of a GPU that is lost, and of a share that is not kept to. The driver is the test's own."""

import sys
from collections.abc import AsyncIterator, Sequence

import pytest

from tests.leaks import Places
from warmcell.extension.keeper.gpu_watch import GpuWatch
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.gpus.base import GpuProcess
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.models import GIB, GpuDevice, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend


class Driver:
    """One A100, and who computes on it."""

    problem = ""

    def __init__(self) -> None:
        self.listed: tuple[GpuDevice, ...] = (
            GpuDevice(uuid="GPU-1", index=3, name="A100", memory_total_bytes=80 * GIB),
        )
        self.computing: list[GpuProcess] = []

    async def devices(self) -> Sequence[GpuDevice]:
        return self.listed

    async def processes(self, device: GpuDevice) -> Sequence[GpuProcess]:
        return self.computing


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
async def service(driver: Driver, places: Places) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends={"fake": FakeBackend()},
        default_backend="fake",
        gpus=GpuPool(driver, LeaseDirectory(places.leases), most_parts=2),
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(),
        prepared_per_template=0,
    )
    yield made
    await made.close()


def spec(gpu: str) -> SandboxSpec:
    return SandboxSpec(python=sys.executable, network="host", preload=(), gpu=gpu)


async def test_a_lost_gpu_is_told_to_who_has_it(service: SandboxService, driver: Driver) -> None:
    """With the cure, once, and no more when it is there again."""
    info, watch = await service.create(spec("A100"), owner="notebook"), GpuWatch(service)
    await watch.look()
    assert service.info(info.id).gpu_note == ""
    there, driver.listed = driver.listed, ()
    await watch.look()
    assert service.info(info.id).gpu_note.startswith("GPU 3 does not answer any more. Shut the kernel down")
    driver.listed = there
    await watch.look()
    assert service.info(info.id).gpu_note == ""


async def test_a_share_that_is_not_kept_to_is_told(
    service: SandboxService, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one's own processes; what others do on the device is theirs."""
    info, watch = await service.create(spec("A100/2"), owner="notebook"), GpuWatch(service)
    mine = 4711
    monkeypatch.setattr(type(service.live(info.id).instance), "processes", lambda self: (mine,))
    for used, others, told in ((39, 0, ""), (42, 0, ""), (39, 60, ""), (50, 0, "It uses 50.0 GiB of GPU 3")):
        driver.computing = [
            GpuProcess(pid=mine, memory_bytes=used * GIB),
            GpuProcess(pid=1, memory_bytes=others * GIB),
        ]
        await watch.look()
        assert service.info(info.id).gpu_note[:25] == told[:25]
