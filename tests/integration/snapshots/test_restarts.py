"""Restarts where a prepared sandbox waits: it is taken whole where nothing is lost by that, and only there."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.snapshots.notebooks import Notebook, body, keeper, page
from tests.integration.snapshots.test_faults_storage import gone
from tests.integration.snapshots.test_warm_pool import PRELOAD, first
from tests.integration.snapshots.test_warm_pool import prepared as waiting
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

PLACE = "import os; print(os.readlink('/proc/self/ns/pid'))"
"""Another sandbox has other namespaces."""


async def until_some_wait(client: KeeperClient) -> None:
    """Wait until a sandbox is prepared, or as many as there was demand for."""
    async with asyncio.timeout(60):
        while not await waiting(client):  # noqa: ASYNC110 - nobody tells it
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def from_pool(client: KeeperClient, workspace: Path, **spec: Any) -> AsyncIterator[Notebook]:
    """A notebook whose sandbox came from the pool, with a page on it, and one more that waits."""
    await until_some_wait(client)
    asked = body(workspace, **{"preload": PRELOAD, **spec})
    info = await client.post("/kernels", asked, timeout=120)
    assert "pool" in info["phases_ms"]
    async with page(asked["connection"]) as opened:
        await opened.ready()
        await until_some_wait(client)
        yield Notebook(client, asked, info["id"], opened)


@contextlib.asynccontextmanager
async def prepared(client: KeeperClient, workspace: Path, **spec: Any) -> AsyncIterator[Notebook]:
    """The same, in a keeper that has just started."""
    async with first(client, workspace, **spec), from_pool(client, workspace, **spec) as made:
        yield made


async def restart(notebook: Notebook, *, grace_s: float = 60.0, **spec: Any) -> dict[str, Any]:
    """As Jupyter does it: ask the kernel to leave, wait for that, start the next."""
    notebook.page.client.shutdown(restart=True)
    end = {"grace_s": grace_s, "restart": True}
    await notebook.keeper.post(f"/kernels/{notebook.kernel_id}/end", end, timeout=120)
    notebook.body["spec"] |= spec
    info: dict[str, Any] = await notebook.keeper.post("/kernels", notebook.body, timeout=120)
    return info


async def test_nothing_left_means_a_prepared_sandbox(places: Places, tmp_path: Path) -> None:
    """Its id, page, folder, magics and interrupts are as ever, its variables are gone, and no output is lost."""
    async with keeper(places, prepared=1) as client, prepared(client, tmp_path) as made:
        place = await made.run(PLACE)
        assert await made.run("x = 1; open('written', 'w').write('by the kernel before'); print(x)") == "1"
        cell = "%%remote\nprint('far away')"
        assert "far away" in await made.run(cell)
        before = await made.info()
        for generation in (1, 2, 3):
            await until_some_wait(client)
            info = await restart(made)
            assert (info["id"], info["generation"]) == (made.sandbox_id, before["generation"] + generation)
            assert (info["started_from"], set(info["phases_ms"])) == ("template", {"pool", "ready"})
            assert (info["created_at"], info["limits"]) == (before["created_at"], before["limits"])
            running = made.page.send("import time; print('runs', flush=True); time.sleep(600)")
            await made.page.until(lambda asked=running: made.page.said(asked) == "runs")  # type: ignore[misc]
            await client.post(f"/kernels/{made.kernel_id}/signal", {"signum": int(signal.SIGINT)})
            assert (await made.page.done(running))["ename"] == "KeyboardInterrupt"
            assert await made.run("print('x' in globals(), open('written').read())") == "False by the kernel before"
            before_it, place = place, await made.run(PLACE)
            assert place != before_it
            assert await made.run("for n in range(2000): print(n)") == "\n".join(map(str, range(2000)))
        assert "far away" in await made.run(cell)
        assert len((await client.get("/sandboxes"))["sandboxes"]) == 3  # Its own, that of `%%remote`, and the first.


LEFT = {
    "open('/tmp/kept', 'w').write('kept')": "print(open('/tmp/kept').read())",
    "open('/dev/shm/kept', 'w').write('kept')": "print(open('/dev/shm/kept').read())",
    "import os; os.makedirs(os.path.expanduser('~/kept'))": "import os; print(os.listdir(os.environ['HOME']))",
    "import sys; open(sys.prefix + '/kept', 'w')": "import os, sys; print(os.listdir(sys.prefix))",
    """
import atexit
@atexit.register
def leave():
    open('/tmp/late', 'w').write('kept')
""": "print(open('/tmp/late').read())",
    """
