"""A running cell becomes several; their results, errors and ends reach the one that asked."""

from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import clones, keeper, notebook, processes_of
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import CapacityError, UnsupportedOperationError

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

PART = "import os\npart = sum(data[int(os.environ['RANK']) :: 2])"
"""What a rank of two makes of the same data."""


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
        killed = await made.run("f.clones[0].kill()\nprint(f.clones[1].wait(0.1)); f.clones[0].result(60)")
        assert killed.startswith("False"), killed
        assert "There is no sandbox" in killed, killed
        exits = "f = warmcell.fork(1)\nif f.rank is not None: __import__('os')._exit(3)\nf.clones[0].result(30)"
        died = await made.run(exits)
        assert "ended" in died, died
        ended = [one["exit_code"] for one in (await client.get("/sandboxes"))["sandboxes"] if one["exit_code"]]
        assert ended == [3]  # Long before its sandbox's init comes, which nothing needs.

        await made.run("f = warmcell.fork(1)\nif f.rank is not None: f.done([f.rank, warmcell.fork(1).rank])")
        assert await made.run("f.clones[0].result(30)") == "[0, None]"
        await made.do("suspend")
        assert await made.run("print(len(data), f.clones[0].result())") == "1000 [0, None]"
    assert processes_of(places) == []


GROWS = """
import os, sys, threading, time
folder = next(path for path in sys.path if path.endswith("site-packages"))
places = ["/tmp/rows", f"{folder}/rows", os.path.expanduser("~/rows")]
files = [os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for place in places]
def grow():
    for row in range(1, 10**9):
        for file in files:
            os.write(file, b"%d\\n" % row)
        time.sleep(0.0002)
threading.Thread(target=grow, daemon=True).start()
os.mkfifo("/tmp/only-here")
"""
WHOLE = """
rows = [open(place).read().split() for place in places]
print(*{found == [str(row) for row in range(1, len(found) + 1)] for found in rows}, os.path.exists("/tmp/only-here"))
"""
NAMELESS = """
for number in range(5000): open(f"/tmp/one-of-many-{number}", "x").close()
with open("/tmp/first", "w") as file: file.write("nameless")
os.link("/tmp/first", "/tmp/second"); held = open("/tmp/first"); os.unlink("/tmp/first")
"""


async def test_a_clones_files_are_those_of_the_freeze(places: Places, tmp_path: Path) -> None:
    """What a thread writes all the time has neither a gap nor a row twice, although sandboxes are made meanwhile."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run(GROWS)
        for _ in range(2):
            async with clones(made, 3) as forked:
                for one in forked:
                    assert await one.run(WHOLE) == "True True"
                    await one.do("suspend")
                    assert await one.run(WHOLE) == "True True"
        await made.run(NAMELESS)  # CRIU gives such a file a name while the kernel stands still, so all are saved again.
        async with clones(made, 2) as forked:
            for one in forked:
                assert await one.run("print(held.read(), os.listdir('/tmp').count('second'))") == "nameless 1"
        assert await made.run(WHOLE) == "True True"


HOLDS = """
import os, socket, subprocess
ours, theirs = socket.socketpair()
argv = ["setsid", "-f", "sh", "-c", "echo $$ >&2; exec sleep 600"]
lost = subprocess.Popen(argv, stdin=theirs, stderr=subprocess.PIPE)
escaped = int(lost.stderr.readline()); lost.stderr.close(); lost.wait(); theirs.close()
"""
"""A process that is no child of the kernel's has the other end of a socket of it."""


async def left(client: KeeperClient) -> tuple[list[str], int, list[object]]:
    """The sandboxes that have not failed, how many kernels there are, and the snapshots."""
    sandboxes = [one["id"] for one in (await client.get("/sandboxes"))["sandboxes"] if one["state"] != "failed"]
    return sandboxes, len((await client.get("/kernels"))["kernels"]), (await client.get("/snapshots"))["snapshots"]


async def test_a_fork_that_fails_leaves_nothing(places: Places, tmp_path: Path) -> None:
    """Neither where it cannot be saved nor where a clone cannot be made; the source goes on and can be forked."""
    async with keeper(places, max_sandboxes=3) as client, notebook(client, tmp_path) as made:
        await made.run("x = 1")
        with pytest.raises(CapacityError, match="sandboxes already"):
            await made.do("fork", n=5)
        assert await left(client) == ([made.sandbox_id], 1, [])
        await made.run(HOLDS)
        with pytest.raises(UnsupportedOperationError, match="socket"):
            await made.do("fork", n=2)
        assert await left(client) == ([made.sandbox_id], 1, [])
        await made.run("os.killpg(escaped, 9); ours.close()")
        async with clones(made, 2) as forked:
            assert [await one.run("print(x)") for one in forked] == ["1", "1"]
    assert processes_of(places) == []


FULL = """
import os, warmcell
full = os.open("/run/warmcell/full", os.O_WRONLY | os.O_CREAT)
try:
    while True: os.write(full, bytes(2**20))
except OSError:
    os.close(full)
f = warmcell.fork(2)
"""


async def test_a_cell_that_cannot_be_answered_is_told_so(places: Places, tmp_path: Path) -> None:
    """It has filled its own run directory: nothing of the fork is left, and the next one works."""
    async with (
        keeper(places) as client,
        notebook(client, tmp_path, limits={"shm_bytes": 2**20}) as made,
    ):
        said = await made.run(FULL)
        assert "ForkError: The keeper's answer cannot be written" in said, said
        assert await left(client) == ([made.sandbox_id], 1, [])
        await made.run("__import__('os').remove('/run/warmcell/full')")
        assert await made.run("f = warmcell.fork(1); print(f.clones is not None)") == "True"
