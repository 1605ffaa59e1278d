"""GPUs of ranks, which are simulated: all that are free, and given back once nothing runs there."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.keeper.conftest import until
from tests.remote.conftest import kernel_of
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

IDLE_S = 6.0


@pytest.fixture(scope="module")
def settings() -> Mapping[str, object]:
    """Three GPUs, and little patience."""
    return {"simulated_gpus": [{"name": "T4", "memory": "16GiB", "count": 3}], "remote_idle_s": IDLE_S}


async def test_all_free_gpus_are_taken_and_given_back(keeper: KeeperClient, folder: Path) -> None:
    """`n=max` is one rank for each GPU that nobody has; idle ones are free after a while, and the next cell says so."""
    async with kernel_of(keeper, folder) as kernel:
        first = await kernel.run("%%remote gpu=T4 session=one detach as=job\nimport time\ntime.sleep(1000)")
        assert "on T4 (simulated)" in first.text
        rest = await kernel.run("%%remote gpu=T4 n=max get=rank\nimport os\nrank = os.environ['RANK']; there = 1")
        assert "on 2 × T4 (simulated), 2 ranks" in rest.text
        assert await kernel.value("rank") == ["0", "1"]

        await until(lambda: leased(keeper, 1))
        assert await kernel.value("job.done()") is False
        again = await kernel.run("%%remote gpu=T4 n=max\nthere")
        assert "it is gone, with its variables" in again.text
        assert "name 'there' is not defined" in again.error


async def leased(keeper: KeeperClient, gpus: int) -> bool:
    """Whether so many GPUs are held by somebody."""
    found = (await keeper.get("/gpus"))["gpus"]
    return sum(1 for gpu in found if gpu["lease"] is not None) == gpus
