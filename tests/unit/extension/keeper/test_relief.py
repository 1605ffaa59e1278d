"""Which kernels are suspended without being asked to, with kernels and a machine of the test's own."""

import asyncio
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from warmcell.extension.keeper import pressure
from warmcell.extension.keeper.pressure import Room
from warmcell.extension.keeper.relief import Relief
from warmcell.sandbox import errors
from warmcell.sandbox.background import Background
from warmcell.sandbox.lifecycle import State

GIB = 2**30


@dataclass
class Keeper:
    """Kernels by their idleness, and how much memory each has."""

    idle_s: dict[str, float]
    available_gib: float = 0.0
    prepared: bool = False
    suspended: list[str] = field(default_factory=list)
    stubborn: str = ""
    parkable: bool = False
    parked: list[str] = field(default_factory=list)
    waiting: bool = False
    wanted: list[str] = field(default_factory=list)
    """Those whose GPUs serve who waits."""
    programs: dict[str, list[Background]] = field(default_factory=dict)
    """What is told of what runs besides kernels, in turn; the last for ever."""
    back: list[str] = field(default_factory=list)
    """Those to whose notebook somebody comes back just now."""

    def all(self) -> list[Any]:
        return [
            SimpleNamespace(
                sandbox_id=name,
                started=True,
                alive=True,
                proxy=SimpleNamespace(idle_s=idle),
                request=SimpleNamespace(kernel_id=name, terms=self.terms(name)),
                returned_at=time.monotonic() if name in self.back else -math.inf,
            )
            for name, idle in self.idle_s.items()
        ]

    def info(self, sandbox_id: str) -> Any:
        state = State.SUSPENDED if sandbox_id in self.suspended else State.RUNNING
        without = sandbox_id.startswith("cpu") or sandbox_id in self.parked
        return SimpleNamespace(state=state, gpus=() if without else ("GPU",), terms=self.terms(sandbox_id))

    def terms(self, name: str) -> Any:
        """Of those that code has asked for."""
        return SimpleNamespace(frozen="frozen" in name) if name.startswith("code") else None

    def live(self, sandbox_id: str) -> Any:
        async def background() -> Background:
            told = self.programs.get(sandbox_id, [Background()])
            return told.pop(0) if len(told) > 1 else told[0]

        return SimpleNamespace(background=background)

    @property
    def leases(self) -> Any:
        return self

    async def queue(self) -> list[dict[str, Any]]:
        return [{}] * self.waiting

    async def to_reclaim(self, idle: list[str]) -> list[str]:
        return [name for name in idle if name in self.wanted]

    async def give_up_prepared(self) -> bool:
        found, self.prepared = self.prepared, False
        self.available_gib += found
        return found

    async def suspend(self, sandbox_id: str) -> None:
        if sandbox_id == self.stubborn:
            raise errors.ConflictError("It is busy", hint="Wait.")
        self.suspended.append(sandbox_id)
        self.available_gib += 1

    async def park(self, sandbox_id: str, *, by_hand: bool) -> None:
        assert not by_hand
        if not self.parkable:
            raise errors.UnsupportedOperationError("It is a MIG instance", hint="Ask for a whole GPU.")
        if sandbox_id == self.stubborn:
            raise errors.CapacityError("There is no room", hint="Make some.")
        self.parked.append(sandbox_id)

    def look(self) -> Room:
        return Room(available_bytes=int(self.available_gib * GIB), total_bytes=100 * GIB)

    def relief(self) -> Relief:
        one = cast(Any, self)
        return Relief(one, one, one, look=self.look, pressure_idle_s=60.0)


async def test_the_longest_idle_go_first_and_no_more_than_needed() -> None:
    """Each gives one GiB, and two are needed; who was used within a minute, or works, stays."""
    keeper = Keeper({"new": 59.0, "busy": 0.0, "old": 900.0, "older": 1000.0, "recent": 61.0})
    await keeper.relief().relieve(2.0)
    assert keeper.suspended == ["older", "old"]


