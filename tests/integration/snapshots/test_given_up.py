"""A kernel is put back, and that is given up: it is what it was or what it was to be, and all else goes."""

import asyncio
import contextlib
import types
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.snapshots.notebooks import Page, body, configure, page, processes_of
from tests.leaks import Places
from warmcell.extension import config
from warmcell.extension.keeper.kernel import KernelRequest
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.wiring import Wiring
from warmcell.sandbox.errors import ConflictError, StorageFullError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]


class Here:
    """A keeper's own parts in this process, with one kernel that has a snapshot `old`."""

    def __init__(self, places: Places, service: SandboxService, memory: KernelMemory, opened: Page) -> None:
        self.places, self.service, self.memory, self.page = places, service, memory, opened
        (self.sandbox_id,) = (info.id for info in service.infos())


@pytest.fixture
async def here(places: Places, tmp_path: Path) -> AsyncIterator[Here]:
    configure(places, simulated_gpus=[{"name": "A100", "memory": "80GiB"}])
    paths = Paths.default().make()
    wiring = Wiring(config.settings(), paths)
    service = wiring.service()
    kernels = Kernels(service, paths)
    memory = KernelMemory(service, kernels, paths)
    asked = body(tmp_path)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(wiring.nursery.close)
        stack.push_async_callback(service.close)
        stack.push_async_callback(kernels.close)
        await service.memory.open()
        await kernels.start(KernelRequest.from_json(asked), owner_pid=0)
        opened = await stack.enter_async_context(page(asked["connection"]))
        await opened.ready()
        made = Here(places, service, memory, opened)
        await opened.run("x = 'then'")
        await memory.snapshot(made.sandbox_id, name="old")
        await opened.run("x = 'now'")
        yield made
        await kernels.remove(asked["kernel_id"])


