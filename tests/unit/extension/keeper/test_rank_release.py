"""Which sandboxes of remote cells are given back, with a service of the test's own."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from warmcell.extension.keeper.rank_release import release_ranks
from warmcell.extension.keeper.rank_steps import Request
from warmcell.extension.keeper.runs import Rank, Runs
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId


@dataclass
class Keeper:
    """Sandboxes by id: whose, in which state, idle for how long."""

    boxes: dict[str, tuple[str, State, float]]
    stubborn: str = ""
    stopped: list[str] = field(default_factory=list)
    looked: asyncio.Event = field(default_factory=asyncio.Event)

    def infos(self) -> list[Any]:
        if self.stopped:
            self.looked.set()
        return [SimpleNamespace(id=name, owner=owner, state=state) for name, (owner, state, _) in self.boxes.items()]

    def idle_s(self, sandbox_id: str) -> float:
        return self.boxes[sandbox_id][2]

    async def stop(self, sandbox_id: str) -> None:
        if sandbox_id == self.stubborn:
            raise errors.ConflictError("It is busy", hint="Wait.")
        self.stopped.append(sandbox_id)
        owner, _, idle_s = self.boxes[sandbox_id]
        self.boxes[sandbox_id] = (owner, State.STOPPED, idle_s)

    async def release(self, after_s: float) -> None:
        one = cast(Any, self)
        await release_ranks(one, idle_s=one.idle_s, stop=one.stop, after_s=after_s)


async def test_only_idle_ranks_of_notebooks_are_removed() -> None:
    """Not what works, what others have made, or what is on its way; one that cannot be removed saves no other."""
    keeper = Keeper(
        {
            "stubborn": ("remote", State.RUNNING, 9.0),
            "idle": ("remote", State.RUNNING, 9.0),
            "busy": ("remote", State.RUNNING, 0.0),
            "starts": ("remote", State.CREATING, 9.0),
            "client": ("client", State.RUNNING, 9.0),
            "notebook": ("notebook", State.RUNNING, 9.0),
        },
        stubborn="stubborn",
    )
    work = asyncio.create_task(keeper.release(0.01))
    await asyncio.wait_for(keeper.looked.wait(), 60)
    work.cancel()
    assert keeper.stopped == ["idle"]


async def test_none_is_removed_where_the_operator_says_so() -> None:
    """0 seconds are for ever."""
    keeper = Keeper({"idle": ("remote", State.RUNNING, 9.0)})
    await keeper.release(0.0)
    assert keeper.stopped == []


async def test_what_starts_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idleness begins when it is first looked at, is over while a cell waits for its kernel, and begins again.

    So it is with what a rank has made for cells of its own.
    """
    child = SimpleNamespace(id=SandboxId("child"), parent=SandboxId("box"))
    service = SimpleNamespace(live=lambda sandbox_id: SimpleNamespace(frontend=None), infos=lambda: [child])
    runs, starts = Runs(cast(Any, service)), asyncio.Event()

    async def never(*_: object) -> None:
        starts.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(runs, "_runner", never)
    box = SandboxId("box")
    assert runs.idle_s(box) == 0.0
    assert runs.idle_s(box) > 0.0
    for where in (box, child.id):
        starts.clear()
        cell = asyncio.ensure_future(anext(runs.run(where, Request("1"), rank=Rank(), values=Path("v"))))
        await starts.wait()
        assert runs.idle_s(box) == runs.idle_s(box) == 0.0
        cell.cancel()
        await asyncio.gather(cell, return_exceptions=True)
        assert runs.idle_s(box) > 0.0
    await runs.close()


async def test_of_a_sandbox_that_is_gone_nothing_is_counted() -> None:
    """Nobody would forget it again."""

    def live(sandbox_id: str) -> None:
        raise errors.SandboxNotFoundError("There is no sandbox", hint="Make one.")

    runs = Runs(cast(Any, SimpleNamespace(live=live, infos=list)))
    with pytest.raises(errors.SandboxNotFoundError):
        await anext(runs.run(SandboxId("gone"), Request("1"), rank=Rank(), values=Path("v")))
    assert not runs._under_way
    assert not runs._used
