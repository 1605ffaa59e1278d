"""What fails or is given up while GPU memory is moved: a kernel works on what is leased for it, or is parked."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import pytest

from tests.leaks import Places
from tests.unit.sandbox.made_parking import Here, made_here
from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import to_its_end
from warmcell.sandbox.models import GpuDevice
from warmcell.sandbox.testing.fakes import FakeInstance

NO_ROOM = errors.CapacityError("There is no room on the GPU", hint="Make some.")
IN_USE = errors.UnsupportedOperationError("Process 7 has it open", hint="End it.")
GONE = FileNotFoundError("/dev/nvidia0")


class Window:
    """The devices that a sandbox sees. As with a real one, a change is carried out to its end, or not at all."""

    def __init__(self, instance: FakeInstance, gpus: tuple[GpuDevice, ...]) -> None:
        self.seen = gpus
        self.fails: dict[tuple[GpuDevice, ...], Exception] = {}
        """What it cannot come to see, and why."""
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.begun = asyncio.Event()
        instance.shows_others = True
        instance.show_gpus = self.show_gpus  # type: ignore[method-assign]

    async def show_gpus(self, gpus: Sequence[GpuDevice]) -> None:
        await to_its_end(self._change(tuple(gpus)))

    async def _change(self, gpus: tuple[GpuDevice, ...]) -> None:
        if gpus == self.seen:
            return
        self.begun.set()
        await self.may_end.wait()
        if gpus in self.fails:
            raise self.fails[gpus]
        self.seen = gpus


@pytest.fixture
async def here(places: Places) -> AsyncIterator[Here]:
    async with made_here(places) as made:
        yield made


@pytest.fixture
def window(here: Here) -> Window:
    instance = here.box.instance
    assert isinstance(instance, FakeInstance)
    return Window(instance, here.box.gpus)


async def given_up(what: Coroutine[Any, Any, object], begun: asyncio.Event, may_end: asyncio.Event) -> None:
    """Cancel it, twice, in the middle of a step, which then ends."""
    begun.clear()
    may_end.clear()
    work = asyncio.create_task(what)
    await begun.wait()
    work.cancel()
    await asyncio.wait({work}, timeout=0.01)
    work.cancel()
    await asyncio.wait({work}, timeout=0.01)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await work


async def other_than(here: Here, gpu: GpuDevice) -> GpuDevice:
    return next(one for one in await here.gpus.devices() if one.uuid != gpu.uuid)


async def held(here: Here, gpu: GpuDevice) -> bool:
    """Whether this one, and no other, is leased for the sandbox."""
    rows = await here.gpus.status()
    mine = [row["uuid"] for row in rows if row["lease"] and row["lease"]["sandbox_id"] == here.box.info.id]
    return mine == [gpu.uuid]


@pytest.mark.parametrize("why", [IN_USE, GONE], ids=["in use", "gone"])
async def test_what_cannot_be_hidden_has_its_gpu_back(here: Here, window: Window, why: Exception) -> None:
    """Whatever kind of failure that is."""
    (had,) = here.box.gpus
    window.fails[()] = why
    with pytest.raises(type(why)):
        await here.service.park(here.box.info.id)
    assert (here.engine.done, here.front.asked) == (["park", "unpark"], ["pause", "go_on"])
    assert (here.box.info.parked, window.seen, await held(here, had)) == (None, (had,), True)


async def test_what_can_neither_be_hidden_nor_come_back_is_parked(here: Here, window: Window) -> None:
    """It keeps the GPU that it sees, and goes on there once it can."""
    (had,) = here.box.gpus
    window.fails[()] = IN_USE
    here.engine.fails["unpark"] = NO_ROOM
    with pytest.raises(errors.UnsupportedOperationError, match="has it open"):
        await here.service.park(here.box.info.id)
    assert here.box.info.parked is not None
    assert here.front.asked == ["pause", "sleep"]
    assert (window.seen, await held(here, had)) == ((had,), True)
    here.engine.fails.clear()
    assert (await here.service.resume(here.box.info.id)).parked is None
    assert here.front.asked == ["pause", "sleep", "go_on"]
    assert await held(here, had)


async def test_given_up_while_it_is_hidden_it_has_its_gpu_back(here: Here, window: Window) -> None:
    """The device is hidden all the same, and shown again before its kernel goes on."""
    (had,) = here.box.gpus
    await given_up(here.service.park(here.box.info.id), window.begun, window.may_end)
    assert (here.engine.done, here.front.asked) == (["park", "unpark"], ["pause", "go_on"])
    assert (here.box.info.parked, window.seen, await held(here, had)) == (None, (had,), True)


@pytest.mark.parametrize("step", ["park", "hide"])
async def test_given_up_and_not_back_it_is_parked(here: Here, window: Window, step: str) -> None:
    """It does not go on with its memory in the host; its GPU is free."""
    here.engine.fails["unpark"] = NO_ROOM
    where = here.engine if step == "park" else window
    await given_up(here.service.park(here.box.info.id), where.begun, where.may_end)
    assert here.box.info.parked is not None
    assert here.front.asked == ["pause", "sleep"]
    assert (window.seen, await here.held()) == ((), [None, None])
    here.engine.fails.clear()
    assert (await here.service.resume(here.box.info.id)).parked is None
    assert here.front.asked == ["pause", "sleep", "go_on"]


@pytest.mark.parametrize("step", ["park", "show", "unpark"])
async def test_a_change_that_is_given_up_is_whole(here: Here, window: Window, step: str) -> None:
    """What has begun ends, and the lease is of the GPU on which its kernel goes on."""
    other = await other_than(here, here.box.gpus[0])
    here.engine.stops_at = step
    where = window if step == "show" else here.engine
    await given_up(here.service.change_gpu(here.box.info.id, other.uuid), where.begun, where.may_end)
    assert (here.engine.done, here.front.asked) == (["park", "unpark"], ["pause", "go_on"])
    assert (here.box.gpus, here.box.info.gpus, here.box.info.gpu) == ((other,), (other,), other.uuid)
    assert (window.seen, await held(here, other)) == ((other,), True)


async def test_a_change_whose_kernel_is_slow_to_answer_has_its_lease(here: Here, window: Window) -> None:
    """What it has is on the other GPU by then."""
    other = await other_than(here, here.box.gpus[0])
    here.front.fails = errors.OperationTimeoutError("The kernel did not answer", hint="Try it again.")
    with pytest.raises(errors.OperationTimeoutError):
        await here.service.change_gpu(here.box.info.id, other.uuid)
    assert (here.box.gpus, here.box.spec.gpu, await held(here, other)) == ((other,), other.uuid, True)


async def test_a_change_to_a_node_that_is_gone_changes_nothing(here: Here, window: Window) -> None:
    """That is no failure of ours, and its kernel goes on where it was."""
    (had,) = here.box.gpus
    other = await other_than(here, had)
    window.fails[other,] = GONE
    with pytest.raises(FileNotFoundError):
        await here.service.change_gpu(here.box.info.id, other.uuid)
    assert (here.engine.done, here.front.asked) == (["park", "unpark"], ["pause", "go_on"])
    assert (here.box.gpus, window.seen, await held(here, had)) == ((had,), (had,), True)


async def test_what_it_sees_is_its_own_where_it_cannot_be_hidden(here: Here, window: Window) -> None:
    """It can go on neither there nor here. What it sees goes for nothing else before it is hidden."""
    (had,) = here.box.gpus
    other = await other_than(here, had)
    here.engine.fails["unpark"] = NO_ROOM
    window.fails |= {(had,): IN_USE, (): IN_USE}
    with pytest.raises(errors.CapacityError):
        await here.service.change_gpu(here.box.info.id, other.uuid)
    assert here.box.info.parked is not None
    assert (window.seen, await held(here, other)) == ((other,), True)
    here.box.spec = dataclasses.replace(here.box.spec, gpu=had.uuid)
    with pytest.raises(errors.UnsupportedOperationError, match="has it open"):
        await here.service.reopen(here.box.info.id)
    assert await held(here, other)
    window.fails.clear()
    await here.service.reopen(here.box.info.id)
    assert (window.seen, await held(here, had)) == ((had,), True)


async def test_a_driver_that_does_not_answer_keeps_the_other_gpu(here: Here, window: Window) -> None:
    """It may bring there at any time what it was asked for, and is asked for it nowhere else."""
    other = await other_than(here, here.box.gpus[0])
    here.engine.fails["unpark"] = errors.OperationTimeoutError("The driver did not answer", hint="Wait.")
    with pytest.raises(errors.OperationTimeoutError):
        await here.service.change_gpu(here.box.info.id, other.uuid)
    assert here.engine.done == ["park", "unpark"]
    assert here.box.info.parked is not None
    assert (here.front.asked, window.seen, await held(here, other)) == (["pause", "sleep"], (other,), True)
    here.engine.fails.clear()
    assert (await here.service.resume(here.box.info.id)).gpus == (other,)
    assert here.front.asked == ["pause", "sleep", "go_on"]


@pytest.mark.parametrize("can_be_hidden", [True, False])
async def test_a_wake_up_that_is_given_up_leaves_no_free_gpu_in_sight(
    here: Here, window: Window, can_be_hidden: bool
) -> None:
    """The device is shown all the same: it is hidden again before others can have it, or stays leased."""
    await here.service.park(here.box.info.id)
    if not can_be_hidden:
        window.fails[()] = GONE
    await given_up(here.service.resume(here.box.info.id), window.begun, window.may_end)
    assert here.box.info.parked is not None
    assert (window.seen == (), await here.held() == [None, None]) == (can_be_hidden, can_be_hidden)
    window.fails.clear()
    assert (await here.service.resume(here.box.info.id)).parked is None
    assert (window.seen, await held(here, here.box.gpus[0])) == (here.box.gpus, True)
    assert here.front.asked == ["pause", "sleep", "go_on"]
