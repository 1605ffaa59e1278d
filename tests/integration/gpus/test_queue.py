"""The queue for GPUs across keepers, with real locks, real processes and real kills."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gpus.test_leases import KINDS, ONE, THREE, TWO, Occupied, other_keeper
from tests.leaks import Places
from warmcell.sandbox.errors import InvalidRequestError, NoGpuAvailableError, QueueCancelledError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.requests import parse
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import GpuDevice, QueuePlace, SandboxId

TOP = Path(__file__).parents[3]


@pytest.fixture
def keeper(places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GpuPool]]:
    """Makes pools as keepers have them, on one machine. None looks unless it hears of a change."""
    monkeypatch.setattr("warmcell.sandbox.gpus.pool.LOOK_S", 3600.0)
    pools: list[GpuPool] = []

    def make(**how: Any) -> GpuPool:
        pools.append(GpuPool(SimulatedInventory(KINDS), LeaseDirectory(places.leases), **how))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


class Asking:
    """A request that waits, and what it was told."""

    def __init__(self, pool: GpuPool, request: str, holder: SandboxId, **how: Any) -> None:
        self.places: list[QueuePlace | None] = []
        self._told = asyncio.Event()
        self.pool, self.holder = pool, holder
        self.task = asyncio.create_task(pool.lease(request, holder=holder, wait_s=None, told=self._tell, **how))

    def _tell(self, place: QueuePlace | None) -> None:
        self.places.append(place)
        self._told.set()

    async def stands(self, place: int) -> QueuePlace:
        """Wait until it is told that place."""
        async with asyncio.timeout(60):
            while not (self.places and self.places[-1] is not None and self.places[-1].place == place):
                self._told.clear()
                await self._told.wait()
        last = self.places[-1]
        assert last is not None
        return last

    async def served(self) -> list[int]:
        """The indices of what it got."""
        async with asyncio.timeout(60):
            return [device.index for device in await self.task]


async def test_whoever_waits_is_told_and_then_served(keeper: Callable[..., GpuPool]) -> None:
    """The place, who has what it waits for, the end of it, and the device as soon as that is given back."""
    pool = keeper()
    await pool.lease("T4", holder=ONE)
    asking = Asking(pool, "T4", TWO)
    place = await asking.stands(1)
    assert (place.request, place.length, place.estimate_s) == ("T4", 1, None)
    assert "GPU 2 by sandbox one" in place.why
    assert str(place) == "place 1 of 1 in the queue for T4"
    assert [row["sandbox_id"] for row in await pool.queue()] == ["two"]
    pool.release(ONE)
    assert await asking.served() == [2]
    assert asking.places[-1] is None
    assert await pool.queue() == []


async def test_arrival_order_holds_across_keepers(keeper: Callable[..., GpuPool]) -> None:
    """Whoever came first is served first, in whichever keeper; nobody who comes later passes, not even at once."""
    first, second = keeper(), keeper()
    await first.lease("T4", holder=ONE)
    waiting = []
    for n, pool in enumerate((second, first, second)):
        waiting.append(Asking(pool, "T4", SandboxId(f"w{n}")))
        await waiting[-1].stands(n + 1)
    assert [row["sandbox_id"] for row in await first.queue()] == ["w0", "w1", "w2"]
    assert [row["mine"] for row in await first.queue()] == [False, True, False]
    first.release(ONE)
    with pytest.raises(NoGpuAvailableError):
        await first.lease("T4", holder=TWO)
    for one in waiting:
        assert await one.served() == [2]
        one.pool.release(one.holder)


async def test_one_who_waits_for_two_is_not_passed(keeper: Callable[..., GpuPool]) -> None:
    """The device that is free is kept until both are."""
    first, second = keeper(), keeper()
    await first.lease("A100", holder=ONE)
    both = Asking(second, "A100:2", TWO)
    await both.stands(1)
    late = Asking(first, "A100", THREE)
    assert "is kept for somebody who came before" in (await late.stands(2)).why or late.places
    first.release(ONE)
    assert sorted(await both.served()) == [0, 1]
    second.release(TWO)
    assert len(await late.served()) == 1


async def test_whoever_is_cancelled_leaves_the_queue(keeper: Callable[..., GpuPool]) -> None:
    """By a word or with the task: nothing of it is left, and the next one is first."""
    pool = keeper()
    await pool.lease("T4", holder=ONE)
    waiting = []
    for n, name in enumerate(("a", "b", "c")):
        waiting.append(Asking(pool, "T4", SandboxId(name)))
        await waiting[-1].stands(n + 1)
    first, second, third = waiting
    assert not pool.cancel(ONE)
    assert pool.cancel(SandboxId("a"))
    with pytest.raises(QueueCancelledError, match="waited for no longer"):
        await first.served()
    await third.stands(2)
    second.task.cancel()
    await third.stands(1)
    pool.release(ONE)
    assert await third.served() == [2]


async def test_a_killed_holder_is_heard_of(keeper: Callable[..., GpuPool], places: Places) -> None:
    """Nobody has to look again and again: the kernel tells that the lock is gone."""
    pool = keeper()
    with other_keeper("T4", places.leases) as other:
        asking = Asking(pool, "T4", ONE)
        assert f"(keeper {other.process.pid})" in (await asking.stands(1)).why
        other.process.send_signal(signal.SIGKILL)
        assert await asking.served() == [2]


async def test_a_wait_has_an_end(keeper: Callable[..., GpuPool]) -> None:
    """With a deadline the error is the usual one, and nobody is left in the queue."""
    pool = keeper()
    await pool.lease("T4", holder=ONE)
    with pytest.raises(NoGpuAvailableError, match="GPU 2 by sandbox one"):
        await pool.lease("T4", holder=TWO, wait_s=0.05)
    assert await pool.queue() == []


async def test_one_who_waits_for_what_is_not_here_hides_nobody(places: Places, keeper: Callable[..., GpuPool]) -> None:
    """Another user's keeper may share GPUs, or see others; its ticket is listed, and so are all the others."""
    pool = keeper()
    await pool.lease("T4", holder=ONE)
    asking = Asking(pool, "T4", TWO)
    await asking.stands(1)
    ticket = LeaseDirectory(places.leases).enqueue(parse("H100/2"), holder=THREE)
    try:
        told = await pool.queue()
        assert [(one["sandbox_id"], one["request"]) for one in told] == [(TWO, "T4"), (THREE, "H100/2")]
    finally:
        ticket.release()
    assert pool.cancel(TWO)
    await asyncio.gather(asking.task, return_exceptions=True)


