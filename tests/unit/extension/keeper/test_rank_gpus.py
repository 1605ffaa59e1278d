"""What each rank has of the GPUs of all, and what is told of their memory."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from warmcell.extension.keeper.ranks import Rank, share
from warmcell.extension.keeper.runs import Runs
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import GIB, GpuDevice

USAGE = {"msg_type": "usage", "content": {"memory_bytes": 5}, "metadata": {}}


def gpus(count: int, *, simulated: bool = False) -> tuple[GpuDevice, ...]:
    made = (
        GpuDevice(uuid=f"GPU-{n}", index=n, name="A100", memory_total_bytes=80 * GIB, simulated=simulated)
        for n in range(count)
    )
    return tuple(made)


@pytest.mark.parametrize(
    ("devices", "ranks", "expected"),
    [
        (0, 2, [[], []]),
        (4, 2, [[0, 1], [2, 3]]),
        (3, 3, [[0], [1], [2]]),
        (2, 4, [[0], [0], [1], [1]]),
        (2, 3, [[0], [0], [1]]),
    ],
)
def test_ranks_have_as_much_as_each_other(devices: int, ranks: int, expected: list[list[int]]) -> None:
    """Whole GPUs, or where there are fewer a share of one, which then says of how many."""
    told = [share(gpus(devices), Rank(number, ranks)) for number in range(ranks)]
    assert [[gpu.index for gpu in each] for each in told] == expected
    parts = -(-ranks // devices) if 0 < devices < ranks else 1
    assert {gpu.parts for each in told for gpu in each} <= {parts}


class Leases:
    """Each device has a thousand bytes in use, times its number, by the processes that are asked for."""

    broken = False

    async def memory_of(self, device: GpuDevice, pids: set[int]) -> int:
        if self.broken:
            raise BackendUnavailableError("The driver does not answer", hint="Wait.")
        return 1000 * (device.index + 1) * len(pids)


async def told(devices: tuple[GpuDevice, ...], rank: Rank, leases: Leases) -> Any:
    runs = Runs(cast(Any, SimpleNamespace(leases=leases)))
    box = SimpleNamespace(gpus=devices, processes=(7, 8), info=SimpleNamespace(id="box"))
    usage = await runs._with_vram(cast(Any, SimpleNamespace(box=box, rank=rank)), USAGE)
    await runs.close()
    return usage["content"].get("vram_bytes")


async def test_the_memory_of_a_ranks_gpus_is_told() -> None:
    """By the driver; not of simulated ones, of one that ranks share, or where the driver does not say."""
    leases = Leases()
    assert await told(gpus(4), Rank(1, 2), leases) == 2 * (3000 + 4000)
    assert await told(gpus(4, simulated=True), Rank(1, 2), leases) is None
    assert await told(gpus(1), Rank(1, 2), leases) is None
    assert await told((), Rank(), leases) is None
    leases.broken = True
    assert await told(gpus(4), Rank(1, 2), leases) is None
