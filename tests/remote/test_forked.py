"""`%%remote fork`: the ranks of a cell are clones of its kernel, which goes on after them."""

import asyncio
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integration.process.guest import Kernel
from tests.integration.process.test_guest_kernels import output_of
from tests.remote.conftest import body_of, interrupt, kernel_of, reply_of
from tests.remote.test_cells import CLEAR, Cell, cells, seen
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.bubblewrap,
    pytest.mark.root,
    pytest.mark.criu,
]

CELLS_IN_SHORT = 12


@pytest.fixture(scope="module")
def settings() -> Mapping[str, object]:
    """Sandboxes whose memory can be saved."""
    return {"backend": "bubblewrap"}


async def sandboxes(keeper: KeeperClient) -> list[dict[str, Any]]:
    return [one for one in (await keeper.get("/sandboxes"))["sandboxes"] if one["owner"] == "fork"]


async def none_left(keeper: KeeperClient) -> None:
    """Wait for the end of all clones, and of what the keeper has of their kernels."""
    async with asyncio.timeout(120):
        while await sandboxes(keeper):  # noqa: ASYNC110 - it is the keeper's, and tells nobody
            await asyncio.sleep(0.02)
    assert (await keeper.get("/snapshots"))["snapshots"] == []


def chosen() -> list[Any]:
    """All cells in the long form; some of them, always the same, in the short one."""
    short = {cell.title for cell in random.Random(6).sample(cells(), CELLS_IN_SHORT)}
    short |= {"a loop with await", "leaving the interpreter", "a large array"}
    return [pytest.param(cell, marks=() if cell.title in short else pytest.mark.long) for cell in cells()]


@pytest.mark.parametrize("cell", chosen(), ids=lambda cell: cell.title.replace(" ", "-"))
async def test_a_forked_cell_does_what_it_does_here(cell: Cell, kernel: Kernel, local: Kernel) -> None:
    """Equal output, displays, error and values, of each of the cells that `%%remote` without fork is judged by."""
    for one in (kernel, local):
        await one.run(CLEAR)
        assert (await one.run(cell.before)).status == "ok"
    here = await local.run(cell.code)
    get = f" get={cell.brings_back}" if cell.brings_back else ""
    there = await kernel.run(f"%%remote fork{get}\n{cell.code}")
    there.text = body_of(there)
    assert seen(there) == seen(here)
    if cell.equal:
        what = f"print(repr(({cell.equal},)))"
        values = [await one.run(what) for one in (kernel, local)]
        assert values[0].text == values[1].text
        assert values[0].status == "ok", values


async def test_ranks_go_on_with_what_the_kernel_has(kernel: Kernel, keeper: KeeperClient) -> None:
    """Even what cannot be pickled; each has its number and changes its own memory; none is left."""
    await kernel.run(
        "import os, random, threading, time, numpy as np\nlock = threading.Lock()\nbig = np.zeros(2_000_000)\n"
        "gen = iter(range(100)); next(gen)"
    )
    output = await kernel.run(
        "%%remote fork n=3 get=rank,world,total,drawn as=following\nrank = int(os.environ['RANK'])\n"
        "world = [os.environ[name] for name in ('WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')]\n"
        "with lock:\n    big[:] = rank\ntotal = int(big.sum())\ndrawn = random.random()\nnext(gen)"
    )
    assert output.error == "", output
    assert output.text.startswith("Remote: 3 clones of this kernel, forked in "), output
    assert await kernel.value("[rank, world, total]") == [
        [0, 1, 2],
        [["3", str(rank), "3"] for rank in range(3)],
        [0, 2_000_000, 4_000_000],
    ]
    assert await kernel.value("[following, next(gen), int(big.sum()), len(set(drawn))]") == [[1, 1, 1], 1, 0, 3]
    assert "RANK" not in await kernel.value("dict(os.environ)")
    assert await sandboxes(keeper) == []
    await none_left(keeper)


async def test_what_comes_after_the_magic_is_the_kernels_alone(kernel: Kernel, folder: Path) -> None:
    """A clone does not go on behind it, and no handler for errors of the cell's keeps it there."""
    output = await kernel.run(
        "for turn in range(2):\n    try:\n"
        "        get_ipython().run_cell_magic('remote', 'fork n=2 get=r', 'r = turn')\n"
        "        print(turn, r)\n    except Exception as error:\n        print(error)"
    )
    assert [line for line in output.text.splitlines() if not line.startswith("Remote")] == ["0 [0, 0]", "1 [1, 1]"]


