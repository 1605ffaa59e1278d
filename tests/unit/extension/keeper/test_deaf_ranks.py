"""A rank that does not heed an interrupt, with a kernel of the test's own."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from warmcell.extension.keeper import runner as runners
from warmcell.extension.keeper.death import death
from warmcell.extension.keeper.rank_steps import Step
from warmcell.extension.keeper.ranks import Rank
from warmcell.sandbox.models import GIB, Limits, SandboxSpec


class Kernel:
    """It says nothing, and ends when it is killed, or also when it is interrupted."""

    def __init__(self, *, heeds: bool) -> None:
        self.signals: list[int] = []
        self.asked, self.finished = asyncio.Event(), asyncio.Event()
        self.ended, self.alone = False, True
        self.process = SimpleNamespace(exited=asyncio.Event(), exit_code=None, alive=True)
        self._heeds = heeds

    def request(self, *_: object) -> str:
        self.asked.set()
        return "id"

    async def hear(self, until: float | None = None) -> None:
        await self.finished.wait()

    def finish(self) -> None:
        self.ended = True
        self.finished.set()

    async def signal_process(self, process: object, signum: int) -> None:
        self.signals.append(signum)
        if signum == 9 or self._heeds:
            self.process.alive = False
            self.process.exited.set()


@pytest.mark.parametrize("heeds", [True, False])
async def test_a_rank_that_ignores_interrupts_is_killed(heeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its time is over, so that the next cell does not wait behind it; its end says so."""
    monkeypatch.setattr(runners, "INTERRUPT_TIMEOUT_S", 60.0 if heeds else 0.01)
    kernel = cast(Any, Kernel(heeds=heeds))
    runner = runners.Runner(kernel, kernel.process, kernel, 0, Rank(1, 4))
    cell = asyncio.ensure_future(anext(runner.execute(Step("while True: pass"))))
    await kernel.asked.wait()
    await asyncio.sleep(0)
    cell.cancel()
    await asyncio.gather(cell, return_exceptions=True)
    assert kernel.signals == ([2] if heeds else [2, 9])
    assert runner.deaf is not heeds
    if not heeds:
        assert runner.died().message.startswith("Rank 1 did not stop within ")


def test_a_rank_that_takes_too_much_memory_names_the_cap_of_all() -> None:
    """Which they share; one alone has a cap of its own."""
    spec = SandboxSpec(python="p", limits=Limits(memory_bytes=8 * GIB))
    four = death(137, oom_killed=True, spec=spec, who="Rank 2", sharing=4)
    assert four.message == "Rank 2 was killed for memory (the cap of all 4 ranks together is 8.0 GiB)"
    assert death(137, oom_killed=True, spec=spec).message == "The kernel was killed for memory (its cap is 8.0 GiB)"
