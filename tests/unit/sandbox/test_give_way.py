"""When a sandbox gives way to a prepared one, above a backend in memory."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.leaks import Places
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend, FakeInstance


@pytest.fixture
async def service(places: Places) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends={"fake": FakeBackend()},
        default_backend="fake",
        gpus=GpuPool(SimulatedInventory([]), LeaseDirectory(places.leases)),
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(),
        prepared_per_template=0,
    )
    yield made
    await made.close()


async def box(service: SandboxService) -> LiveSandbox:
    info = await service.create(SandboxSpec(python=sys.executable, network="host"), owner="notebook")
    return service.live(info.id)


def behind(one: LiveSandbox) -> FakeInstance:
    instance = one.instance
    assert isinstance(instance, FakeInstance)
    return instance


async def test_what_is_behind_is_exchanged(service: SandboxService) -> None:
    """Under its own id it goes on as the other, host name and all, and its end is noticed."""
    one, other = await box(service), await box(service)
    mine, theirs = behind(one), behind(other)
    before, names = one.info.id, (one.named, other.named)
    mine.replaceable = True
    assert await one.give_way(other)
    assert (one.info.id, behind(one), behind(other)) == (before, theirs, mine)
    assert (other.named, one.named) == names
    theirs.die()
    await asyncio.wait_for(one.ended.wait(), 60)
    assert one.info.state is State.FAILED


async def test_one_that_has_something_stays_and_is_watched(service: SandboxService) -> None:
    """Nothing is exchanged, and its end is noticed as ever."""
    one, other = await box(service), await box(service)
    mine = behind(one)
    assert not await one.give_way(other)
    assert behind(one) is mine
    mine.die()
    await asyncio.wait_for(one.ended.wait(), 60)


async def test_one_that_is_asked_for_something_stays(service: SandboxService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs, or that was asked for while files were compared, is not left behind in the old one."""
    one, other = await box(service), await box(service)
    mine = behind(one)
    mine.replaceable = True
    channel = one._reached()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(channel.exec_stream(["sleep", "600"]))
        assert not await one.give_way(other)

    async def ask_meanwhile(instance: object, *, fork_server: bool) -> bool:
        await channel.hello()
        return True

    monkeypatch.setattr(mine, "can_be_replaced_by", ask_meanwhile)
    assert not await one.give_way(other)
    monkeypatch.undo()
    assert await one.give_way(other)


async def test_one_in_which_a_start_has_begun_meanwhile_stays(
    service: SandboxService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is forked into what was behind it would be looked for in the other."""
    one, other = await box(service), await box(service)
    mine = behind(one)
    begins = asyncio.Event()

    async def begin_meanwhile(instance: object, *, fork_server: bool) -> bool:
        started = asyncio.create_task(one.start_kernel(env={}, cwd=""))
        started.add_done_callback(lambda done: done.exception())
        await asyncio.sleep(0)
        begins.set()
        return True

    monkeypatch.setattr(mine, "can_be_replaced_by", begin_meanwhile)
    assert not await one.give_way(other)
    assert begins.is_set()
    assert behind(one) is mine


async def test_one_with_processes_beside_its_kernel_stays(service: SandboxService) -> None:
    """The fork server has forked them as well, and a backend cannot tell one from the kernel that comes up there."""
    one, other = await box(service), await box(service)
    mine = behind(one)
    mine.replaceable = True
    one.beside[2] = KernelProcess(pid=2, generation=1, socket_prefix=Path("2"), started_from="template")
    assert not await one.give_way(other)
    assert behind(one) is mine
    del one.beside[2]
    assert await one.give_way(other)


async def test_what_has_come_up_ahead_goes_along(service: SandboxService) -> None:
    """The kernel that waits in a prepared sandbox is there for whoever gets that."""
    one, other = await box(service), await box(service)
    behind(one).replaceable = True
    ours, theirs = socket.socketpair()
    with ours, theirs:
        other._ahead = ours
        assert await one.give_way(other)
        assert (one._ahead, one.has_ahead, other.has_ahead) == (ours, True, False)


@pytest.mark.parametrize("steps", range(1, 12, 2))
async def test_whoever_is_cancelled_while_it_ends_leaves_nothing(service: SandboxService, steps: int) -> None:
    """At whatever step: its directory is gone by then."""
    one = await box(service)
    ending = asyncio.create_task(one.stop())
    for _ in range(steps):
        await asyncio.sleep(0)
    ending.cancel()
    await asyncio.wait({ending})
    assert not one.directory.exists()
    assert one.ended.is_set()