async def test_prepared_sandboxes_go_before_kernels() -> None:
    """Where that is enough, no kernel is touched."""
    keeper = Keeper({"old": 900.0}, prepared=True)
    await keeper.relief().relieve(1.0)
    assert (keeper.prepared, keeper.suspended) == (False, [])


async def test_one_that_cannot_be_suspended_does_not_save_the_others() -> None:
    """The next one goes in its place."""
    keeper = Keeper({"old": 900.0, "older": 1000.0}, stubborn="older")
    await keeper.relief().relieve(1.0)
    assert keeper.suspended == ["old"]


@pytest.mark.parametrize(("below", "suspended"), [(0.0, []), (0.04, []), (0.06, ["old"]), (4.0, []), (6.0, ["old"])])
async def test_the_threshold_is_a_fraction_or_gib(below: float, suspended: list[str]) -> None:
    """5 of 100 GiB are left."""
    keeper = Keeper({"old": 900.0}, available_gib=5.0)
    await keeper.relief().relieve(below)
    assert keeper.suspended == suspended


async def test_idle_kernels_are_suspended_after_their_time() -> None:
    """Those that are used are left alone, again and again."""
    keeper = Keeper({"old": 0.3, "busy": 0.0})
    work = asyncio.create_task(keeper.relief().suspend_idle(0.1))
    async with asyncio.timeout(60):
        while not keeper.suspended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    work.cancel()
    assert keeper.suspended == ["old"]


async def test_programs_in_use_keep_their_idle_kernels() -> None:
    """One that listens stays, one that works stays until it has not worked for as long; what sleeps goes."""
    programs = {
        "listens": [Background(told=("server",), listens=True)],
        "works": [Background(told=("train",), cpu_s=float(n)) for n in range(12)],
        "sleeps": [Background(told=("sleep",), cpu_s=7.0)],
    }
    keeper = Keeper(dict.fromkeys((*programs, "without"), 0.3), programs=programs)
    work = asyncio.create_task(keeper.relief().suspend_idle(0.1))
    async with asyncio.timeout(60):
        while "works" not in keeper.suspended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    work.cancel()
    assert keeper.suspended == ["without", "sleeps", "works"]
    assert len(programs["works"]) == 1


async def test_kernels_give_way_to_who_waits_for_their_gpu() -> None:
    """Idle for long enough, with a GPU that serves; the next look is when another one has been idle for that long."""
    idle = {"new": 40.0, "busy": 0.0, "old": 900.0, "other": 900.0, "cpu": 900.0}
    keeper = Keeper(idle, waiting=True, wanted=["new", "busy", "old", "cpu"])
    assert await keeper.relief().give_way(60.0) == 20.0
    assert keeper.suspended == ["old"]


async def test_who_gives_way_is_parked_where_that_can_be_done() -> None:
    """And suspended where it cannot, or where the configuration says so. That somebody comes back to it holds up nobody
    who waits.
    """
    keeper = Keeper({"old": 900.0}, parkable=True, waiting=True, wanted=["old"], back=["old"])
    await keeper.relief().give_way(60.0)
    assert (keeper.parked, keeper.suspended) == (["old"], [])
    without = Keeper({"old": 900.0}, parkable=True, waiting=True, wanted=["old"])
    one: Any = without
    await Relief(one, one, one, look=without.look, pressure_idle_s=60.0, parks=False).give_way(60.0)
    assert (without.parked, without.suspended) == ([], ["old"])


