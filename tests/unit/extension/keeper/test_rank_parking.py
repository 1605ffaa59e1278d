"""Which sandboxes of remote cells give their GPUs back, with a service of the test's own."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from warmcell.extension.keeper.rank_parking import park_ranks
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import State


@dataclass
class Keeper:
    """Sandboxes by id, and for how long nothing has run there; those that are named so are stubborn."""

    idle: dict[str, float]
    waiting: bool = False
    asked: list[str] = field(default_factory=list)

    def infos(self) -> list[Any]:
        found = [name for name in self.idle if name not in self.asked or name == "stubborn"]
        return [
            SimpleNamespace(
                id=name,
                owner="notebook" if name == "notebook" else "remote",
                gpus=() if name == "cpu" else ("GPU",),
                state=State.SUSPENDED if name == "asleep" else State.RUNNING,
            )
            for name in found
        ]

    def idle_s(self, name: str) -> float:
        return self.idle[name]

    @property
    def leases(self) -> Any:
        return self

    async def queue(self) -> list[dict[str, Any]]:
        return [{}] * self.waiting

    async def to_reclaim(self, idle: list[str]) -> list[str]:
        return idle[:1]

    async def park(self, name: str) -> None:
        self.asked.append(name)
        if name == "stubborn":
            raise errors.UnsupportedOperationError("It has two GPUs", hint="Use one.")

    async def work(self, rounds: int) -> list[str]:
        one = cast(Any, self)
        task = asyncio.create_task(park_ranks(one, one, after_s=1.0, asked_after_s=0.04))
        for _ in range(rounds):
            await asyncio.sleep(0.02)
        task.cancel()
        return self.asked


async def test_idle_ones_with_a_gpu_are_parked_the_longest_idle_first() -> None:
    """Nobody else's, none that is used, asleep or without a GPU; one that cannot be parked is asked once."""
    idle = {"new": 0.5, "old": 8.0, "stubborn": 9.0, "notebook": 9.0, "cpu": 9.0, "asleep": 9.0}
    assert await Keeper(idle).work(20) == ["stubborn", "old"]


async def test_they_give_way_sooner_to_who_waits() -> None:
    """To those whose GPUs serve, and not if they are used."""
    keeper = Keeper({"used": 0.01, "older": 0.6, "new": 0.5}, waiting=True)
    assert (await keeper.work(20))[0] == "older"
    assert "used" not in keeper.asked
    assert await Keeper({"older": 0.6}).work(20) == []