async def test_items_are_worked_through_by_clones(kernel: Kernel) -> None:
    """Also such that cannot be sent, or are used up by being looked at; in their order, also where a clone is lost."""
    await kernel.run("import threading, os\nthings = (threading.Lock() for _ in range(6))")
    output = await kernel.run("%%remote fork n=2 each=things as=found\n(index, item.acquire(timeout=5), type(things))")
    assert output.error == "", output
    assert await kernel.value("[one[:2] for one in found]") == [[index, True] for index in range(6)]
    assert "_warmcell_items" not in await kernel.value("list(globals())")
    failed = await kernel.run("%%remote fork n=2 each=found\n1 / (3 - index)")
    assert failed.error.startswith("ZeroDivisionError")
    await kernel.run("import os, signal")
    lost = await kernel.run(
        "%%remote fork n=3 each=found as=again\nif os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n(index, os.environ['RANK'])"
    )
    assert lost.error == "", lost
    again = await kernel.value("again")
    assert [index for index, _ in again] == list(range(6))
    assert {rank for _, rank in again} <= {"0", "2"}


async def test_the_first_failure_stops_the_others(kernel: Kernel, keeper: KeeperClient) -> None:
    """It says whose it was, whether it raised, left or hung; what was shown stays; nothing is left."""
    await kernel.run("import os, time, sys")
    raised = await kernel.run(
        "%%remote fork n=3\nprint('shown')\nif os.environ['RANK'] == '1':\n    1 / 0\ntime.sleep(1000)"
    )
    assert raised.error == "ZeroDivisionError: division by zero"
    assert await kernel.value("sys.last_value.rank") == 1
    left = await kernel.run("%%remote fork n=2\nif os.environ['RANK'] == '1':\n    os._exit(3)\ntime.sleep(1000)")
    assert left.error.startswith("KeeperError: Rank 1 ended by itself with exit code 3"), left
    late = await kernel.run("%%remote fork n=2 timeout=0.5\ntime.sleep(1000)")
    assert "did not end within 0.5 s" in late.error, late
    assert await kernel.value("6 * 7") == 42
    await none_left(keeper)


async def test_the_stop_button_ends_the_clones(kernel: Kernel, keeper: KeeperClient) -> None:
    """Pressed while the cell runs, and while the clones are still being made."""
    await kernel.run("import os, time\nstarted = 'has started'")
    kernel.client.execute("%%remote fork\nprint(started, flush=True)\ntime.sleep(1000)")
    await output_of(kernel, "has started")
    interrupt(kernel)
    reply = await reply_of(kernel)
    assert reply["ename"] == "KeyboardInterrupt", reply
    kernel.client.execute(
        "print(started, flush=True)\nget_ipython().run_cell_magic('remote', 'fork n=2', 'time.sleep(1000)')"
    )
    await output_of(kernel, "has started")
    interrupt(kernel)
    reply = await reply_of(kernel)
    assert reply["ename"] == "KeyboardInterrupt", reply
    assert await kernel.value("6 * 7") == 42
    await none_left(keeper)


async def test_a_detached_cell_has_clones_of_that_moment(kernel: Kernel, keeper: KeeperClient) -> None:
    """The kernel goes on meanwhile, and what it changes is not theirs; they go when they are done."""
    await kernel.run("import os, time\nx = 1")
    await kernel.run("%%remote fork n=2 detach as=job\nx + int(os.environ['RANK'])")
    await kernel.run("x = 100")
    assert await kernel.value("job.result(60)") == [1, 2]
    await kernel.run("%%remote fork detach as=job\ntime.sleep(1000)")
    refused = await kernel.run("%%remote fork\nx")
    assert re.match(r"BusyError: Remote cell (\d+) runs.* stop it with %remote stop \1\.", refused.error), refused
    await kernel.run("%remote stop")
    await none_left(keeper)


async def test_a_kernel_that_is_killed_takes_its_clones_along(keeper: KeeperClient, folder: Path) -> None:
    """Although nobody is left who could remove them."""
    async with kernel_of(keeper, folder) as kernel:
        await kernel.run("import os, time, signal")
        await kernel.run("%%remote fork n=2 detach\ntime.sleep(1000)")
        assert len(await sandboxes(keeper)) == 2
        kernel.client.execute("os.kill(os.getpid(), signal.SIGKILL)")
        await none_left(keeper)


async def test_a_clone_that_takes_too_much_memory_says_so(keeper: KeeperClient, folder: Path) -> None:
    """The cap is that of the kernel; where memory cannot be capped nothing is said of it. The kernel lives."""
    async with kernel_of(keeper, folder, limits={"memory_bytes": 400 * 2**20}) as kernel:
        output = await kernel.run("%%remote fork n=2\nx = bytearray(2**30)\nx[-1]")
        said = "was killed for memory (its cap is 0.4 GiB). Give the notebook more memory in the Warmcell menu"
        assert output.error == "" or said in output.error, output
        assert await kernel.value("6 * 7") == 42