async def test_sandboxes_of_code_are_parked_but_never_suspended_for_it() -> None:
    """As long as no command runs there, and not while one stands still in memory."""
    idle = {"code": 900.0, "code-frozen": 900.0, "code-working": 900.0, "code-new": 30.0}
    for parkable in (True, False):
        keeper = Keeper(idle, parkable=parkable, waiting=True, wanted=list(idle))
        one: Any = keeper
        relief = Relief(
            one,
            one,
            one,
            look=keeper.look,
            pressure_idle_s=60.0,
            commands_idle_s=lambda name: 800.0 * (name != "code-working"),
        )
        assert await relief.give_way(60.0) == 30.0
        await relief.relieve(50.0)
        assert (keeper.parked, keeper.suspended) == (["code"] if parkable else [], [])


async def test_idle_kernels_are_parked_after_their_time() -> None:
    """Those with a GPU, but not those used or come back to; one that cannot be parked is left alone for a while."""
    idle = {"full": 0.4, "back": 0.4, "old": 0.3, "busy": 0.0, "cpu": 0.3}
    keeper = Keeper(idle, parkable=True, stubborn="full", back=["back"])
    work = asyncio.create_task(keeper.relief().park_idle(0.1))
    async with asyncio.timeout(60):
        while not keeper.parked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    keeper.stubborn = ""
    await asyncio.sleep(0.3)
    work.cancel()
    assert (keeper.parked, keeper.suspended) == (["old"], [])


async def test_nobody_gives_way_where_nobody_waits() -> None:
    """And nobody is looked at again before that changes."""
    keeper = Keeper({"old": 900.0}, wanted=["old"])
    assert await keeper.relief().give_way(60.0) is None
    assert keeper.suspended == []


async def test_one_that_cannot_give_way_is_left_alone_for_a_while() -> None:
    """It is not asked again at each change of the queue."""
    keeper = Keeper({"old": 900.0}, waiting=True, wanted=["old"], stubborn="old")
    relief = keeper.relief()
    assert await relief.give_way(60.0) == 60.0
    keeper.stubborn = ""
    await relief.give_way(60.0)
    assert keeper.suspended == []


def test_a_machine_where_all_wait_for_memory_is_short_of_it() -> None:
    """Whatever is said to be available."""
    assert Room(available_bytes=99, total_bytes=100, stalled_pct=50.0).short(0.01)
    assert not Room(available_bytes=99, total_bytes=100, stalled_pct=50.0).short(0.0)


@pytest.mark.parametrize("generation", ["v1", "v2", "none"])
def test_the_tightest_bound_counts(tmp_path: Path, generation: str) -> None:
    """The machine's memory, or the limit of a control group above this process, less caches."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "pressure").mkdir()
    (groups / "jobs" / "one").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\n")
    (proc / "pressure" / "memory").write_text("some avg10=9.00 avg60=0\nfull avg10=1.50 avg60=0.00 total=1\n")
    limit, used, caches = {
        "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        "v2": ("memory.max", "memory.current", "inactive_file"),
        "none": ("", "", ""),
    }[generation]
    if generation != "none":
        kind, options, line = (
            ("cgroup", "rw,memory", "5:memory:/jobs/one") if generation == "v1" else ("cgroup2", "rw", "0::/jobs/one")
        )
        (proc / "self" / "mountinfo").write_text(f"1 2 0:3 / {groups} rw - {kind} x {options}\n")
        (proc / "self" / "cgroup").write_text(f"{line}\n")
        (groups / "jobs" / "one" / limit).write_text("max\n" if generation == "v2" else f"{2**63 - 4096}\n")
        (groups / "jobs" / limit).write_text(f"{500 * 1024}\n")
        (groups / "jobs" / used).write_text(f"{400 * 1024}\n")
        (groups / "jobs" / "memory.stat").write_text(f"cache 1\n{caches} {100 * 1024}\n")
    found = pressure.look(proc=proc)
    expected = (600, 1000) if generation == "none" else (200, 500)
    assert (found.available_bytes // 1024, found.total_bytes // 1024) == expected
    assert found.stalled_pct == 1.5


def test_this_machine_has_memory() -> None:
    """What is found here is no nonsense."""
    found = pressure.look()
    assert 0 < found.available_bytes < found.total_bytes
