"""Devices from the configuration."""

import pytest

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import GIB

CONFIG = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}, {"name": "T4", "memory": 16 * GIB}]


async def test_the_configured_devices_are_listed_and_marked() -> None:
    """Each device of the configuration is there, numbered, with its memory, and says that it is simulated."""
    devices = await SimulatedInventory(CONFIG).devices()
    assert [(d.index, d.name, d.memory_total_bytes) for d in devices] == [
        (0, "A100-SXM4-80GB", 80 * GIB),
        (1, "A100-SXM4-80GB", 80 * GIB),
        (2, "T4", 16 * GIB),
    ]
    assert all(d.simulated and d.uuid.startswith("GPU-sim-") and not d.device_nodes for d in devices)


async def test_the_uuids_are_stable_and_distinct() -> None:
    """A keeper that comes back, or another user's, knows the same devices; a device more renames none."""
    first = [d.uuid for d in await SimulatedInventory(CONFIG).devices()]
    grown = [{**CONFIG[0], "count": 3}, CONFIG[1]]
    second = [d.uuid for d in await SimulatedInventory(grown).devices()]
    assert len(set(first)) == 3
    assert set(first) < set(second)


async def test_nothing_computes_on_them() -> None:
    """A made-up device has no strangers on it."""
    inventory = SimulatedInventory(CONFIG)
    assert await inventory.processes((await inventory.devices())[0]) == ()
    assert inventory.problem == ""


@pytest.mark.parametrize(
    "entry",
    [
        "A100",
        {},
        {"name": "A100"},
        {"name": "", "memory": "80GiB"},
        {"name": "A100", "memory": "lots"},
        {"name": "A100", "memory": 0},
        {"name": "A100", "memory": True},
        {"name": "A100", "memory": "80GiB", "count": 0},
        {"name": "A100", "memory": "80GiB", "count": True},
        {"name": "A100", "memory": "80GiB", "count": 65},
        {"name": "A100", "memory": "80GiB", "cout": 1},
        {"name": "A100", "memory": "80GiB", "busy": 101},
        {"name": "A100", "memory": "80GiB", "busy": "40 %"},
    ],
)
def test_a_malformed_entry_is_refused_with_its_cure(entry: object) -> None:
    """A slip in the configuration gives one typed error that shows how to write it."""
    with pytest.raises(InvalidRequestError) as caught:
        SimulatedInventory([entry])  # type: ignore[list-item]
    assert caught.value.hint


def test_too_many_devices_are_refused() -> None:
    """The cap holds for all entries together."""
    with pytest.raises(InvalidRequestError, match="at most 64"):
        SimulatedInventory([{"name": "A100", "memory": "80GiB", "count": 40}] * 2)


async def test_devices_can_be_joined() -> None:
    """In groups of so many, the last one with what is left; others have no path that is known."""
    found = await SimulatedInventory([{"name": "A100", "memory": "80GiB", "count": 3, "nvlink": 2}]).devices()
    assert found[0].near == {found[1].uuid: 0}
    assert found[2].near == {}
    with pytest.raises(InvalidRequestError, match="nvlink 0"):
        SimulatedInventory([{"name": "A100", "memory": "80GiB", "nvlink": 0}])
