"""A running cell becomes several; their results, errors and ends reach the one that asked."""

from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import keeper, notebook, processes_of
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

FORK = """
import random, socket, time, warmcell
data = list(range(1000)); random.seed(1); before = "said before\\n"
print(before, end="", flush=True)
f = warmcell.fork(4)
if f.rank is None:
    parts = [each.result(30) for each in f.clones]
    sums, drawn, names = zip(*parts)
    print(sum(sums) == sum(data), len(set(drawn)), len(set(names)))
else:
    print("said in a clone")
    f.done((sum(data[f.rank::4]), random.random(), socket.gethostname()))
"""


async def test_a_cell_divides_its_work(places: Places, tmp_path: Path) -> None:
    """The clones' results come back, what they print does not, and they are killed from where they were made."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        assert await made.run(FORK) == "said before\nTrue 4 4"
        told = (await client.get("/sandboxes"))["sandboxes"]
        assert [one["parent"] for one in told if one["id"] != made.sandbox_id] == 4 * [made.sandbox_id]
        assert await made.run("[each.kill() for each in f.clones]; print(f.rank)") == "None"
        assert len((await client.get("/sandboxes"))["sandboxes"]) == 1
        assert (await client.get("/snapshots"))["snapshots"] == []

        failing = "f = warmcell.fork(2)\nif f.rank == 1: 1 / 0\nf.rank"
        await made.run(failing)
        assert await made.run("f.clones[0].result(30)") == "0"
        assert "ZeroDivisionError" in await made.run("f.clones[1].result(30)")
        assert "RuntimeError: late" in await made.run("raise RuntimeError('late')")

        await made.run("f = warmcell.fork(2)\nif f.rank is not None: time.sleep(600)")
        killed = await made.run("f.clones[0].kill()\nprint(f.clones[1].wait(0.1)); f.clones[0].result(10)")
        assert killed.startswith("False"), killed
        assert "There is no sandbox" in killed, killed
        exits = "f = warmcell.fork(1)\nif f.rank is not None: __import__('os')._exit(3)\nf.clones[0].result(30)"
        died = await made.run(exits)
        assert "ended" in died, died

        await made.run("f = warmcell.fork(1)\nif f.rank is not None: f.done([f.rank, warmcell.fork(1).rank])")
        assert await made.run("f.clones[0].result(30)") == "[0, None]"
        await made.do("suspend")
        assert await made.run("print(len(data), f.clones[0].result())") == "1000 [0, None]"
    assert processes_of(places) == []
