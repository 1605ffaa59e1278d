"""Notebooks in gVisor sandboxes: a page that stays connected while its kernel is saved, put away and brought back."""

from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import Notebook, keeper, notebook
from tests.integration.snapshots.test_fork import PART
from tests.leaks import Places

pytestmark = pytest.mark.gvisor


async def test_a_notebook_goes_back_and_is_put_away(places: Places, tmp_path: Path) -> None:
    """To a named snapshot of its memory and its files, what it was since then gone; then it is suspended and wakes with
    the next cell, again and again. Variables, files and open files are there, and the page never lost its connection.
    """
    async with keeper(places) as client, notebook(client, tmp_path, backend="gvisor") as made:
        assert (await made.info())["backend"] == "gvisor"
        await made.run("x = 1; kept = open('/tmp/kept', 'w+'); kept.write('kept'); kept.flush(); kept.seek(1)")
        assert (await made.run("%snapshot then")).startswith("Snapshot then ")
        assert await made.run("x = 2; open('/tmp/kept', 'w').write('now'); print(x)") == "2"
        await made.do("restore", snapshot="then")
        assert await made.run("print(x, open('/tmp/kept').read())") == "1 kept"
        snapshots = (await client.get("/snapshots"))["snapshots"]
        assert [(one["name"], one["engine"]) for one in snapshots] == [("then", "gvisor")]
        for turn in range(2):
            told = await made.do("suspend")
            assert (told["state"], told["error"]) == ("suspended", None)
            assert await made.run("x += 1; print(x)") == str(turn + 2)
            info = await made.info()
            assert (info["state"], info["started_from"], info["generation"]) == ("running", "snapshot", 1)
        assert await made.run("print(kept.read())") == "ept"


async def test_a_kernel_is_restarted_in_place(places: Places, tmp_path: Path) -> None:
    """In the same sandbox, with its files; also of one that was suspended, whose kernel does not come back."""
    async with keeper(places) as client, notebook(client, tmp_path, backend="gvisor") as made:
        await made.run("x = 1; open('/tmp/kept', 'w').write('kept')")
        for verb in ("", "suspend"):
            if verb:
                await made.do(verb)
            await client.post(f"/kernels/{made.kernel_id}/end", {"grace_s": 0})
            await client.post("/kernels", made.body, timeout=120)
            assert await made.run("print('x' in globals(), open('/tmp/kept').read())") == "False kept"


FORK = """
import os, warmcell
data, here = list(range(100)), os.getcwd()
open(f"{here}/made", "w").write("before")
f = warmcell.fork(3)
if f.rank is None:
    print([each.result(60)[:2] for each in f.clones], len({each.result(60)[2] for each in f.clones}))
else:
    found = open(f"{here}/made").read()
    open(f"{here}/made", "w").write(str(f.rank))
    f.done((sum(data[f.rank::3]), found, os.urandom(8)))
"""


async def test_a_cell_divides_its_work(places: Places, tmp_path: Path) -> None:
    """Each clone goes on in the cell, with randomness and a copy of the folder that are its own."""
    async with keeper(places) as client, notebook(client, tmp_path, backend="gvisor") as made:
        parts = [[sum(range(100)[rank::3]), "before"] for rank in range(3)]
        assert await made.run(FORK) == f"{[tuple(part) for part in parts]} 3"
        assert (tmp_path / "made").read_text() == "before"
        assert await made.run("print(len(data), open(f'{here}/made').read())") == "100 before"
        said = await made.run(f"%%remote fork n=2 get=part\n{PART}")
        assert said.startswith("Remote: 2 clones of this kernel, forked in "), said
        assert await made.run("print(sum(part) == sum(data))") == "True"


NO_BAR_IS_TOO_SOON = """
import numpy as np, sys
magic = get_ipython().magics_manager.magics["cell"]["remote"].__self__
sys.modules[type(magic).__module__.rpartition(".")[0]].output.SHOWN_AFTER_S = 0.0
big = np.arange(3_000_000)
"""
MAPPED = """
%%remote n=2 get=total,first,files
import os, time
total, rank = int(big.sum()), int(os.environ["RANK"])
big[0] = 100 + rank
open(f"/dev/shm/{rank}", "w").close()
while not os.path.exists(f"/dev/shm/{1 - rank}"): time.sleep(0.01)
first = int(big[0])
files = {line.split()[-1] for line in open("/proc/self/maps") if "/run/warmcell/values-" in line}
"""


async def shown(made: Notebook, cell: str) -> list[str]:
    """The text of each display, and of each change of one, while the cell runs."""
    msg_id = made.page.send(cell)
    assert (await made.page.done(msg_id))["status"] == "ok", made.page.said(msg_id)
    return [str(each["content"].get("data", {}).get("text/plain", "")) for each in made.page.of(msg_id)]


async def test_values_are_written_where_ranks_map_them(places: Places, tmp_path: Path) -> None:
    """A descriptor comes through gVisor's wall too; each rank sees its own changes only, and nothing is sent again."""
    async with keeper(places) as client, notebook(client, tmp_path, backend="gvisor") as made:
        await made.run(NO_BAR_IS_TOO_SOON)
        assert "Sending: 23 of 23 MiB" in await shown(made, MAPPED.strip())
        found = f"{[sum(range(3_000_000))] * 2} [100, 101] {[{'/run/warmcell/values-1'}] * 2}"
        assert await made.run("print(total, first, files)") == found
        assert await made.run("print([pod.store._handed_over for pod in magic.pods._warm.values()])") == "[True]"
        assert not [text for text in await shown(made, "%%remote n=2 as=last\nint(big[-1])") if "Sending" in text]
        assert await made.run("print(last)") == "[2999999, 2999999]"
