"""Ranks in a sandbox with a network of its own: they reach each other, and nothing else."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.remote.conftest import kernel_of
from tests.remote.test_ranks import TRAIN
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.bubblewrap]

PIDS = 60


@pytest.fixture(scope="module")
def settings() -> Mapping[str, object]:
    """Sandboxes that isolate."""
    return {"backend": "bubblewrap"}


async def test_ranks_reach_each_other_and_nothing_else(keeper: KeeperClient, folder: Path) -> None:
    """Over their own loopback; large values are in memory that all of them map, and files in one /dev/shm."""
    async with kernel_of(keeper, folder, network="none") as kernel:
        await kernel.run("import numpy as np\nbig = np.arange(2_000_000)")
        output = await kernel.run(
            "%%remote n=2 get=heard,outside,total,shared\nimport os, socket, time\nrank = int(os.environ['RANK'])\n"
            "place = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
            "if rank == 0:\n    server = socket.create_server(place)\n    open('/dev/shm/ready', 'w').close()\n"
            "    heard = server.accept()[0].recv(10).decode()\nelse:\n"
            "    while not os.path.exists('/dev/shm/ready'): time.sleep(0.01)\n"
            "    socket.create_connection(place).send(b'hello'); heard = 'said'\n"
            "try:\n    outside = bool(socket.create_connection(('192.0.2.1', 80), 1))\n"
            "except OSError as error:\n    outside = error.strerror\n"
            "total = int(big.sum()); big[0] = 100 + rank\nshared = os.path.exists('/dev/shm/ready')"
        )
        assert output.error == ""
        assert await kernel.value("heard") == ["hello", "said"]
        assert await kernel.value("outside") == ["Network is unreachable"] * 2
        assert await kernel.value("total") == [1999999000000] * 2
        assert await kernel.value("shared") == [True, True]
        assert (await kernel.run("%%remote n=2 as=own\nint(big[0])")).error == ""
        assert await kernel.value("own") == [100, 101]


async def test_training_works_where_nothing_else_is_reachable(keeper: KeeperClient, folder: Path) -> None:
    """The cell with DDP, over the loopback of a network of its own; all ranks have the same loss."""
    async with kernel_of(keeper, folder, network="none") as kernel:
        output = await kernel.run("%%remote n=2 get=loss,told\nimport socket\ntold = socket.if_nameindex()\n" + TRAIN)
        assert output.error == ""
        first, second = await kernel.value("loss")
        assert abs(first - second) < 1e-6
        assert await kernel.value("told") == [[[1, "lo"]]] * 2


async def test_the_memory_of_ranks_is_capped_together(keeper: KeeperClient, folder: Path) -> None:
    """More than the notebook has is refused; who is killed says whose cap it was."""
    async with kernel_of(keeper, folder, limits={"memory_bytes": 1200 * 2**20}) as kernel:
        (here,) = [one for one in (await keeper.get("/sandboxes"))["sandboxes"] if one["state"] == "running"]
        refused = await kernel.run("%%remote n=4 memory=1GiB\npass")
        assert "4.0 GiB of memory are asked for, all ranks together, and the notebook itself has a cap of 1.2 GiB" in (
            refused.error
        )
        if not here["limits"]["memory"]["enforced"]:
            pytest.skip(f"the memory limit is not enforced: {here['limits']['memory_bytes']['why']}")
        output = await kernel.run(
            "%%remote n=4 memory=300MiB\nimport os, time\nx = bytearray(1400 * 2**20 * (os.environ['RANK'] == '2'))\n"
            "time.sleep(1000)"
        )
        assert "Rank 2 was killed for memory (the cap of all 4 ranks together is 1.2 GiB)" in output.error


@pytest.mark.parametrize("capped", [False, True])
async def test_values_of_a_capped_notebook_go_in_chunks(keeper: KeeperClient, folder: Path, capped: bool) -> None:
    """It gets no descriptor, whose pages would be its own; all is the same there, and is shown on its way."""
    limits = {"limits": {"memory_bytes": 2 * 2**30}} if capped else {}
    async with kernel_of(keeper, folder, **limits) as kernel:
        await kernel.run(
            "import sys, numpy as np\nbig = np.arange(3_000_000)\n"
            "magic = get_ipython().magics_manager.magics['cell']['remote'].__self__\n"
            "sys.modules[type(magic).__module__.rpartition('.')[0]].output.SHOWN_AFTER_S = 0.0"
        )
        output = await kernel.run("%%remote n=2 get=total\ntotal = int(big.sum()); big[0] = 1")
        assert output.error == ""
        assert any("Sending: " in str(data.get("text/plain")) for data in output.data), output.data
        assert await kernel.value("total") == [sum(range(3_000_000))] * 2
        pods = "[pod.store._handed_over for pod in magic.pods._warm.values()]"
        assert await kernel.value(pods) == [not capped]


async def test_a_fork_bomb_in_a_rank_is_bounded(keeper: KeeperClient, folder: Path) -> None:
    """It runs into the cap on processes; the notebook does not feel it, and all of it goes with the sandbox."""
    async with kernel_of(keeper, folder, limits={"pids": PIDS}) as kernel:
        (here,) = [one for one in (await keeper.get("/sandboxes"))["sandboxes"] if one["state"] == "running"]
        if not here["limits"]["pids"]["enforced"]:
            pytest.skip(f"the pids limit is not enforced: {here['limits']['pids']['why']}")
        output = await kernel.run(
            "%%remote get=said,count\nimport os, time\ncount = 0\ntry:\n    while count < 5000:\n"
            "        if os.fork() == 0:\n            time.sleep(1000)\n        count += 1\n"
            "except OSError as error:\n    said = error.strerror"
        )
        assert output.error == "", output
        assert await kernel.value("said") == "Resource temporarily unavailable"
        assert 0 < await kernel.value("count") < PIDS
        assert (await kernel.run("%%remote\n6 * 7")).data == [{"text/plain": "42"}]
        assert await kernel.value("__import__('subprocess').run('true').returncode") == 0
        assert "1 sandboxes removed" in (await kernel.run("%remote close")).text
