"""The end of a kernel that was asked to shut down."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.process.guest import Guest, running_guest
from tests.leaks import Places

LAST_WILL = """
import atexit, tempfile, threading, time
from pathlib import Path

def note(name):
    Path(name).write_text("done")

class Owner:
    def __del__(self, path=Path("finalized").absolute()):
        path.write_text("done")

atexit.register(note, "atexit")
cycle = [Owner()]
cycle.append(cycle)
begun = open("begun", "w")
begun.write("the rest")
tempfile.kept = open("hidden", "wb")
_ = tempfile.kept.write(b"more")
kept = tempfile.TemporaryDirectory(dir=".", prefix="temporary-")
threading.Thread(target=lambda: (time.sleep(0.2), note("thread"))).start()
"""


@pytest.fixture
async def guest(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root) as running:
        yield running


@pytest.mark.parametrize("engine", ["template", "cold"])
async def test_a_kernel_settles_its_affairs(guest: Guest, tmp_path: Path, engine: str) -> None:
    """Threads end, exit functions run, objects are finalized, open files are written and temporary ones removed."""
    await guest.prepared("tempfile", "concurrent.futures")
    kernel = await guest.kernel(engine, cwd=str(tmp_path))
    output = await kernel.run(LAST_WILL)
    assert output.status == "ok", output
    kernel.client.shutdown(restart=True)
    ended = await guest.event(event="kernel", pid=kernel.pid, state="exited")
    assert ended["exit_code"] == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    done = dict.fromkeys(("atexit", "finalized", "thread"), "done")
    assert written == {**done, "begun": "the rest", "hidden": "more"}


async def test_a_kernel_imports_nothing_to_leave(guest: Guest, tmp_path: Path) -> None:
    """An import would be half of the time that its end takes."""
    await guest.prepared("json")
    kernel = await guest.kernel("template", cwd=str(tmp_path))
    note = "import atexit, sys; before = set(sys.modules); file = open('new', 'w'); names = sys.modules"
    output = await kernel.run(f"{note}\natexit.register(lambda old=before: file.write(str(sorted(set(names) - old))))")
    assert output.status == "ok", output
    kernel.client.shutdown(restart=True)
    assert (await guest.event(event="kernel", pid=kernel.pid, state="exited"))["exit_code"] == 0
    assert (tmp_path / "new").read_text() == "[]"