import glob, os
name = glob.glob(os.path.expanduser('~/.ipython/*/startup/README'))[0]
text = open(name).read()
open(name, 'w').write(text.replace('This', 'kept'))
""": "import glob, os; print(open(glob.glob(os.path.expanduser('~/.ipython/*/startup/README'))[0]).read())",
    """
import subprocess
lives = subprocess.Popen(['sleep', '600'], start_new_session=True)
""": "import glob; print(*('kept' for one in glob.glob('/proc/[0-9]*/comm') if 'sleep' in open(one).read()))",
}
"""What a cell leaves, and how the next kernel finds it."""


async def test_what_a_kernel_has_left_is_there_after_a_restart(places: Places, tmp_path: Path) -> None:
    """The next kernel comes up in the same sandbox, and what waits goes on waiting."""
    async with keeper(places, prepared=1) as client, first(client, tmp_path):
        for leave, look in LEFT.items():
            async with from_pool(client, tmp_path) as made:
                place = await made.run(PLACE)
                assert await made.run(f"{leave}\nNone") == ""
                info = await restart(made)
                assert (info["id"], set(info["phases_ms"])) == (made.sandbox_id, {"restore", "ready"}), leave
                assert await made.run(PLACE) == place
                assert "kept" in await made.run(look), leave
                await client.delete(f"/kernels/{made.kernel_id}")


async def test_restarts_in_a_row(places: Places, tmp_path: Path) -> None:
    """Whoever finds none that waits gets its kernel in the same sandbox; cells that were sent meanwhile are run."""
    async with keeper(places, prepared=1) as client, prepared(client, tmp_path) as made:
        for number in range(4):
            assert (await restart(made))["id"] == made.sandbox_id
            assert await made.run(f"print({number})") == str(number)
        await until_some_wait(client)
        await client.post(f"/kernels/{made.kernel_id}/end", {"grace_s": 0})  # It is killed, and nobody says why.
        again = asyncio.create_task(client.post("/kernels", made.body, timeout=120))
        sent = made.page.send("print('waited')")
        assert set((await again)["phases_ms"]) == {"pool", "ready"}
        assert (await made.page.done(sent))["status"] == "ok"
        assert made.page.said(sent) == "waited"
        assert (await made.run("%snapshot now")).startswith("Snapshot now ")


async def test_another_sandbox_is_asked_for(places: Places, tmp_path: Path) -> None:
    """With other settings what waits is not what is wanted."""
    async with keeper(places, prepared=1) as client, prepared(client, tmp_path) as made:
        info = await restart(made, limits={"memory_bytes": 2**30})
        assert info["id"] != made.sandbox_id
        assert info["limits"]["memory"]["value"] == 2**30
        assert await made.run("print(6 * 7)") == "42"


async def test_snapshots_of_before_can_be_restored(places: Places, tmp_path: Path) -> None:
    """What a kernel has saved is its notebook's, also when its sandbox has become another one; so is what comes."""
    async with keeper(places, prepared=1) as client, prepared(client, tmp_path) as made:
        await made.run("x = 1")
        await made.run("%snapshot then")
        assert set((await restart(made))["phases_ms"]) == {"pool", "ready"}
        assert await made.run("print('x' in globals())") == "False"
        await made.do("restore", snapshot="then")
        assert await made.run("x += 1; open('/tmp/kept', 'w').write('kept'); print(x)") == "2"
        await made.until_idle()
        await made.do("suspend")
        assert await made.run("x += 1; print(x, open('/tmp/kept').read())") == "3 kept"
        assert set((await restart(made))["phases_ms"]) == {"restore", "ready"}
        assert await made.run("print('x' in globals(), open('/tmp/kept').read())") == "False kept"


async def test_a_keeper_that_is_killed_meanwhile_leaves_nothing(places: Places, tmp_path: Path) -> None:
    """Both sandboxes end with it, and the next keeper starts the kernel anew."""
    async with keeper(places, prepared=1) as client, prepared(client, tmp_path) as made:
        made.page.client.shutdown(restart=True)
        await client.post(f"/kernels/{made.kernel_id}/end", {"grace_s": 60, "restart": True}, timeout=120)
        await gone(client, signum=signal.SIGKILL)
        async with keeper(places, prepared=1) as second:
            asked = body(tmp_path, preload=PRELOAD)
            await second.post("/kernels", asked, timeout=120)
            async with page(asked["connection"]) as opened:
                await opened.ready()
                assert await opened.run("print(6 * 7)") == "42"
            assert len((await second.get("/sandboxes"))["sandboxes"]) == 1
