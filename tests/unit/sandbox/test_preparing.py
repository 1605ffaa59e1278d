"""What is prepared once a kernel is there, above a backend in memory."""

import asyncio
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.errors import OperationTimeoutError, SnapshotError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxSpec, SnapshotId, TemplateStatus
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend

SPEC = SandboxSpec(python=sys.executable, network="host", preload=("m",))


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


async def test_nobody_waits_for_a_template_that_could_not_be_made(
    service: SandboxService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sandbox was told how that came along elsewhere. Then it imports by itself, and the next one is wanted."""
    box = service._new(SPEC, owner="notebook")
    await service._bring_up(box, ())
    wanted: list[SandboxSpec] = []

    async def ensure(spec: SandboxSpec) -> None:
        box.tell(template=TemplateStatus(name=spec.template, state="importing", importing="m"))

    monkeypatch.setattr(service._templates, "ensure", ensure)
    monkeypatch.setattr(service._pool, "want", lambda spec, cheap: wanted.append(spec))
    try:
        async with asyncio.timeout(60):
            await service._keep_warm(box)
        assert box.info.template is not None
        assert box.info.template.state == "ready"
        assert len(wanted) == 1
    finally:
        await box.stop()


@pytest.mark.parametrize("failures", [0, 1, 2])
async def test_a_template_that_was_saved_is_there_whatever_becomes_of_its_sandbox(
    service: SandboxService, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """One that does not end in time loses nothing; saving is tried twice, since a busy machine may be in its way."""
    saves = 0

    async def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    async def start_kernel(box: LiveSandbox, **kwargs: Any) -> None:
        kernel: Any = SimpleNamespace(alive=True)
        box.kernel = kernel

    async def save(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves <= failures:
            raise SnapshotError("not now")
        return SimpleNamespace(id=SnapshotId("made"))

    async def stop(box: LiveSandbox) -> None:
        raise OperationTimeoutError("it waits for a device")

    monkeypatch.setattr(service, "_bring_up_prepared", nothing)
    monkeypatch.setattr(service.memory, "save", save)
    monkeypatch.setattr(LiveSandbox, "start_kernel", start_kernel)
    monkeypatch.setattr(LiveSandbox, "stop", stop)
    if failures < 2:
        assert await service._make_template(SPEC, {}) == "made"
    else:
        with pytest.raises(OperationTimeoutError):
            await service._make_template(SPEC, {})
    assert saves == min(failures + 1, 2)