class GivenUp:
    """Has a coroutine's task cancelled at one of the moments in which it waits."""

    def __init__(self) -> None:
        self.at = self.seen = 0

    async def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        self.seen = 0
        return await self._steps(work)

    @types.coroutine
    def _steps(self, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        given: BaseException | None = None
        while True:
            try:
                waits = work.send(None) if given is None else work.throw(given)
            except StopIteration as end:
                return end.value
            self.seen += 1
            if self.seen == self.at:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            given = None
            try:
                yield waits
            except BaseException as error:
                given = error


async def test_a_restore_that_is_given_up_at_any_moment(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page goes on with the kernel as it is then, and nothing else of it is left."""
    steps = GivenUp()
    undo = here.service.memory.undo
    monkeypatch.setattr(here.service.memory, "undo", lambda *how: steps.run(undo(*how)))
    ends: list[bool] = []
    while steps.seen >= steps.at:
        steps.at += 1
        try:
            await here.memory.restore(here.sandbox_id, "old")
            ends.append(True)
        except ConflictError:
            ends.append(False)
        await here.service.memory.leave(here.sandbox_id)
        assert len(list(Paths.default().sandboxes.iterdir())) == 1, steps.at
        said = await here.page.run("print(x); x = 'now'", timeout=60)
        assert said == ("then" if ends[-1] else "now"), steps.at
    assert steps.at > 10
    assert ends[-1]
    assert not all(ends)


@pytest.mark.parametrize("verb", ["suspend", "resume", "snapshot"])
async def test_what_is_given_up_at_any_moment_loses_nothing(
    here: Here, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The kernel runs on or sleeps, and its next cell finds what the one before left; a snapshot is whole or none."""
    steps, memory = GivenUp(), here.service.memory
    work = "save" if verb == "snapshot" else verb
    undisturbed = getattr(memory, work)
    await here.page.run("x = 0")
    while steps.seen >= steps.at:
        steps.at += 1
        if verb == "resume":
            await here.memory.suspend(here.sandbox_id)
        known = {info.id for info in memory.store.infos(kind="named")}
        with monkeypatch.context() as patched, contextlib.suppress(ConflictError):
            patched.setattr(memory, work, lambda *what, **how: steps.run(undisturbed(*what, **how)))
            if verb == "snapshot":
                known.add((await here.memory.snapshot(here.sandbox_id, name=f"after {steps.at}")).id)
            else:
                await getattr(here.memory, verb)(here.sandbox_id)
        said = await here.page.run("x += 1; print(x)", timeout=60)
        assert (steps.at, said) == (steps.at, str(steps.at))
        async with here.service.live(here.sandbox_id).lock:  # Its page may have its answer before all is told.
            assert here.service.info(here.sandbox_id).state is State.RUNNING
        await memory.leave(here.sandbox_id)
        assert len(list(Paths.default().sandboxes.iterdir())) == 1, steps.at
        assert {info.id for info in memory.store.infos(kind="named")} == known
    assert steps.at > 5


@pytest.mark.parametrize("failure", [StorageFullError("The disk is full", hint="Free space."), None])
async def test_what_is_back_runs_although_its_snapshot_cannot_be_marked(
    here: Here, monkeypatch: pytest.MonkeyPatch, failure: StorageFullError | None
) -> None:
    """Its kernel answers already: a full disk, or who gives it up then, neither stops it nor takes its GPUs."""
    memory = here.service.memory
    outlive = memory._outlive
    await here.memory.suspend(here.sandbox_id)
    asking: asyncio.Task[Any]

    async def cut_short(snapshot: SnapshotId) -> None:
        if failure is not None:
            raise failure
        asking.cancel()
        await outlive(snapshot)

    monkeypatch.setattr(memory, "_outlive", cut_short)
    asking = asyncio.create_task(here.memory.resume(here.sandbox_id))
    await asyncio.wait({asking})
    assert asking.cancelled() == (failure is None)
    assert here.service.info(here.sandbox_id).state is State.RUNNING
    assert await here.page.run("print(x)", timeout=60) == "now"


@pytest.mark.parametrize("verb", ["suspend", "fork"])
async def test_what_is_given_up_too_late_leaves_nothing_to_be_done(
    here: Here, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Whoever asked goes when it is saved already: nobody else keeps its GPUs from others, or its files on the disk."""
    service, store = here.service, here.service.memory.store
    await service._gpus.lease("any", holder=here.sandbox_id)
    amend = service.memory._amend
    asking: asyncio.Task[Any]

    async def amend_as_it_is_given_up(*what: Any) -> Any:
        asking.cancel()
        return await amend(*what)

    monkeypatch.setattr(service.memory, "_amend", amend_as_it_is_given_up)
    asking = asyncio.create_task(
        here.memory.suspend(here.sandbox_id) if verb == "suspend" else here.memory.fork(here.sandbox_id, 1)
    )
    with pytest.raises(asyncio.CancelledError):
        await asking
    if verb == "suspend":
        assert service.info(here.sandbox_id).state is State.SUSPENDED
        assert not service._gpus.holds(here.sandbox_id)
    assert [info.id for info in service.infos()] == [here.sandbox_id]
    assert store.infos(kind="fork") == []


async def test_a_removal_waits_for_what_the_kernel_was_before(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox of before is removed while nobody waits for it, but who removes the kernel finds nothing left."""
    may_go, discard = asyncio.Event(), LiveSandbox.discard

    async def held(box: LiveSandbox) -> None:
        await may_go.wait()
        await discard(box)

    with monkeypatch.context() as patched:
        patched.setattr(LiveSandbox, "discard", held)
        await here.memory.restore(here.sandbox_id, "old")
    assert len(list(Paths.default().sandboxes.iterdir())) == 2
    removing = asyncio.create_task(here.service.stop(here.sandbox_id))
    await asyncio.wait({removing}, timeout=0.5)
    assert not removing.done()
    may_go.set()
    await asyncio.wait_for(removing, 60)
    assert list(Paths.default().sandboxes.iterdir()) == []
    assert processes_of(here.places) == []
