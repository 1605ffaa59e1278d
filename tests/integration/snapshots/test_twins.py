"""Sandboxes that wait for suspended kernels: a resume takes what is there, and nothing of it is left or stale."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import Notebook, keeper, notebook, processes_of
from tests.leaks import Places
from warmcell.sandbox.twins import MOST

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

LEAST_MS = 5.0
"""No sandbox is made in that time."""


def waiting(places: Places) -> set[str]:
    """The sandboxes that there are; none of them is anybody's while all kernels are suspended."""
    return set(os.listdir(places.runtime / "s"))


async def until(what: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Wait until that is true."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.01)


async def suspended(places: Places, kernel: Notebook) -> str:
    """Suspend a kernel; which sandbox waits for it then, and is up."""
    await kernel.until_idle()
    before = waiting(places)
    await kernel.do("suspend")
    await until(lambda: len(waiting(places) - before) == 1)
    name = (waiting(places) - before).pop()
    await until((places.runtime / "s" / name / "run" / "init.sock").exists)
    return name


async def test_what_was_just_suspended_comes_back_in_a_sandbox_that_waits(places: Places, tmp_path: Path) -> None:
    """No sandbox is made for it, again and again; files and variables are as they were."""
    async with keeper(places, prepared=1) as client, notebook(client, tmp_path) as kernel:
        await kernel.run("count = 0; open('/tmp/kept', 'w').write('kept')")
        for count in range(1, 4):
            name = await suspended(places, kernel)
            assert await kernel.run("count += 1; print(count, open('/tmp/kept').read())") == f"{count} kept"
            assert waiting(places) == {name}


async def test_a_page_that_is_opened_has_one_made(places: Places, tmp_path: Path) -> None:
    """One that was killed leaves nothing; the next question what kernel this is brings another."""
    async with keeper(places, prepared=1) as client, notebook(client, tmp_path) as kernel:
        await kernel.run("x = 41")
        first = await suspended(places, kernel)
        await until(lambda: processes_of(places))
        for pid in processes_of(places):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await until(lambda: first not in waiting(places))
        assert (await kernel.page.ask("kernel_info"))["status"] == "ok"
        await until(lambda: waiting(places))
        assert (await kernel.info())["state"] == "suspended"
        (second,) = waiting(places)
        assert await kernel.run("x + 1") == "42"
        assert waiting(places) == {second}


async def test_one_that_dies_as_it_is_wanted_is_replaced(places: Places, tmp_path: Path) -> None:
    """A kernel comes back although what waited for it is gone in that very moment."""
    async with keeper(places, prepared=1) as client, notebook(client, tmp_path) as kernel:
        await kernel.run("x = 41")
        for _ in range(5):
            await suspended(places, kernel)
            await until(lambda: processes_of(places))
            for pid in processes_of(places):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert await kernel.run("x + 1") == "42"
            await until(lambda: len(waiting(places)) == 1)


async def test_a_folder_that_was_replaced_meanwhile_is_the_new_one(places: Places, tmp_path: Path) -> None:
    """What waits has the folder that was there then; a kernel must not come back in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    async with keeper(places, prepared=1) as client, notebook(client, folder) as kernel:
        await kernel.run("import os")
        await suspended(places, kernel)
        folder.rename(tmp_path / "old")
        folder.mkdir()
        (folder / "new").touch()
        assert await kernel.run(f"os.listdir({str(folder)!r})") == "['new']"
        await until(lambda: len(waiting(places)) == 1)


async def test_few_wait_and_none_for_who_is_gone(places: Places, tmp_path: Path) -> None:
    """However many are suspended, only the last have one; it goes with its kernel, and with the keeper."""
    async with keeper(places, prepared=1) as client, contextlib.AsyncExitStack() as stack:
        kernels = []
        for _ in range(MOST + 1):
            kernels.append(await stack.enter_async_context(notebook(client, tmp_path, python=sys.executable)))
        names = [await suspended(places, kernel) for kernel in kernels]
        await until(lambda: waiting(places) == set(names[1:]))
        assert await kernels[0].run("6 * 7") == "42"
        await until(lambda: len(waiting(places)) == MOST + 1)
        await client.delete(f"/kernels/{kernels[-1].kernel_id}")
        await until(lambda: len(waiting(places)) == MOST)


async def test_without_room_for_prepared_sandboxes_none_waits(places: Places, tmp_path: Path) -> None:
    """They count as prepared ones."""
    async with keeper(places, prepared=1, prepared_memory=0.0) as client, notebook(client, tmp_path) as kernel:
        await kernel.run("x = 41")
        await kernel.until_idle()
        await kernel.do("suspend")
        assert await kernel.run("x + 1") == "42"
        assert (await kernel.info())["phases_ms"]["create"] > LEAST_MS
