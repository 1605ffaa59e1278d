"""How many prepared sandboxes wait, above a backend in memory and with a clock of the test's own."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.errors import OperationTimeoutError, SandboxStartError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.pool import FORGOTTEN_S, MEMORY_S, MOST, WarmPool
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.starts import SETTLED_S, Starts
from warmcell.sandbox.testing.fakes import FakeBackend


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
async def service(backend: FakeBackend, places: Places) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends={"fake": backend},
        default_backend="fake",
        gpus=GpuPool(SimulatedInventory([]), LeaseDirectory(places.leases)),
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(),
        prepared_per_template=0,
    )
    yield made
    await made.close()
    assert not list((places.runtime / "s").iterdir())


@pytest.fixture
def clock() -> Clock:
    return Clock()


Pool = Callable[..., WarmPool]


@pytest.fixture
async def pool_of(service: SandboxService, clock: Clock) -> AsyncIterator[Pool]:
    made: list[WarmPool] = []

    def make(**options: Any) -> WarmPool:
        defaults = {"per_template": 1, "cap_bytes": 1000, "measure": lambda box: 1, "clock": clock}
        made.append(WarmPool(service._prepare, **{**defaults, **options}))
        return made[-1]

    yield make
    for pool in made:
        await pool.close()
        assert pool.prepared() == []


def spec(template: str = "default") -> SandboxSpec:
    return SandboxSpec(python=sys.executable, network="host", preload=("m",), template=template)


async def filled(pool: WarmPool, asked: SandboxSpec | None = None, *, cheap: bool = False) -> None:
    """Want it, and wait until the pool has done what it does about it."""
    if asked is not None:
        pool.want(asked, cheap=cheap)
    await asyncio.gather(*pool._filling.values())


async def take(pool: WarmPool, asked: SandboxSpec) -> bool:
    """Take one away, as a start does; whether there was one."""
    box = pool.take(asked.shape())
    if box is not None:
        await box.stop()
    return box is not None


async def burst(pool: WarmPool, count: int) -> int:
    """Take so many at once; how many were there."""
    taken = [pool.take(spec().shape()) for _ in range(count)]
    found = [box for box in taken if box is not None]
    for box in found:
        await box.stop()
    return len(found)


async def until(what: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(60):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_the_cap_evicts_what_was_wanted_least_recently(pool_of: Pool) -> None:
    """Three shapes of one byte under a cap of two: the first one goes, unless it was asked for again."""
    pool = pool_of(cap_bytes=2)
    first, second, third = map(spec, "abc")
    for asked in (first, second):
        await filled(pool, asked)
    pool.want(first)
    await filled(pool, third)
    assert {box.spec.template for box in pool.prepared()} == {"a", "c"}


async def test_what_never_fits_is_not_made_again_and_again(pool_of: Pool, backend: FakeBackend) -> None:
    """One that alone exceeds the cap is stopped and its shape left alone."""
    pool = pool_of(cap_bytes=2, measure=lambda box: 3)
    await filled(pool, spec())
    await filled(pool, spec())
    assert pool.prepared() == []
    assert len(backend.instances) == 1


async def test_what_grows_while_it_waits_goes(pool_of: Pool) -> None:
    """Pages that one shares become its own when others end; it is looked at from time to time, and the cap holds."""
    size = 1
    pool = pool_of(cap_bytes=2, measure=lambda box: size)
    await filled(pool, spec("old"))
    await filled(pool, spec("new"))
    await pool.tend()
    assert len(pool.prepared()) == 2
    size = 2
    await pool.tend()
    assert [box.spec.template for box in pool.prepared()] == ["new"]
    size = 3
    await pool.tend()
    assert pool.prepared() == []
    size = 1
    await filled(pool, spec("new"))
    assert len(pool.prepared()) == 1


async def test_a_prepared_sandbox_that_dies_is_nobodys_any_more(
    pool_of: Pool, backend: FakeBackend, places: Places
) -> None:
    """It does not wait in the pool to be found dead, and its directory is gone."""
    pool = pool_of()
    await filled(pool, spec())
    backend.instances[0].die()
    await until(lambda: not pool.prepared() and not list((places.runtime / "s").iterdir()))


async def test_ten_starts_one_second_apart_all_find_one(pool_of: Pool, clock: Clock) -> None:
    """One is there each time, and never more than come within the time of a refill."""
    pool = pool_of()
    await filled(pool, spec(), cheap=True)
    for _ in range(10):
        assert await take(pool, spec())
        await filled(pool)
        assert len(pool.prepared()) <= 3
        clock.now += 1


async def test_a_second_burst_comes_from_the_pool(pool_of: Pool, clock: Clock) -> None:
    """As many wait as came at once, up to a bound, and after a while without demand it is one again."""
    pool = pool_of()
    await filled(pool, spec(), cheap=True)
    assert await burst(pool, 6) == 1
    await filled(pool)
    assert len(pool.prepared()) == 6
    clock.now += 20
    await pool.tend()
    assert await burst(pool, 6) == 6
    await burst(pool, 100)
    await filled(pool)
    assert len(pool.prepared()) == MOST
    clock.now += MEMORY_S + 1
    await pool.tend()
    assert MEMORY_S < 55  # and it is looked at every few seconds
    assert len(pool.prepared()) == 1


async def test_no_burst_makes_it_exceed_its_cap(pool_of: Pool) -> None:
    """Nothing is made that does not fit, however many were asked for."""
    pool = pool_of(cap_bytes=35, measure=lambda box: 10)
    await filled(pool, spec(), cheap=True)
    await burst(pool, 8)
    await filled(pool)
    assert len(pool.prepared()) == 3


async def test_what_costs_much_does_not_follow_demand(pool_of: Pool) -> None:
    """A sandbox whose imports take seconds is prepared when a kernel is there, not for each that is asked for."""
    pool = pool_of()
    await filled(pool, spec())
    await burst(pool, 5)
    await filled(pool)
    assert pool.prepared() == []
    await filled(pool, spec())
    assert len(pool.prepared()) == 1


async def test_only_the_shape_that_was_used_last_waits_for_ever(pool_of: Pool, clock: Clock) -> None:
    """Others keep none after a long time, for they are there in an instant."""
    pool = pool_of()
    await filled(pool, spec("a"), cheap=True)
    await filled(pool, spec("b"), cheap=True)
    clock.now += FORGOTTEN_S + 1
    await pool.tend()
    assert [box.spec.template for box in pool.prepared()] == ["b"]


async def test_a_start_that_is_under_way_comes_first(pool_of: Pool) -> None:
    """None is made while a kernel starts."""
    starts = Starts()
    pool = pool_of(quiet=starts.quiet)
    starts.begin(SandboxId("a"))
    pool.want(spec(), cheap=True)
    await asyncio.sleep(0.3)
    assert pool.prepared() == []
    starts.end(SandboxId("a"))
    await filled(pool)
    assert len(pool.prepared()) == 1


async def test_it_is_quiet_when_no_start_has_ended_just_now() -> None:
    """One that begins and ends while somebody waits is waited for as well, with what its client does next."""
    starts = Starts()
    loop = asyncio.get_running_loop()
    waiting = asyncio.ensure_future(starts.quiet())
    await asyncio.sleep(SETTLED_S * 2 / 3)
    starts.begin(SandboxId("a"))
    starts.end(SandboxId("a"))
    ended = loop.time()
    starts.end(SandboxId("a"))
    await waiting
    assert loop.time() - ended >= SETTLED_S


async def test_a_start_whose_end_is_never_told_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its sandbox died; others are waited for as ever."""
    monkeypatch.setattr("warmcell.sandbox.starts.PATIENCE_S", 0.2)
    starts = Starts()
    starts.begin(SandboxId("a"))
    await starts.quiet()
    monkeypatch.setattr("warmcell.sandbox.starts.PATIENCE_S", 1000.0)
    async with asyncio.timeout(60):
        await starts.quiet()
    starts.begin(SandboxId("b"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            await starts.quiet()


@pytest.mark.parametrize("error", [SandboxStartError("not now"), RuntimeError("it did not get ready")])
async def test_one_that_could_not_be_made_is_tried_again(
    pool_of: Pool, service: SandboxService, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What was in the way may have gone, whatever it was; what nobody asks for any more is not tried for ever."""
    monkeypatch.setattr("warmcell.sandbox.pool.RETRY_PAUSES_S", (0.001, 0.001))
    monkeypatch.setattr("warmcell.sandbox.pool.RETRY_LAST_S", 0.001)
    pool = pool_of()
    failures = iter(range(7))
    tries = 0

    async def make(asked: SandboxSpec) -> LiveSandbox:
        nonlocal tries
        tries += 1
        if next(failures, None) is not None:
            raise error
        return await service._prepare(asked)

    monkeypatch.setattr(pool, "_make", make)
    await filled(pool, spec())
    assert (len(pool.prepared()), tries) == (1, 8)
    failures = iter(range(9))
    await take(pool, spec())
    pool.want(spec())
    clock.now += FORGOTTEN_S + 1
    await filled(pool)
    assert (len(pool.prepared()), tries) == (0, 9)


async def test_one_that_dies_as_it_is_ready_is_replaced(
    pool_of: Pool, service: SandboxService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to ask for another one."""
    monkeypatch.setattr("warmcell.sandbox.pool.RETRY_PAUSES_S", (0.001,))
    pool = pool_of()
    made: list[LiveSandbox] = []

    async def make(asked: SandboxSpec) -> LiveSandbox:
        made.append(await service._prepare(asked))
        if len(made) == 1:
            await made[0].stop()
        return made[-1]

    monkeypatch.setattr(pool, "_make", make)
    await filled(pool, spec())
    assert pool.prepared() == made[1:]
    assert len(made) == 2


async def test_one_that_is_taken_as_soon_as_enough_wait_is_replaced(pool_of: Pool) -> None:
    """Also where that is in the very moment in which the pool has seen that there are enough."""
    taken: list[LiveSandbox | None] = []

    async def quiet() -> None:
        if pool.prepared() and not taken:  # It is about to look how many wait, and then to be done.
            asyncio.get_running_loop().call_soon(lambda: taken.append(pool.take(spec().shape())))

    pool = pool_of(quiet=quiet)
    pool.want(spec(), cheap=True)
    await until(lambda: bool(taken))
    assert taken[0] is not None
    await taken[0].stop()
    await until(lambda: len(pool.prepared()) == 1)


async def test_none_is_left_where_memory_is_short_or_they_are_of_no_use(pool_of: Pool) -> None:
    """Demand brings them back."""
    pool = pool_of()
    await filled(pool, spec(), cheap=True)
    assert await pool.shrink()
    assert not await pool.shrink()
    await filled(pool, spec(), cheap=True)
    await pool.renew(lambda box: False)
    assert pool.prepared() == []
    await filled(pool, spec(), cheap=True)
    assert len(pool.prepared()) == 1


async def test_one_that_does_not_end_keeps_nobody_from_looking_after_the_others(
    pool_of: Pool, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox whose end fails leaves the pool all the same, and the rest is tended as ever."""
    stubborn: list[LiveSandbox] = []
    stop = LiveSandbox.stop

    async def end(box: LiveSandbox) -> None:
        if not stubborn:
            stubborn.append(box)
            raise OperationTimeoutError("Its processes do not end", hint="Wait.")
        await stop(box)

    pool = pool_of(per_template=2)
    pool.want(spec())
    await until(lambda: len(pool.prepared()) == 2)
    monkeypatch.setattr(LiveSandbox, "stop", end)
    assert await pool.shrink()
    assert (len(stubborn), pool.prepared()) == (1, [])
    pool.want(spec())
    await until(lambda: len(pool.prepared()) == 2)
    await stop(stubborn[0])
