"""Kernels that nobody uses give their memory back by themselves, and come back with all they had."""

import asyncio
import contextlib
import ctypes.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import Notebook, keeper, notebook
from tests.integration.snapshots.test_warm_pool import OURS, environment, until_prepared
from tests.leaks import Places

pytestmark = pytest.mark.criu


async def until_suspended(book: Notebook, *, timeout_s: float = 60.0) -> float:
    """Wait until it sleeps; how long that took."""
    began = time.monotonic()
    while (await book.info())["state"] != "suspended":
        assert time.monotonic() - began < timeout_s, await book.info()
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def log(places: Places) -> list[str]:
    """What the keeper has written."""
    return (places.state / "keeper.log").read_text().splitlines()


async def test_only_what_is_idle_is_suspended(places: Places, tmp_path: Path) -> None:
    """A cell that runs, a thread that prints and a widget that moves keep their kernels; silence does not."""
    enough = tmp_path / "enough"
    until_enough = f"while not pathlib.Path({str(enough)!r}).exists():"
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(keeper(places, suspend_after=2.0))

        async def opened() -> Notebook:
            return await stack.enter_async_context(notebook(client, tmp_path))

        # Each has something to do from its start on: none is idle while the next one starts.
        silent = await opened()
        await silent.run("x = 41")
        busy = await opened()
        cell = busy.page.send(f"import pathlib, time\n{until_enough}\n    time.sleep(.1)\nprint('done')")
        printing = await opened()
        await printing.run(
            "import pathlib, threading, time\n"
            f"def tick():\n    {until_enough}\n        print(1)\n        time.sleep(.2)\n"
            "threading.Thread(target=tick, daemon=True).start()"
        )
        widget = await opened()
        await widget.run(
            "def opened(comm, message):\n    comm.on_msg(lambda message: comm.send({'echo': 1}))\n"
            "get_ipython().kernel.comm_manager.register_target('test', opened)"
        )
        client_of = widget.page.client
        opening = client_of.session.msg("comm_open", {"comm_id": "c1", "target_name": "test", "data": {}})
        client_of.shell_channel.send(opening)

        async def all_stay_awake(seconds: float) -> bool:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                client_of.shell_channel.send(client_of.session.msg("comm_msg", {"comm_id": "c1", "data": {}}))
                await asyncio.sleep(0.2)
                if [(await book.info())["state"] for book in (busy, printing, widget)] != ["running"] * 3:
                    return False
            return True

        for _ in range(4):  # A machine that stops for two seconds has idle kernels: such a one gets further tries.
            if await all_stay_awake(6):
                break
            await printing.run("1")
        else:
            pytest.fail("what is not idle was suspended")
        await until_suspended(silent)
        enough.touch()
        await busy.page.done(cell)
        assert busy.page.said(cell) == "done"
        for book in (busy, printing, widget):
            await until_suspended(book)
        for what in ("kernel_info", "comm_info", "history"):
            await silent.page.ask(what)
        assert (await silent.info())["state"] == "suspended"
        assert await silent.run("x += 1; print(x)") == "42"


async def test_memory_that_runs_short_suspends_nobody_who_works(places: Places, tmp_path: Path) -> None:
    """With more to be kept free than the machine has, prepared sandboxes go; a kernel of this minute stays."""
    async with (
        keeper(places, suspend_below=4096.0, prepared=1) as client,
        notebook(client, tmp_path, preload=["json"]) as book,
    ):
        deadline = time.monotonic() + 60
        while not any("memory is short" in line for line in log(places)):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        await until_prepared(client, 0)
        assert (await book.info())["state"] == "running"
        assert await book.run("print(1)") == "1"


async def test_memory_that_runs_short_suspends_who_is_idle(places: Places, tmp_path: Path) -> None:
    """With more to be kept free than the machine has: the idle kernel's memory goes to disk, a busy one runs on."""
    stop = tmp_path / "stop"
    async with (
        keeper(places, suspend_below=4096.0, suspend_below_after=1.0) as client,
        notebook(client, tmp_path) as busy,
        notebook(client, tmp_path) as idle,
    ):
        cell = busy.page.send(f"import pathlib, time\nwhile not pathlib.Path({str(stop)!r}).exists(): time.sleep(.1)")
        await idle.run("x = 41")
        await until_suspended(idle)
        assert any("was suspended: memory is short" in line for line in log(places))
        assert (await busy.info())["state"] == "running"
        assert await idle.run("x += 1; print(x)") == "42"
        stop.touch()
        assert (await busy.page.done(cell))["status"] == "ok"


async def test_a_library_is_upgraded_while_its_kernel_sleeps(places: Places, tmp_path: Path) -> None:
    """What it maps is as it was, also where it has not been looked at yet; a new kernel has the new one."""
    old, new = (library(name) for name in ("z", "bz2"))
    python, packages = environment(tmp_path / "venv")
    where = packages / "thing.so"
    shutil.copy(old, where)
    workspace = tmp_path / "work"
    workspace.mkdir()
    load = f"import ctypes; thing = ctypes.CDLL({str(where)!r}); thing.zlibVersion.restype = ctypes.c_char_p"
    async with (
        keeper(places, mounts=[sys.prefix]) as client,
        notebook(client, workspace, python=python, mounts=OURS) as book,
    ):
        await book.run(load)
        version = await book.run("thing.zlibVersion()")
        await book.do("suspend")
        where.unlink()
        shutil.copy(new, where)
        assert await book.run("thing.zlibVersion()") == version
        assert int(await book.run("thing.crc32(0, b'warmcell', 8) & 0xffffffff")) == int(
            subprocess.run(
                [sys.executable, "-c", "import zlib; print(zlib.crc32(b'warmcell'))"],
                capture_output=True,
                check=True,
                timeout=60,
            ).stdout
        )
        async with notebook(client, workspace, python=python, mounts=OURS) as another:
            assert "zlibVersion" in await another.run(load)
            assert "symbol" in await another.run(load)


def library(name: str) -> str:
    """The file of a system library."""
    soname = ctypes.util.find_library(name)
    assert soname is not None
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True, timeout=60).stdout
    return next(line.split("=> ")[1] for line in listed.splitlines() if line.split(" ")[0].strip() == soname)