async def test_a_stranger_who_leaves_is_seen(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody tells of programs outside Warmcell, so they are asked about again while somebody waits."""
    monkeypatch.setattr("warmcell.sandbox.gpus.pool.LOOK_S", 0.05)
    inventory = Occupied(2)
    pool = GpuPool(inventory, LeaseDirectory(places.leases))
    asking = Asking(pool, "T4", ONE)
    assert "process 4711" in (await asking.stands(1)).why
    inventory.busy = ()
    assert await asking.served() == [2]
    pool.close()


async def test_quotas_hold_within_a_keeper(keeper: Callable[..., GpuPool]) -> None:
    """Who has as many as the quota allows waits, though one is free; others do not; too much is refused at once."""
    pool = keeper(quotas={"client": 1, "*": 2})
    await pool.lease("A100", holder=ONE, owner="client")
    asking = Asking(pool, "T4", TWO, owner="client")
    assert "client has 1 of 1 GPUs" in (await asking.stands(1)).why
    await pool.lease("T4", holder=THREE, owner="notebook")
    pool.release(THREE)
    with pytest.raises(InvalidRequestError, match="the quota of 1 GPUs that client has"):
        await pool.check("A100:2", owner="client")
    pool.release(ONE)
    assert await asking.served() == [2]


async def test_a_gpu_is_shared_where_that_is_allowed(keeper: Callable[..., GpuPool], places: Places) -> None:
    """Two halves are two leases on one device, in two keepers; whoever wants it whole waits for both."""
    first, second = keeper(most_parts=2), keeper(most_parts=2)
    (half,) = await first.lease("T4/2", holder=ONE)
    assert (half.index, half.parts) == (2, 2)
    await second.lease("T4/2", holder=TWO)
    row = (await first.status())[2]
    assert [(one["sandbox_id"], one["parts"], one["mine"]) for one in row["leases"]] == [
        ("one", 2, True),
        ("two", 2, False),
    ]
    asking = Asking(first, "T4", THREE)
    assert "sandbox one and sandbox two" in (await asking.stands(1)).why
    second.release(TWO)
    with pytest.raises(NoGpuAvailableError):
        await second.lease("T4/2", holder=TWO)
    first.release(ONE)
    assert await asking.served() == [2]
    with pytest.raises(InvalidRequestError, match="GPUs are not shared here"):
        await keeper().check("T4/2")


async def test_what_a_sandbox_has_serves_the_next_request_for_it(keeper: Callable[..., GpuPool]) -> None:
    """So that a restart keeps its device, also under other words; what is not that is not had."""
    pool = keeper(most_parts=2)
    devices = await pool.lease("A100", holder=ONE)
    assert pool.has(ONE, "any") == pool.has(ONE, ("H100", "A100-80GB")) == devices
    assert pool.has(ONE, "A100:2") is pool.has(ONE, "T4") is pool.has(ONE, "A100/2") is pool.has(TWO, "any") is None


async def test_idle_ones_are_named_for_whoever_waits_elsewhere(keeper: Callable[..., GpuPool]) -> None:
    """Of this keeper's idle sandboxes those that another keeper's request needs."""
    mine, other = keeper(), keeper()
    await mine.lease("T4", holder=ONE)
    await mine.lease("A100", holder=TWO)
    assert await mine.to_reclaim([ONE, TWO]) == []
    asking = Asking(other, "T4", THREE)
    await asking.stands(1)
    assert await mine.to_reclaim([TWO, ONE]) == [ONE]
    mine.release(ONE)
    assert await asking.served() == [2]


async def test_a_device_that_is_lost_is_still_listed_for_who_has_it(keeper: Callable[..., GpuPool]) -> None:
    """Its row says so; whoever waits for one like it is told that there is none any more."""

    class Falling(SimulatedInventory):
        fallen = False

        async def devices(self) -> tuple[GpuDevice, ...]:
            found = tuple(await super().devices())
            return found[:2] if self.fallen else found

    pool = keeper()
    inventory = pool._inventory = pool._granting._inventory = Falling(KINDS)
    await pool.lease("T4", holder=ONE)
    asking = Asking(pool, "T4", TWO)
    await asking.stands(1)
    inventory.fallen = True
    rows = await pool.status()
    assert [(row["index"], row["lost"]) for row in rows] == [(0, False), (1, False), (2, True)]
    assert rows[2]["lease"]["sandbox_id"] == "one"
    pool.release(ONE)
    with pytest.raises(InvalidRequestError, match="has no T4"):
        await asking.served()


@pytest.mark.parametrize("what", ["garbage", "foreign", "fifo", "directory", "dead"])
async def test_a_false_ticket_holds_nobody_up(keeper: Callable[..., GpuPool], places: Places, what: str) -> None:
    """What cannot be read, is no plain file, or has nobody behind it, is no place in the queue."""
    path = places.leases / "wait-000000000001-abc.lock"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        note = {"pid": 1, "uid": 0, "sandbox_id": "x", "since": 1.0, "request": "T4" if what == "dead" else "T4/x"}
        path.write_text("{" if what == "garbage" else json.dumps(note))
    pool = keeper()
    assert await pool.queue() == []
    assert len(await pool.lease("T4", holder=ONE)) == 1
    pool.close()
    if what in ("fifo", "directory"):
        path.rmdir() if what == "directory" else path.unlink()
    assert not path.exists()


def compete(directory: Path, trials: int) -> None:
    """Fails with what went wrong, and the seed."""
    directory.parent.chmod(0o755)
    directory.chmod(0o1777)
    seed = int.from_bytes(os.urandom(4), "big")
    command = [sys.executable, "-m", "tests.integration.gpus.rivals", str(directory), str(trials), str(seed)]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=60 + 20 * trials)
    told = json.loads(done.stdout or "{}")
    assert (told.get("trials"), told.get("wrong")) == (trials, []), f"seed {seed}: {done.stdout} {done.stderr}"
    assert told["grants"] > trials


def test_keepers_of_two_users_compete_while_one_is_killed(places: Places) -> None:
    """No device is given twice, none is lost, nobody starves and no ticket is left, whenever the kill comes."""
    compete(places.leases, 20)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_keepers_of_two_users_compete_for_long(places: Places) -> None:
    """The same, five hundred times."""
    compete(places.leases, 500)
