"""To how many kernels of agents' sandboxes the keeper stays connected."""

from typing import Any, cast

import pytest

from warmcell.extension.keeper.agents import boxes
from warmcell.extension.keeper.agents.boxes import AgentBox, Boxes
from warmcell.sandbox.models import SandboxId


class Box:
    """A sandbox whose kernel is connected."""

    class Runs:
        in_use = False

    def __init__(self, name: str) -> None:
        self.sandbox_id = SandboxId(name)
        self.runs = self.Runs()
        self.connected = True

    def disconnect(self) -> None:
        self.connected = False


@pytest.fixture
async def agents(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(boxes, "CONNECTED_MAX", 3)
    made = Boxes(cast(Any, None), cast(Any, None), cast(Any, None))
    yield made
    made.context.destroy(linger=0)


async def test_those_used_longest_ago_are_let_go_of(agents: Boxes) -> None:
    """Unless code runs there; what is used again is the last to go."""
    made = [Box(f"box{number}") for number in range(5)]
    made[1].runs.in_use = True
    for box in (*made[:3], made[0], *made[3:]):
        box.connected = True
        agents.connected(cast(AgentBox, box))
    assert [box.connected for box in made] == [False, True, False, True, True]
    made[1].runs.in_use = False
    await agents.forget(made[4].sandbox_id)
    more = Box("more")
    agents.connected(cast(AgentBox, more))
    agents.connected(cast(AgentBox, Box("another")))
    assert [box.connected for box in (*made, more)] == [False, False, False, True, True, True]
