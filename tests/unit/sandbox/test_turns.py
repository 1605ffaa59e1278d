"""Whose turn it is, without anything that starts; and starts of a service, of which many are asked for at once."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from tests.leaks import Places
from warmcell.sandbox import errors
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend, FakeInstance
from warmcell.sandbox.turns import Turns

AT_ONCE = 2


class Work:
    """Things to be done in turn, each of which lasts until it is told to end."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.begun: list[str] = []
        self.places: dict[str, int] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def do(self, name: str, whose: str, urgent: Callable[[], bool] = lambda: True) -> None:
        """One of them."""
        self._ends[name] = asyncio.Event()
        told = self.places.__setitem__
        async with self.turns.turn(whose, urgent=urgent, told=lambda place: told(name, place)):
            self.begun.append(name)
            await self._ends[name].wait()

    async def end(self, name: str) -> None:
        """Let one end, and the next one begin."""
        self._ends[name].set()
        await settle()


async def settle() -> None:
    """Let everything go on as far as it gets."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    """With one turn at a time; whoever still waits at the end is let go."""
    before = asyncio.all_tasks()
    yield Work(Turns(1))
    left = [task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def test_whoever_asks_for_much_does_not_keep_others_waiting(work: Work) -> None:
    """One of each is served in rotation; those of one in the order in which they came."""
    tasks = [asyncio.create_task(work.do(f"a{number}", "a")) for number in range(4)]
    await settle()
    tasks += [asyncio.create_task(work.do(name, name[0])) for name in ("b0", "b1", "c0")]
    await settle()
    while len(work.begun) < len(tasks):
        await work.end(work.begun[-1])
    assert work.begun == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]
    await work.end("a3")
    await asyncio.gather(*tasks)


async def test_one_that_hangs_does_not_hold_the_others_up() -> None:
    """After a while the next may begin; when it ends after all nothing more is free than before."""
    work = Work(Turns(1, longest_s=0.0))
    tasks = [asyncio.create_task(work.do(name, "a")) for name in ("hangs", "next", "last")]
    await settle()
    assert work.begun == ["hangs", "next", "last"]
    for name in ("last", "hangs", "next"):
        await work.end(name)
    await asyncio.gather(*tasks)
    assert work.turns._free == 1


async def test_each_is_told_how_many_are_before_it(work: Work) -> None:
    """From the moment on in which it has to wait; whoever need not wait is told nothing."""
    tasks = [asyncio.create_task(work.do(name, "a")) for name in ("first", "second", "third")]
    await settle()
    assert (work.begun, work.places) == (["first"], {"second": 0, "third": 1})
    for name in ("first", "second", "third"):
        await work.end(name)
    await asyncio.gather(*tasks)


async def test_what_nobody_waits_for_comes_last_until_somebody_does(work: Work) -> None:
    """That may change while it waits."""
    wanted: set[str] = set()
    tasks = [asyncio.create_task(work.do("first", "a"))]
    await settle()
    for name in ("idle", "other"):
        tasks.append(asyncio.create_task(work.do(name, "a", lambda name=name: name in wanted)))  # type: ignore[misc]
    tasks.append(asyncio.create_task(work.do("asked", "a")))
    await settle()
    await work.end("first")
    wanted.add("other")
    for name in ("asked", "other", "idle"):
        await work.end(name)
    assert work.begun == ["first", "asked", "other", "idle"]
    await asyncio.gather(*tasks)


async def test_whoever_gives_up_holds_nobody_up(work: Work) -> None:
    """Given up while it waits, while it has its turn, and in the very moment in which that comes."""
    tasks = {name: asyncio.create_task(work.do(name, "a")) for name in ("first", "waits", "comes", "last")}
    await settle()
    tasks["waits"].cancel()
    await settle()
    work._ends["first"].set()
    await asyncio.sleep(0)  # `first` has ended, and `comes` is let in but does not know yet.
    tasks["comes"].cancel()
    await settle()
    assert work.begun == ["first", "last"]
    tasks["last"].cancel()
    await settle()
    again = asyncio.create_task(work.do("again", "a"))
    await settle()
    assert work.begun[-1] == "again"
    await work.end("again")
    await again


class SlowBackend(FakeBackend):
    """Makes a sandbox when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.making: list[SandboxId] = []
        self.most = 0
        self.may = asyncio.Semaphore(0)

    async def create(self, spec: SandboxSpec, *, sandbox_id: SandboxId, **how: object) -> FakeInstance:
        """As any fake, one for each that it is allowed."""
        self.making.append(sandbox_id)
        self.most = max(self.most, len(self.making))
        try:
            await self.may.acquire()
            return await super().create(spec, sandbox_id=sandbox_id, **how)  # type: ignore[arg-type]
        finally:
            self.making.remove(sandbox_id)


@pytest.fixture
async def backend() -> SlowBackend:
    return SlowBackend()


@pytest.fixture
async def service(backend: SlowBackend, places: Places) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends={"fake": backend},
        default_backend="fake",
        gpus=GpuPool(SimulatedInventory([]), LeaseDirectory(places.leases)),
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(),
        prepared_per_template=0,
    )
    made._turns, made._notebooks_turns = Turns(AT_ONCE), Turns(AT_ONCE)
    yield made
    await made.close()
    assert not list((places.runtime / "s").iterdir())


def spec() -> SandboxSpec:
    return SandboxSpec(python=sys.executable, network="host", preload=())


async def until(service: SandboxService, what: Callable[[], bool]) -> None:
    """Wait for something that comes with a change of a sandbox."""
    changes = service.subscribe(backlog=None)
    try:
        while not what():
            assert await changes.next(timeout=60) is not None, "it did not come to be"
    finally:
        changes.close()


async def test_of_many_starts_at_once_few_are_under_way(service: SandboxService, backend: SlowBackend) -> None:
    """30 sandboxes all come up, two at a time. A notebook's in their midst waits for none of them, one that is given up
    leaves nothing, and each that waits says so.
    """
    burst = [asyncio.create_task(service.create(spec(), owner="client")) for _ in range(30)]

    def waiting() -> list[SandboxInfo]:
        return [one for one in service.infos() if one.phase is not None and one.phase.name == "queue"]

    await until(service, lambda: len(backend.making) == AT_ONCE and len(waiting()) == 30 - AT_ONCE)
    assert {one.state for one in waiting()} == {State.CREATING}
    told = {one.phase.detail for one in waiting() if one.phase is not None}
    assert told == {f"{number} before it" for number in range(30 - AT_ONCE)}

    notebook = asyncio.create_task(service.create(spec(), owner="notebook"))
    await until(service, lambda: len(backend.making) == AT_ONCE + 1)
    assert service.info(backend.making[-1]).owner == "notebook"

    given_up = waiting()[0].id
    await service.stop(given_up)
    assert given_up not in [one.id for one in service.infos()]

    backend.may.release()
    backend.may.release()
    backend.may.release()
    info = await notebook
    assert (info.state, "queue" in info.phases_ms) == (State.RUNNING, False)
    for _ in range(30):
        backend.may.release()
    done = await asyncio.gather(*burst, return_exceptions=True)
    made = [one for one in done if isinstance(one, SandboxInfo)]
    assert (len(made), backend.most) == (29, AT_ONCE + 1)
    assert [type(one) for one in done if not isinstance(one, SandboxInfo)] == [errors.ConflictError]
    assert {one.state for one in service.infos()} == {State.RUNNING}
    assert any(one.phases_ms.get("queue", 0.0) > 0 for one in made)
