"""What a kernel was in the middle of goes on when it is suspended, restored or cloned: meaning, not exit codes."""

import asyncio
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.snapshots.notebooks import Notebook, clones, keeper, notebook, processes_of
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

PACKAGE = "kept_package"

HELPER_MODULE = """
def double(value):
    return 2 * value

class Squares:
    def __len__(self): return 64
    def __getitem__(self, index): return index * index

def echo(pipe):
    while True:
        pipe.send(double(pipe.recv()))
"""

STATE = """
import hashlib, io, json, multiprocessing, os, subprocess, sys, threading, time
import numpy, pandas, torch, torch.utils.data
import matplotlib; matplotlib.use("agg")
from matplotlib import pyplot
import aside

counter = 0
offset = open("/tmp/offset", "w+"); offset.write("0123456789"); offset.flush(); offset.seek(4)
open(os.path.expanduser("~/at-home"), "w").write("at home")
array = numpy.random.rand(1_000_000); array_was = hashlib.sha256(array).hexdigest()
tensor = torch.arange(100_000); tensor_was = int(tensor.sum())
def naturals():
    number = 0
    while True:
        number += 1
        yield number
generator = naturals(); next(generator); next(generator)
frame = pandas.DataFrame({"a": range(1000), "b": array[:1000]})
frame_was = int(pandas.util.hash_pandas_object(frame).sum())
figure, axes = pyplot.subplots(); axes.plot([1, 3, 2]); axes.set_title("kept")
def drawn():
    out = io.BytesIO(); figure.savefig(out, format="png", metadata={"Software": None})
    return hashlib.sha256(out.getvalue()).hexdigest()
figure_was = drawn()
pipe = subprocess.PIPE
child = subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, text=True, bufsize=1)
ticks = [0]
def tick():
    while True:
        ticks[0] += 1; time.sleep(0.005)
ended = subprocess.Popen(["sh", "-c", "exit 3"])  # Nobody waits for it until the end.
while open(f"/proc/{ended.pid}/stat").read().split()[2] != "Z": time.sleep(0.005)
threads = [threading.Thread(target=tick, daemon=True) for _ in range(3)]
for thread in threads: thread.start()
forked = multiprocessing.get_context("fork").Pool(2)
assert forked.map(aside.double, [1, 2]) == [2, 4]
here, there = multiprocessing.get_context("spawn").Pipe()
spawned = multiprocessing.get_context("spawn").Process(target=aside.echo, args=(there,), daemon=True); spawned.start()
here.send(1); assert here.recv() == 2
loader = iter(torch.utils.data.DataLoader(aside.Squares(), batch_size=4, num_workers=2))
batch = [next(loader).tolist()]
queue = multiprocessing.Queue(); lock = multiprocessing.Lock(); assert lock.acquire()
"""

LOOK = """
counter += 1
seen = ticks[0]
while ticks[0] < seen + 5: time.sleep(0.005)
child.stdin.write(f"{counter}\\n"); here.send(counter); queue.put(counter)
batch.append(next(loader).tolist())
print(json.dumps({
    "counter": counter,
    "offset": offset.read(1),
    "array": hashlib.sha256(array).hexdigest() == array_was,
    "tensor": int(tensor.sum()) == tensor_was,
    "generator": next(generator),
    "frame": int(pandas.util.hash_pandas_object(frame).sum()) == frame_was,
    "figure": drawn() == figure_was,
    "child": child.stdout.readline().strip(),
    "ended": open(f"/proc/{ended.pid}/stat").read().split()[2],
    "threads": sum(thread.is_alive() for thread in threads),
    "forked": forked.map(aside.double, [counter, 10]),
    "spawned": here.recv(),
    "loader": batch[-1],
    "queue": queue.get(timeout=60),
    "lock": lock.acquire(block=False),
    "home": open(os.path.expanduser("~/at-home")).read(),
    "tmp": open("/tmp/offset").read(),
}))
"""


def expected(counter: int) -> dict[str, Any]:
    """What LOOK says when it runs for the n-th time."""
    first = 4 * counter
    return {
        "counter": counter,
        "offset": "0123456789"[3 + counter],
        "array": True,
        "tensor": True,
        "generator": 2 + counter,
        "frame": True,
        "figure": True,
        "child": str(counter),
        "ended": "Z",
        "threads": 3,
        "forked": [2 * counter, 20],
        "spawned": 2 * counter,
        "loader": [number * number for number in range(first, first + 4)],
        "queue": counter,
        "lock": False,
        "home": "at home",
        "tmp": "0123456789",
    }


def wheel_of(directory: Path) -> str:
    """A package that pip can install without a network."""
    path = directory / f"{PACKAGE}-1.0-py3-none-any.whl"
    about = f"{PACKAGE}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{PACKAGE}.py", "ANSWER = 42\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", f"{PACKAGE}.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return str(path)


@pytest.fixture
async def busy(places: Places, tmp_path: Path) -> AsyncIterator[Notebook]:
    """A notebook in the middle of many things."""
    (tmp_path / "aside.py").write_text(HELPER_MODULE)
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        assert await made.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{STATE}", timeout=120) == ""
        yield made


async def look(where: Notebook) -> Any:
    said = await where.run(LOOK, timeout=120)
    try:
        return json.loads(said)
    except ValueError:
        return said


