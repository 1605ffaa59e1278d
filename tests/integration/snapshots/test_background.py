"""What runs besides a kernel does not come back with it, and that is said; what is in use keeps it from sleeping."""

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import Notebook, keeper, notebook
from tests.integration.snapshots.test_relief import until_suspended
from tests.lanes import TOP
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

DAEMON = """\
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
os.wait()
"""
BUSY = "sh -c 'while :; do :; done'"
LIVES = "child.poll() is None"


@pytest.mark.parametrize("preload", [[], ["json"]], ids=["cold", "template"])
async def test_what_does_not_come_back_is_named(places: Places, tmp_path: Path, preload: list[str]) -> None:
    """Commands, daemons and forks that are nobody's child are named, what comes back is not: children, and our own."""
    async with keeper(places) as client, notebook(client, tmp_path, preload=preload) as made:
        await made.run("import subprocess\nchild = subprocess.Popen(['sleep', '1001'])")
        assert (await made.do("snapshot", name="before"))["not_saved"] == []
        await made.run("import os; os.system('sleep 1002 &')")
        await made.run(DAEMON)
        named = (await made.do("snapshot", name="then"))["not_saved"]
        assert sorted(named) == ["python", "sleep 1002"]
        assert (await made.info())["not_saved"] == []  # It runs on, with all that it has.

        asleep = await made.do("suspend")
        assert asleep["not_saved"] == named
        assert await made.run(LIVES) == "True"
        assert (await made.info())["not_saved"] == named
        assert "1002" not in await made.run("!cat /proc/[0-9]*/cmdline | tr '\\0' ' '")

        await made.do("suspend")  # It had nothing else any more.
        assert (await made.do("resume"))["not_saved"] == []
        assert (await made.do("restore", snapshot="then"))["not_saved"] == named
        [clone] = (await made.do("fork", count=1, snapshot="then"))["sandboxes"]
        assert clone["not_saved"] == named
        assert (await made.do("restore", snapshot="before"))["not_saved"] == []


async def test_many_are_counted(places: Places, tmp_path: Path) -> None:
    """Equal ones are one, long ones are cut, and beyond ten it is said how many."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("import os\nfor n in [*range(13), 12]:\n    os.system(f'sleep {2000 + n} &')")
        saved = await made.do("snapshot", name="many")
        assert saved["not_saved"] == [*(f"sleep {2000 + n}" for n in range(10)), "3 more"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "warmcell.extension.cli", "snapshots", "ls"),
            stdout=asyncio.subprocess.PIPE,
            cwd=TOP,
        )
        listed = (await asyncio.wait_for(process.communicate(), 60))[0].decode()
        assert f"{saved['id']} is without what ran besides its kernel: sleep 2000, " in listed
        assert ", 3 more\n" in listed


async def test_what_is_in_use_keeps_its_kernel(places: Places, tmp_path: Path) -> None:
    """A server that waits for connections and a program that computes do, one that sleeps does not, and is named."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(keeper(places, suspend_after=1.5))
        books: list[Notebook] = []
        server = "python -m http.server 8123"
        for program in (server, BUSY, "sleep 1003"):
            books.append(await stack.enter_async_context(notebook(client, tmp_path)))
            await books[-1].run(f"import os; os.system({f'{program} & echo $! > /tmp/pid'!r})")
        serving, working, sleeping = books
        await until_suspended(sleeping)  # It began last, and was looked at twice.
        assert (await sleeping.info())["not_saved"] == ["sleep 1003"]
        for book in (serving, working):
            assert (await book.info())["state"] == "running"
            await book.run("os.kill(int(open('/tmp/pid').read()), 9)")
        for book in (serving, working):
            await until_suspended(book)
            assert (await book.info())["not_saved"] == []
