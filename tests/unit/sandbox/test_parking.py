"""A sandbox whose GPU is given back while it lives, above a backend and a driver of the tests' own."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from tests.leaks import Places
from tests.unit.sandbox.made_parking import Here, made_here
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.parking import ParkingPlace
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import GIB, GpuDevice, SandboxId
from warmcell.sandbox.reports import EngineReport
from warmcell.sandbox.snapshots.base import Dumped
from warmcell.sandbox.testing.fakes import FakeBackend, FakeInstance


@pytest.fixture
async def here(places: Places) -> AsyncIterator[Here]:
    async with made_here(places) as made:
        yield made


async def test_its_lease_goes_when_the_gpu_is_empty_and_not_before(here: Here) -> None:
    """Its kernel is held first; with a GPU again it goes on only when all is back."""
    box = here.box
    here.engine.may_end.clear()
    parking = asyncio.create_task(here.service.park(box.info.id))
    await here.engine.begun.wait()
    assert await here.held() == [box.info.id, None]
    here.engine.may_end.set()
    info = await parking
    assert info.parked is not None
    assert (info.gpus, info.parked.vram_bytes, here.service.parked_bytes()) == ((), GIB, GIB)
    assert await here.held() == [None, None]
    info = await here.service.resume(box.info.id)
    assert (info.parked, len(info.gpus), here.front.asked) == (None, 1, ["pause", "sleep", "go_on"])
    assert await here.held() == [box.info.id, None]


async def test_what_cannot_be_parked_goes_on_and_keeps_its_gpu(here: Here) -> None:
    """The driver refuses; it is wanted again; the host has no room, which is seen before the kernel is held."""
    sandbox_id = here.box.info.id
    here.engine.fails["park"] = errors.UnsupportedOperationError("It has managed memory", hint="Free it.")
    with pytest.raises(errors.UnsupportedOperationError, match="managed memory"):
        await here.service.park(sandbox_id)
    here.engine.fails.clear()
    with pytest.raises(errors.ConflictError, match="wanted again"):
        await here.service.park(sandbox_id, unless=lambda: True)
    assert here.front.asked == ["pause", "go_on"] * 2
    here.free_bytes = GIB // 2
    with pytest.raises(errors.CapacityError, match=r"0\.5 GiB of the host"):
        await here.service.park(sandbox_id)
    assert here.front.asked == ["pause", "go_on"] * 2
    assert here.box.info.parked is None
    assert await here.held() == [sandbox_id, None]


async def test_what_a_kernel_of_its_own_has_on_a_gpu_stays_there(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither parked, saved, suspended nor moved: said before anything is touched. A made-up GPU is nobody's matter."""
    can = dataclasses.replace(FakeBackend().capabilities, own_kernel=True)
    monkeypatch.setattr(FakeBackend, "capabilities", can)
    sandbox_id, (gpu,) = here.box.info.id, here.box.gpus
    service, other = here.service, (await here.gpus.status())[1]["uuid"]
    real = (dataclasses.replace(gpu, simulated=False, device_nodes=("/dev/nvidia0",)),)
    here.box.gpus = real
    for attempt in (
        lambda: service.park(sandbox_id),
        lambda: service.suspend(sandbox_id),
        lambda: service.snapshot(sandbox_id),
        lambda: service.change_gpu(sandbox_id, other),
        lambda: service.change_gpu(sandbox_id, None),
    ):
        with pytest.raises(errors.UnsupportedOperationError, match="keeps the GPU that it was made with") as refused:
            await attempt()
        assert "bubblewrap" in refused.value.hint
    assert (here.front.asked, here.engine.done, here.box.gpus) == ([], [], real)
    assert (here.box.info.state, await here.held()) == (State.RUNNING, [sandbox_id, None])
    here.box.gpus = (gpu,)
    assert (await service.park(sandbox_id)).parked is not None


