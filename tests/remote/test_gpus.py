"""GPUs of ranks, which are simulated: all that are free, and given back once nothing runs there."""

import asyncio
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.keeper.conftest import until
from tests.remote.conftest import interrupt, kernel_of, reply_of
from warmcell.extension.keeper.runs import WAITS_S
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

IDLE_S = 6.0


@pytest.fixture(scope="module")
def settings() -> Mapping[str, object]:
    """Three GPUs of one kind, one of another, and little patience."""
    kinds = [{"name": "T4", "memory": "16GiB", "count": 3}, {"name": "L4", "memory": "24GiB", "count": 1}]
    return {
        "simulated_gpus": kinds,
        "remote": {"gpu": "L4", "timeout": "2h"},
        "remote_idle_s": IDLE_S,
        "gpu_wait": None,
    }


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


async def test_the_operator_says_what_is_usual(keeper: KeeperClient, folder: Path) -> None:
    """In the configuration file, for cells and functions; a line may say that there is none."""
    async with kernel_of(keeper, folder) as kernel:
        assert "on L4 (simulated)" in (await kernel.run("%%remote\npass")).text
        said: list[str] = []
        await kernel.client.execute_interactive(
            "%%remote as=x\n6 * 7",
            output_hook=lambda message: said.append(message["content"].get("data", {}).get("text/plain", "")),
            timeout=60,
        )
        assert re.fullmatch(r"Remote: done · \d+\.\d s · \d+\.\d GPU-seconds · \d\.\d MiB sent", said[-2]), said
        assert "on CPU" in (await kernel.run("%%remote gpu=none\npass")).text
        await kernel.run("import os, warmcell\ndef gpu():\n    return os.environ.get('WARMCELL_GPUS')")
        assert await kernel.value("[warmcell.remote()(gpu)(), warmcell.remote(gpu='none')(gpu)()]") == ["L4", None]


async def test_what_is_parked_has_its_gpu_and_variables_with_the_next_cell(keeper: KeeperClient, folder: Path) -> None:
    """The same kernels, on whichever GPUs of that kind; a cell that has to wait for one says so."""
    look = "get=same\nimport os\nsame = os.getpid() == there, os.environ['WARMCELL_GPUS']"
    async with kernel_of(keeper, folder) as kernel:

        async def park() -> None:
            (box,) = [one for one in (await keeper.get("/sandboxes"))["sandboxes"] if one["owner"] == "remote"]
            parked = await keeper.post(f"/sandboxes/{box['id']}/park", {})
            assert (parked["gpus"], parked["parked"]["by"]) == ([], "driver")
            assert await leased(keeper, 0)

        await kernel.run("%%remote gpu=T4 n=2\nimport os\nthere = os.getpid()")
        await park()
        assert (await kernel.run(f"%%remote gpu=T4 n=2 {look}")).error == ""
        assert await kernel.value("same") == [[True, "T4"]] * 2
        await kernel.run("%remote close")
        await kernel.run("%%remote gpu=L4\nimport os\nthere = os.getpid()")
        await park()
        spec = {"python": sys.executable, "gpu": "L4", "network": "host"}
        other = await keeper.post("/sandboxes", {"spec": spec})
        waits = asyncio.create_task(kernel.run(f"%%remote gpu=L4 {look}"))
        await until(lambda: waiting(keeper, 1))
        await asyncio.sleep(WAITS_S + 0.5)
        await keeper.delete(f"/sandboxes/{other['id']}")
        output = await waits
        assert "waits for one" in output.text
        assert await kernel.value("same") == [True, "L4"]
        await kernel.run("%remote close")


async def test_each_alternative_is_for_all_ranks(keeper: KeeperClient, folder: Path) -> None:
    """Fallbacks, counts and shares: each rank has as much of the first kind that will do for all of them."""
    get = "get=told\nimport os\ntold = os.environ.get('WARMCELL_GPUS'), os.environ.get('WARMCELL_GPU_MEMORY_FRACTION')"
    async with kernel_of(keeper, folder) as kernel:
        for line, told in {
            "gpu=L4,T4 n=2": [["T4", None]] * 2,
            "gpu=T4:3,L4 n=1": ["T4,T4,T4", None],
            "gpu=T4/2 n=3": [["T4", "0.5"]] * 3,
            "gpu=L4:2,L4/2 n=max": [["L4", "0.5"]] * 2,
        }.items():
            output = await kernel.run(f"%%remote {line} {get}")
            assert output.error == "", (line, output)
            assert await kernel.value("told") == told, line
            await kernel.run("%remote close")


async def test_one_is_told_where_it_waits(keeper: KeeperClient, folder: Path) -> None:
    """Its place in the queue; other cells run meanwhile, the stop button ends the waiting, and n=max does not wait."""
    async with kernel_of(keeper, folder) as kernel:
        await kernel.run("%%remote gpu=T4 n=3 detach session=long\nimport time\ntime.sleep(1000)")
        none = await kernel.run("%%remote gpu=T4 n=max session=more\n1")
        assert "n=max does not wait for GPUs" in none.error
        await kernel.run(
            "import threading\n"
            "said = 'remote', 'gpu=T4 session=queued', '1'\n"
            "waits = threading.Thread(target=get_ipython().run_cell_magic, args=said); waits.start()"
        )
        await until(lambda: waiting(keeper, 1))
        assert (await kernel.run("%%remote gpu=none\n6 * 7")).data[-1]["text/plain"] == "42"
        busy = await kernel.run("%%remote gpu=T4 session=queued\n1")
        assert re.match(r"BusyError: Remote cell \d+ waits for this sandbox", busy.error), busy
        kernel.client.execute("%%remote gpu=T4 session=stopped\n1")
        while True:  # The one before it says where it is, too.
            message = await kernel.client.get_iopub_msg(timeout=60)
            shown = message["content"].get("data", {}).get("text/plain", "")
            if shown.startswith("Waiting for T4: place 2 of 2"):
                break
        interrupt(kernel)
        assert (await reply_of(kernel))["ename"] == "KeyboardInterrupt"
        await until(lambda: waiting(keeper, 1))
        await kernel.run("%remote stop")
        assert (await kernel.run("%remote close long")).error == ""
        await kernel.run("waits.join(60)")
        assert await kernel.value("waits.is_alive()") is False


async def waiting(keeper: KeeperClient, count: int) -> bool:
    """Whether so many are in the queue for a GPU."""
    return len((await keeper.get("/gpus"))["queue"]) == count


async def leased(keeper: KeeperClient, gpus: int) -> bool:
    """Whether so many GPUs are held by somebody."""
    found = (await keeper.get("/gpus"))["gpus"]
    return sum(1 for gpu in found if gpu["lease"] is not None) == gpus
