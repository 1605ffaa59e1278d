"""A fork that nobody waits for any more, or of which one clone cannot be made: all of them, or none."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from warmcell.extension.keeper.kernel import KernelRequest
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.sandbox.errors import SandboxStartError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo, SandboxSpec, SnapshotId
from warmcell.sandbox.paths import Paths

SOURCE = SandboxId("a" * 12)


class Machine:
    """Kernels and sandboxes of which the first clone comes up, and the second when it is let."""

    def __init__(self) -> None:
        request = KernelRequest(kernel_id="source", connection={}, spec=SandboxSpec(python="/usr/bin/python3"))
        self.source = SimpleNamespace(request=request, sandbox_id=SOURCE)
        self.there: set[str] = set()
        self.held, self.holds = asyncio.Event(), asyncio.Event()
        self.error: Exception | None = None
        manifest = SimpleNamespace(info=SimpleNamespace(id=SnapshotId("b" * 12)))
        self.memory: Any = SimpleNamespace(store=SimpleNamespace(get=lambda ref, kernel_id: manifest))
        self.template_front = self.rehearse = self.front_of = self.adopted = None

    def of(self, sandbox_id: SandboxId) -> Any:
        return self.source

    async def add(self, request: KernelRequest) -> Any:
        self.there.add(request.kernel_id)
        return SimpleNamespace(request=request)

    def note(self, kernel: object) -> None:
        pass

    async def remove(self, kernel_id: str) -> None:
        await asyncio.sleep(0)
        self.there.remove(kernel_id)

    async def create(self, spec: SandboxSpec, *, kernel_id: str, owner: str, **asked: Any) -> SandboxInfo:
        if len(self.there) > 1:
            self.holds.set()
            await self.held.wait()
            if self.error is not None:
                raise self.error
        return SandboxInfo(
            id=SandboxId(kernel_id[:12]),
            state=State.RUNNING,
            backend="bubblewrap",
            isolated=True,
            owner=owner,
            kernel_id=kernel_id,
        )


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def memory(machine: Machine, tmp_path: Path) -> KernelMemory:
    everything: Any = machine
    return KernelMemory(everything, everything, Paths(runtime=tmp_path, state=tmp_path, leases=tmp_path))


async def fork(memory: KernelMemory, machine: Machine) -> "asyncio.Task[list[SandboxInfo]]":
    """A fork of two, as far as one of them is there and the other one is held."""
    forking = asyncio.create_task(memory.fork(SOURCE, 2, ref="saved"))
    async with asyncio.timeout(10):
        await machine.holds.wait()
    return forking


async def test_all_of_them(memory: KernelMemory, machine: Machine) -> None:
    """Both are there."""
    forking = await fork(memory, machine)
    machine.held.set()
    assert {one.kernel_id for one in await forking} == machine.there
    assert len(machine.there) == 2


async def test_one_that_fails_leaves_none(memory: KernelMemory, machine: Machine) -> None:
    """The other one goes, and what went wrong is told."""
    forking = await fork(memory, machine)
    machine.error = SandboxStartError("no", hint="Try again.")
    machine.held.set()
    with pytest.raises(SandboxStartError):
        await forking
    assert machine.there == set()


async def test_one_that_is_given_up_leaves_none(memory: KernelMemory, machine: Machine) -> None:
    """Whoever asked hangs up: neither the one that is there stays, nor the one that is under way."""
    forking = await fork(memory, machine)
    forking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forking
    assert machine.there == set()