async def test_remote_kernels_leave_half_of_the_room_to_notebooks(here: Here) -> None:
    """Nobody can have them go to disk, so that they would keep it for good."""
    here.service.parking = ParkingPlace(here.engine, 3 * GIB // 2, lambda: here.free_bytes)
    here.box.tell(owner="remote")
    with pytest.raises(errors.CapacityError, match=r"0\.8 GiB of the host's memory may still be used") as refused:
        await here.service.park(here.box.info.id)
    assert "%remote close" in refused.value.hint
    here.box.tell(owner="notebook")
    assert (await here.service.park(here.box.info.id)).parked is not None


async def test_what_cannot_come_back_stays_parked_and_holds_no_gpu(here: Here) -> None:
    """Others can have it meanwhile; the next try has it go on."""
    sandbox_id = here.box.info.id
    await here.service.park(sandbox_id)
    here.engine.fails["unpark"] = errors.CapacityError("There is no room on the GPU", hint="Make some.")
    with pytest.raises(errors.CapacityError):
        await here.service.resume(sandbox_id)
    assert here.box.info.parked is not None
    assert here.front.asked == ["pause", "sleep"]
    assert await here.held() == [None, None]
    here.engine.fails.clear()
    assert (await here.service.resume(sandbox_id)).parked is None


async def test_clients_that_cannot_go_on_yet_do_so_with_the_next_request(here: Here) -> None:
    """The kernel was slow to answer: what it had is back on a GPU, which it keeps, and is not parked a second time."""
    sandbox_id = here.box.info.id
    await here.service.park(sandbox_id)
    here.front.fails = errors.OperationTimeoutError("The kernel did not answer", hint="Try it again.")
    with pytest.raises(errors.OperationTimeoutError):
        await here.service.resume(sandbox_id)
    assert here.box.info.parked is None
    here.front.fails = None
    await here.service.resume(sandbox_id)
    await here.service.resume(sandbox_id)
    assert here.front.asked == ["pause", "sleep", "go_on", "go_on"]
    assert here.engine.done == ["park", "unpark"]
    assert await here.held() == [sandbox_id, None]


async def test_given_up_half_way_it_is_brought_back(here: Here) -> None:
    """A driver cannot be stopped, so it is let finish, and what it did is undone."""
    here.engine.may_end.clear()
    parking = asyncio.create_task(here.service.park(here.box.info.id))
    await here.engine.begun.wait()
    parking.cancel()
    here.engine.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await parking
    assert here.engine.done == ["park", "unpark"]
    assert here.front.asked == ["pause", "go_on"]
    assert (here.box.info.parked, await here.held()) == (None, [here.box.info.id, None])


async def test_given_up_on_its_way_back_it_is_taken_back(here: Here) -> None:
    """A driver goes on, and what it brings back stays where it is: nobody else gets that GPU."""
    sandbox_id = here.box.info.id
    await here.service.park(sandbox_id)
    here.engine.begun.clear()
    here.engine.may_end.clear()
    resuming = asyncio.create_task(here.service.resume(sandbox_id))
    await here.engine.begun.wait()
    resuming.cancel()
    await asyncio.sleep(0)
    assert await here.held() == [sandbox_id, None]
    here.engine.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await resuming
    assert (here.box.info.parked, len(here.box.info.gpus)) == (None, 1)
    assert await here.held() == [sandbox_id, None]
    await here.service.resume(sandbox_id)
    assert here.engine.done == ["park", "unpark"]
    assert here.front.asked == ["pause", "sleep", "go_on"]


async def test_a_driver_that_does_not_answer_keeps_the_gpu(here: Here) -> None:
    """It may bring back what was there at any time; the next try finds out."""
    sandbox_id = here.box.info.id
    await here.service.park(sandbox_id)
    here.engine.fails["unpark"] = errors.OperationTimeoutError("The driver did not answer", hint="Wait.")
    with pytest.raises(errors.OperationTimeoutError):
        await here.service.resume(sandbox_id)
    assert here.box.info.parked is not None
    assert await here.held() == [sandbox_id, None]
    here.engine.fails.clear()
    assert (await here.service.resume(sandbox_id)).parked is None
    assert await here.held() == [sandbox_id, None]


async def test_another_gpu_is_leased_before_the_old_one_goes(here: Here) -> None:
    """If it cannot go on there it goes on where it was, and nothing else has changed."""
    sandbox_id, (had,) = here.box.info.id, here.box.gpus
    other = (await here.gpus.status())[1]["uuid"]
    here.engine.fails["unpark"] = errors.UnsupportedOperationError("The driver is against it", hint="Ask it.")

    async def only_once(step: str) -> None:
        here.engine.done.append(step)
        if step == "unpark" and here.engine.done.count("unpark") == 1:
            raise here.engine.fails["unpark"]

    here.engine._step = only_once  # type: ignore[method-assign]
    with pytest.raises(errors.UnsupportedOperationError, match="against it"):
        await here.service.change_gpu(sandbox_id, other)
    assert here.engine.done == ["park", "unpark", "unpark"]
    assert (here.box.gpus, here.box.spec.gpu, await here.held()) == ((had,), "A100", [sandbox_id, None])
    info = await here.service.change_gpu(sandbox_id, other)
    assert ([gpu.uuid for gpu in info.gpus], info.gpu, await here.held()) == ([other], other, [None, sandbox_id])
    assert here.front.asked == ["pause", "go_on"] * 2


async def test_it_sees_what_it_has_and_nothing_while_others_have_it(here: Here) -> None:
    """Where its sandbox can be shown others: no device while it is parked, and each one that it gets before it is used.
    What it cannot go on with it does not see either.
    """
    instance = here.box.instance
    assert isinstance(instance, FakeInstance)
    instance.shows_others = True
    sandbox_id = here.box.info.id
    (first,) = here.box.gpus
    await here.service.park(sandbox_id)
    assert instance.gpus == ()
    await here.gpus.lease(first.uuid, holder=SandboxId("other"))
    here.engine.fails["unpark"] = errors.CapacityError("No room", hint="Wait.")
    with pytest.raises(errors.CapacityError):
        await here.service.resume(sandbox_id)
    assert instance.gpus == ()
    here.engine.fails.clear()
    await here.service.resume(sandbox_id)
    (second,) = here.box.gpus
    assert instance.gpus == (second,) != (first,)
    here.gpus.release(SandboxId("other"))
    await here.service.change_gpu(sandbox_id, first.uuid)
    assert instance.gpus == here.box.gpus == (first,)
    here.engine.fails["unpark"] = errors.UnsupportedOperationError("Not there", hint="Stay.")
    with pytest.raises(errors.UnsupportedOperationError):
        await here.service.change_gpu(sandbox_id, second.uuid)
    assert (instance.gpus, await here.held()) == ((), [None, None])


async def test_what_has_its_gpu_open_besides_keeps_it(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has parked all that it knows of, and a program would use the device that others have."""

    async def refuse(gpus: Sequence[GpuDevice]) -> None:
        if not gpus:
            raise errors.UnsupportedOperationError("Process 7 has it open", hint="End it.")

    monkeypatch.setattr(here.box.instance, "shows_others", True)
    monkeypatch.setattr(here.box.instance, "show_gpus", refuse)
    with pytest.raises(errors.UnsupportedOperationError, match="has it open"):
        await here.service.park(here.box.info.id)
    assert here.engine.done == ["park", "unpark"]
    assert here.front.asked == ["pause", "go_on"]
    assert (here.box.info.parked, await here.held()) == (None, [here.box.info.id, None])


class Snapshots:
    """An engine that saves nothing, at once."""

    name, whole, backends = "criu", False, ()

    async def probe(self) -> EngineReport:
        return EngineReport(name=self.name, ready=True)

    async def enroll(self, place: Any, *, template: bool = False) -> None:
        pass

    async def dump(self, place: Any, *, while_frozen: Callable[[], Awaitable[None]], **how: Any) -> Dumped:
        await while_frozen()
        return Dumped(image_bytes=1, memory_bytes=1, pids=(1,))

    async def settle(self, image: str) -> None:
        pass

    async def images(self) -> Sequence[object]:
        return ()

    async def drop(self, image: str) -> None:
        pass

    async def close(self) -> None:
        pass


@pytest.fixture
async def saving(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be saved."""
    monkeypatch.setattr("warmcell.sandbox.saved._serves", lambda engine, backend: True)
    engine: Any = Snapshots()
    here.service.memory._engine = engine
    await here.service.memory.open()


@pytest.mark.usefixtures("saving")
async def test_what_cannot_come_back_after_it_was_saved_is_parked(here: Here) -> None:
    """Another one has grown on that GPU meanwhile. The snapshot is good, the GPU is free, and the next cell tries."""
    memory, sandbox_id = here.service.memory, here.box.info.id
    here.engine.fails["unpark"] = errors.CapacityError("There is no room on the GPU", hint="Make some.")
    saved = await here.service.snapshot(sandbox_id, name="kept")
    assert [one.id for one in memory.store.infos()] == [saved.id]
    assert here.box.info.parked is not None
    assert here.front.asked == ["pause", "sleep"]
    assert await here.held() == [None, None]
    here.engine.fails.clear()
    assert (await here.service.resume(sandbox_id)).parked is None
    assert here.front.asked == ["pause", "sleep", "go_on"]


@pytest.mark.usefixtures("saving")
@pytest.mark.parametrize("stage", ["park", "unpark"])
async def test_given_up_while_it_is_saved_it_is_parked_if_it_cannot_come_back(here: Here, stage: str) -> None:
    """It does not go on with its memory in the host, where that was to go for a moment only."""
    sandbox_id = here.box.info.id
    here.engine.fails["unpark"] = errors.CapacityError("There is no room on the GPU", hint="Make some.")
    here.engine.stops_at = stage
    here.engine.may_end.clear()
    saving = asyncio.create_task(here.service.snapshot(sandbox_id, name="kept"))
    await here.engine.begun.wait()
    saving.cancel()
    await asyncio.wait({saving}, timeout=0.01)
    here.engine.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await saving
    assert here.engine.done == ["park", "unpark"]
    assert here.box.info.parked is not None
    assert (here.front.asked, await here.held()) == (["pause", "sleep"], [None, None])
    here.engine.fails.clear()
    assert (await here.service.resume(sandbox_id)).parked is None
    assert here.front.asked == ["pause", "sleep", "go_on"]


async def test_what_can_go_on_neither_there_nor_here_is_parked(here: Here) -> None:
    """Nor has it two GPUs then, or is held for ever."""
    sandbox_id, (first,) = here.box.info.id, here.box.gpus
    here.engine.fails["unpark"] = errors.CapacityError("There is no room on the GPU", hint="Make some.")
    other = next(one for one in await here.gpus.status() if one["uuid"] != first.uuid)["uuid"]
    with pytest.raises(errors.CapacityError):
        await here.service.change_gpu(sandbox_id, other)
    assert here.box.info.parked is not None
    assert await here.held() == [None, None]
    here.engine.fails.clear()
    assert (await here.service.resume(sandbox_id)).parked is None
    assert here.front.asked == ["pause", "sleep", "go_on"]


async def test_a_device_that_cannot_be_shown_is_free(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays parked, and goes on once it can."""

    async def refuse(gpus: Sequence[GpuDevice]) -> None:
        raise errors.UnsupportedOperationError("The system refuses it", hint="Restart the kernel.")

    await here.service.park(here.box.info.id)
    monkeypatch.setattr(here.box.instance, "shows_others", True)
    with monkeypatch.context() as refusing:
        refusing.setattr(here.box.instance, "show_gpus", refuse)
        with pytest.raises(errors.UnsupportedOperationError, match="refuses"):
            await here.service.resume(here.box.info.id)
    assert here.box.info.parked is not None
    assert await here.held() == [None, None]
    await here.service.resume(here.box.info.id)
    assert here.box.info.parked is None


async def test_torch_moves_what_the_driver_refuses_where_the_operator_lets_it(here: Here) -> None:
    """Its lease goes, but it comes back on the very device only; without room there it stays parked, and holds none."""
    sandbox_id, (had,) = here.box.info.id, here.box.gpus
    here.engine.fails["park"] = errors.UnsupportedOperationError("It has managed memory", hint="Free it.")
    here.service.parking = ParkingPlace(here.engine, 4 * GIB, lambda: here.free_bytes, by_torch=True)
    info = await here.service.park(sandbox_id)
    assert info.parked is not None
    assert (info.parked.by, info.parked.vram_bytes, info.gpus) == ("torch", 3 * GIB, ())
    assert here.front.asked == ["pause", "go_on", "pause cpu", "sleep"]
    assert await here.held() == [None, None]
    here.front.fails = errors.CapacityError("There is no room on the GPU", hint="Make some.")
    with pytest.raises(errors.CapacityError):
        await here.service.resume(sandbox_id)
    assert here.box.info.parked is not None
    assert await here.held() == [None, None]
    here.front.fails = errors.OperationTimeoutError("Perhaps it has gone on", hint="Look.")
    with pytest.raises(errors.OperationTimeoutError):
        await here.service.resume(sandbox_id)
    assert await here.held() == [sandbox_id, None]
    here.front.fails = None
    info = await here.service.resume(sandbox_id)
    assert ([gpu.uuid for gpu in info.gpus], info.parked) == ([had.uuid], None)
    assert "unpark" in here.engine.done


async def test_without_a_place_for_it_nothing_is_parked(here: Here) -> None:
    """Nor is what has no GPU, no kernel, or nobody who would notice that it is wanted again."""
    here.box.frontend = None
    with pytest.raises(errors.UnsupportedOperationError, match="Nobody would notice"):
        await here.service.park(here.box.info.id)
    here.box.frontend = here.front
    here.service.parking = None
    with pytest.raises(errors.UnsupportedOperationError, match="not parked here"):
        await here.service.park(here.box.info.id)
    here.service.parking = ParkingPlace(here.engine, GIB, lambda: GIB)
    here.box.tell(gpus=())
    with pytest.raises(errors.ConflictError, match="has no GPU"):
        await here.service.park(here.box.info.id)
    assert here.front.asked == []