async def test_everything_goes_on(busy: Notebook) -> None:
    """Over a suspend, a restore of a restore and in a clone nothing is lost of files, memory, threads or children."""
    assert await look(busy) == expected(1)
    await busy.do("suspend")
    assert await look(busy) == expected(2)
    await busy.do("snapshot", name="third")
    await busy.do("suspend")
    assert await look(busy) == expected(3)
    await busy.do("restore", snapshot="third")
    assert await look(busy) == expected(3)
    async with clones(busy, 2) as made:
        for clone in made:
            assert await look(clone) == expected(4)
            assert await look(clone) == expected(5)
            assert await clone.run("print(ended.wait())") == "3"
        assert await look(busy) == expected(4)


SHARE = """
import mmap, os, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later give one where a kernel forks.
shared = mmap.mmap(-1, 1 << 20)
shared[:6] = b"before"
echo = os.fork()
if echo == 0:
    while shared[:3] != b"end":
        if shared[:5] == b"asked": shared[:8] = b"answered"
        time.sleep(0.005)
    os._exit(3)
def ask():
    shared[:8] = b"asked..."
    while shared[:8] != b"answered": time.sleep(0.005)
    print("answered")
"""


async def test_memory_without_a_name_is_shared_after_a_restore(places: Places, tmp_path: Path) -> None:
    """With a child, over a suspend and in clones, of which each shares its own; and with nobody at all."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        assert await made.run(f"alone = __import__('mmap').mmap(-1, 8192); alone[:4] = b'mine'\n{SHARE}") == ""
        await made.do("suspend")
        assert await made.run("print(shared[:6]); ask()") == "b'before'\nanswered"
        async with clones(made, 2) as both:
            for clone in both:
                assert (
                    await clone.run("ask(); shared[:3] = b'end'; print(os.waitpid(echo, 0)[1] >> 8)") == "answered\n3"
                )
            assert await made.run("ask(); print(alone[:4])") == "answered\nb'mine'"


DRAW = """
import numpy, random, socket, ssl, tempfile, torch, uuid
with tempfile.NamedTemporaryFile() as made:
    drawn = {
        "random": random.random(), "choice": random.sample(range(10**9), 3), "numpy": numpy.random.rand(3).tolist(),
        "torch": torch.rand(3).tolist(), "uuid1": str(uuid.uuid1()), "node": uuid.getnode(), "uuid4": str(uuid.uuid4()),
        "tempfile": made.name, "ssl": ssl.RAND_bytes(16).hex(), "hostname": socket.gethostname(),
        "sandbox": __import__("os").environ.get("WARMCELL_SANDBOX", socket.gethostname()),
    }
print(json.dumps(drawn))
"""


async def test_eight_clones_are_eight(places: Places, tmp_path: Path) -> None:
    """They draw other randomness and have other names; their files are their own, over those that the source had."""
    (tmp_path / "shared.txt").write_text("source")
    async with keeper(places) as client, notebook(client, tmp_path) as source:
        installed = await source.run(f"%pip install --no-index -q {wheel_of(tmp_path)}", timeout=120)
        assert "rror" not in installed, installed
        seeded = "import json, random, numpy, torch; random.seed(1); numpy.random.seed(1); torch.manual_seed(1)"
        await source.run(f"{seeded}\nrandom.random()\n{DRAW}\nx = 1; print(open('shared.txt').read())")
        await source.do("suspend")
        assert await source.run(f"import {PACKAGE}; print({PACKAGE}.ANSWER)") == "42"
        async with clones(source, 8) as made:
            drawn = [json.loads(await each.run(DRAW)) for each in [source, *made]]
            for name in drawn[0]:
                assert len({json.dumps(each[name]) for each in drawn}) == len(drawn), (name, drawn)
            assert len({each.sandbox_id for each in [source, *made]}) == 9
            for number, clone in enumerate(made):
                write = (
                    f"open('shared.txt', 'w').write('{number}'); open('/tmp/own', 'w').write('{number}'); x += {number}"
                )
                assert await clone.run(f"{write}\nimport {PACKAGE}; print(x, {PACKAGE}.ANSWER)") == f"{1 + number} 42"
            for number, clone in enumerate(made):
                assert (
                    await clone.run("print(open('shared.txt').read(), open('/tmp/own').read())") == f"{number} {number}"
                )
            look_at = "import os; print(x, open('shared.txt').read(), os.path.exists('/tmp/own'))"
            assert await source.run(look_at) == "1 source False"
            assert (tmp_path / "shared.txt").read_text() == "source"


async def test_ten_times_in_a_row(places: Places, tmp_path: Path) -> None:
    """Each suspend ends all processes, each cell brings the kernel back as it was; nothing is kept that has served."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 0; import os; out = open('/tmp/out', 'w+'); whole = os.urandom(1 << 20); was = hash(whole)")
        generation = (await made.info())["generation"]
        for cycle in range(1, 11):
            info = await made.do("suspend")
            assert info["state"] == "suspended"
            assert processes_of(places) == []
            code = "x += 1; out.write('.'); out.flush(); print(x, open('/tmp/out').read(), hash(whole) == was)"
            assert await made.run(code) == f"{cycle} {'.' * cycle} True"
            info = await made.do("resume")  # The cell's answer may come before it is told that it runs.
            assert (info["state"], info["generation"], info["started_from"]) == ("running", generation, "snapshot")
        async with asyncio.timeout(60):  # Each goes when the next one is on the disk.
            while len((await client.get("/snapshots"))["snapshots"]) != 1:  # noqa: ASYNC110 - it depends on a disk
                await asyncio.sleep(0.1)
