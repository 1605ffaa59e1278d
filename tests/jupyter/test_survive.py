"""Kernels outlive their server and their keeper: ids, sessions and variables are kept, and a loss is said."""

import asyncio
import json
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import Channels, JupyterServer
from tests.integration.snapshots.test_faults import descendants
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.helper.seals import Seals

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]

SETTINGS = {"prepared": 0}
END_S = 120.0
LOOK_S = 0.1
EMPTY = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def server_of(places: Places, **settings: object) -> JupyterServer:
    return JupyterServer(places, settings={**SETTINGS, **settings})


async def open_session(server: JupyterServer, path: str, kind: str = "notebook") -> dict[str, Any]:
    """What a page does when a notebook or a console is opened."""
    if kind == "notebook":
        (server.root / path).write_text(json.dumps(EMPTY))
    body = {"path": path, "name": path, "type": kind, "kernel": {"name": "warmcell"}}
    answer = await server.http.post("/api/sessions", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def sessions(server: JupyterServer) -> set[tuple[str, str, str, str]]:
    found = (await server.http.get("/api/sessions")).json()
    return {(one["id"], one["path"], one["type"], one["kernel"]["id"]) for one in found}


async def execute(server: JupyterServer, kernel_id: str, code: str) -> None:
    async with server.channels(kernel_id) as channels:
        await channels.execute(code)


async def state(server: JupyterServer, kernel_id: str) -> str:
    return str((await server.sandbox(kernel_id))["state"])


async def until(what: Callable[[], Any], *, timeout: float = END_S) -> None:
    """Wait until an asynchronous condition holds."""
    async with asyncio.timeout(timeout):
        while True:
            if await what():
                return
            await asyncio.sleep(LOOK_S)


def keeper_pid(places: Places) -> int:
    return int(json.loads((places.runtime / "keeper.lock").read_text())["pid"])


async def end_process(pid: int, signum: int) -> None:
    """Send a signal, and wait for the end of a process that is no child of ours."""
    handle = os.pidfd_open(pid)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(handle, ended.set)
    try:
        signal.pidfd_send_signal(handle, signum)
        async with asyncio.timeout(END_S):
            await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def test_a_stopped_server_leaves_its_kernels_to_the_next(places: Places) -> None:
    """SIGTERM: kernels are suspended, busy ones too; the next server has them under all their old names and ids.

    What ran goes on: what it says reaches the page that was open, and without a page it comes to its end as well.
    """
    async with server_of(places) as first:
        notebook = await open_session(first, "work.ipynb")
        consoles = [await open_session(first, f"console-{number}", "console") for number in (1, 2)]
        kernel_id, seen_id, unseen_id = (one["kernel"]["id"] for one in (notebook, *consoles))
        await execute(first, kernel_id, "kept = [1, 2, 3]")
        (first.root / "work.ipynb").rename(first.root / "renamed.ipynb")
        answer = await first.http.patch(f"/api/sessions/{notebook['id']}", json={"path": "renamed.ipynb"})
        assert answer.status_code == 200, answer.text
        before = await sessions(first)
        work = places.root / "notebooks"
        async with first.channels(seen_id, page="tab") as channels, first.channels(unseen_id) as others:
            begun = [
                asyncio.create_task(each.execute(COUNT.format(name))) for each, name in ((channels, "a"), (others, "b"))
            ]
            await until(lambda: exists(work / "a-counting"))
            await until(lambda: exists(work / "b-counting"))
            await first.stop()
            for each in begun:
                each.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
        assert not (work / "a-counted").exists()
        assert not (work / "b-counted").exists()
        async with server_of(places) as second:
            assert await sessions(second) == before
            assert (notebook["id"], "renamed.ipynb", "notebook", kernel_id) in before
            assert await state(second, kernel_id) == "suspended"
            async with second.channels(seen_id, page="tab") as again:
                assert (await again.rest(channels)).endswith("38\n39\n40\n")
            await execute(second, kernel_id, "kept.append(4); assert kept == [1, 2, 3, 4]")
            await until(lambda: exists(work / "b-counted"))
            info = await second.sandbox(kernel_id)
            assert (info["state"], info["notebook"]) == ("running", str(second.root / "renamed.ipynb"))
            for one in (kernel_id, seen_id, unseen_id):
                await second.delete_kernel(one)
            assert (await second.http.get("/warmcell/api/v1/sandboxes")).json()["sandboxes"] == []


async def test_a_session_under_a_path_of_its_own_is_its_notebooks(places: Places) -> None:
    """JupyterLab begins each under a random path and renames it a moment later: a page that looks meanwhile for the
    sandbox of its notebook finds it all the same.
    """
    async with server_of(places) as server:
        (server.root / "sub").mkdir()
        (server.root / "sub" / "work.ipynb").write_text(json.dumps(EMPTY))
        place = str(server.root / "sub" / "work.ipynb")
        body = {"name": "work.ipynb", "type": "notebook", "kernel": {"name": "warmcell"}}
        made = (await server.http.post("/api/sessions", json={**body, "path": "sub/3e5f"})).json()
        kernel_id = made["kernel"]["id"]
        assert (await server.sandbox(kernel_id))["notebook"] == place
        for change in ({"path": "sub/work.ipynb"}, {"name": "work.ipynb"}):
            await server.http.patch(f"/api/sessions/{made['id']}", json=change)
            assert (await server.sandbox(kernel_id))["notebook"] == place
        await server.delete_kernel(kernel_id)


async def test_the_servers_culler_suspends_ours_and_ends_others(places: Places) -> None:
    """An idle Warmcell kernel is suspended once and goes on with its next cell; a plain one is culled as ever."""
    configure_culler(places)
    async with server_of(places) as server:
        kernel_id, plain = await server.start_kernel("warmcell"), await server.start_kernel("python3")
        await execute(server, kernel_id, "kept = 1")
        await until(lambda: is_state(server, kernel_id, "suspended"))
        await until(lambda: is_gone(server, plain))
        snapshot = (await server.sandbox(kernel_id))["snapshot"]
        await asyncio.sleep(2 * CULL_INTERVAL_S)  # the culler comes again, and has nothing to do
        info = await server.sandbox(kernel_id)
        assert (info["state"], info["snapshot"]) == ("suspended", snapshot)
        await execute(server, kernel_id, "kept += 1; assert kept == 2")
        await server.delete_kernel(kernel_id)


DETACHED = """\
%%remote detach as=job get=kept
import os, time
while not os.path.exists('go-on'):
    time.sleep(0.05)
kept = 6 * 7
"""


async def test_a_detached_remote_cell_outlives_its_server(places: Places) -> None:
    """The kernel cannot be saved meanwhile, and runs on; the next server has it, with the cell's handle and result."""
    async with server_of(places) as first:
        kernel_id = (await open_session(first, "work.ipynb"))["kernel"]["id"]
        await execute(first, kernel_id, DETACHED)
        await first.stop()
        async with server_of(places) as second:
            await execute(second, kernel_id, "assert not job.done(), job")
            await execute(second, kernel_id, "open('go-on', 'w').close(); job.result(60); assert kept == 42, kept")
            await second.delete_kernel(kernel_id)


@pytest.mark.parametrize("saved", [True, False])
async def test_a_keeper_that_ends_under_a_server(places: Places, saved: bool) -> None:
    """Stopped, it has saved the kernels, and the same page goes on. Killed, a fresh kernel says that state is lost."""
    async with server_of(places) as server:
        session = await open_session(server, "work.ipynb")
        kernel_id = session["kernel"]["id"]
        async with server.channels(kernel_id) as channels:
            await channels.execute("kept = 42")
            first = keeper_pid(places)
            await end_process(first, signal.SIGTERM if saved else signal.SIGKILL)
            if saved:
                await until(lambda: is_state(server, kernel_id, "suspended"))
                await channels.execute("assert kept == 42")
            else:
                await until(lambda: is_state(server, kernel_id, "running"))
                await channels.execute("assert 'kept' not in globals()")
        info = await server.sandbox(kernel_id)
        assert info["notebook"] == str(server.root / "work.ipynb")
        assert (info["previous_error"] or {}).get("code") == (None if saved else "sandbox_died")
        assert keeper_pid(places) != first
        assert {one[3] for one in await sessions(server)} == {kernel_id}
        await server.delete_kernel(kernel_id)
        assert not (places.state / "kernels.json").exists()


async def test_a_machine_that_is_shut_down_and_booted_again(places: Places) -> None:
    """Server, keeper and helper are told to end at the same time; in the next boot the page goes on."""
    async with server_of(places) as first:
        session = await open_session(first, "work.ipynb")
        kernel_id = session["kernel"]["id"]
        await execute(first, kernel_id, "kept = [1, 2, 3]")
        keeper = keeper_pid(places)
        helpers = [pid for pid, name in descendants(keeper).items() if name == "warmcell-helper"]
        assert helpers
        handles = [os.pidfd_open(pid) for pid in helpers]
        for pid in helpers:
            os.kill(pid, signal.SIGTERM)
        await asyncio.gather(first.stop(), end_process(keeper, signal.SIGTERM))
        for handle in handles:
            assert (await asyncio.to_thread(select.select, [handle], [], [], END_S))[0]
            os.close(handle)
        for path in (places.state / "images").glob("*/????????????/image.json"):
            seals = Seals(str(places.state / "images" / "key"))
            about = seals.read(str(path))
            assert about["finished"] is not None
            seals.write(str(path), {**about, "boot_id": "the one before"})
        async with server_of(places) as second:
            assert {(one[0], one[3]) for one in await sessions(second)} == {(session["id"], kernel_id)}
            await execute(second, kernel_id, "kept.append(4); assert kept == [1, 2, 3, 4]")
            await second.delete_kernel(kernel_id)


async def test_what_is_lost_with_server_and_keeper_is_said_once(places: Places) -> None:
    """Both killed: the next kernel of the notebook says that the one before is lost, and the one after it does not."""
    async with server_of(places) as first:
        lost = (await open_session(first, "work.ipynb"))["kernel"]["id"]
        await first.kill()
        await end_process(keeper_pid(places), signal.SIGKILL)
        async with server_of(places) as second:
            assert await sessions(second) == set()
            for died in ("sandbox_died", None):
                fresh = (await open_session(second, "work.ipynb"))["kernel"]["id"]
                assert fresh != lost
                assert ((await second.sandbox(fresh))["previous_error"] or {}).get("code") == died
                await second.delete_kernel(fresh)


async def test_a_kernel_that_ended_meanwhile_is_restarted_and_says_so(places: Places) -> None:
    """It dies while no server looks: the next one has it under its id, restarted, with the reason."""
    async with server_of(places) as first:
        session = await open_session(first, "work.ipynb")
        kernel_id = session["kernel"]["id"]
        await first.kill()
        async with await KeeperClient.connect(start=False) as keeper:
            await keeper.post(f"/kernels/{kernel_id}/signal", {"signum": int(signal.SIGSEGV)})
            await keeper.get(f"/kernels/{kernel_id}?wait=30")
        async with server_of(places) as second:
            assert {(one[0], one[3]) for one in await sessions(second)} == {(session["id"], kernel_id)}
            await execute(second, kernel_id, "1")
            assert (await second.sandbox(kernel_id))["previous_error"]["code"] == "sandbox_died"
            await second.delete_kernel(kernel_id)


@pytest.mark.parametrize("settings", [{"backend": "process"}, {"keep_kernels": False}])
async def test_without_memory_or_wish_kernels_end_with_their_server(
    places: Places, settings: dict[str, object]
) -> None:
    """Where memory cannot be saved, or `c.Warmcell.keep_kernels` is off, all is as Jupyter has it."""
    configure_culler(places)
    async with server_of(places, **settings) as first:
        culled = await first.start_kernel("warmcell")
        await until(lambda: is_gone(first, culled))
        await open_session(first, "work.ipynb")
        await first.stop()
        assert not (places.state / "kernels.json").exists()
        async with server_of(places, **settings) as second:
            assert (await second.http.get("/api/kernels")).json() == []


async def test_suspend_by_hand_and_what_wakes(places: Places) -> None:
    """Over the server's REST: suspended, a look at the kernel and its page's questions wake nothing, a cell does."""
    async with server_of(places) as server:
        kernel_id = await server.start_kernel("warmcell")
        await execute(server, kernel_id, "kept = 1")
        place = f"/warmcell/api/v1/sandboxes/{(await server.sandbox(kernel_id))['id']}"
        suspended = await server.http.post(f"{place}/suspend")
        assert (suspended.status_code, suspended.json()["state"]) == (200, "suspended")
        listed = (await server.http.get(f"/warmcell/api/v1/snapshots?kernel_id={kernel_id}")).json()["snapshots"]
        assert [(one["kind"], one["id"]) for one in listed] == [("suspended", suspended.json()["snapshot"])]
        assert (await server.http.get(f"/api/kernels/{kernel_id}")).json()["execution_state"] == "idle"
        async with server.channels(kernel_id) as channels:  # for which the server asks the kernel who it is
            assert await first_state(channels) == "idle"
            assert await state(server, kernel_id) == "suspended"
            await channels.execute("kept += 1; assert kept == 2")
        assert await state(server, kernel_id) == "running"
        await server.http.post(f"{place}/suspend")
        resumed = await server.http.post(f"{place}/resume")
        assert (resumed.status_code, resumed.json()["state"]) == (200, "running")
        await execute(server, kernel_id, "assert kept == 2")
        await server.delete_kernel(kernel_id)


CULL_INTERVAL_S = 1


def configure_culler(places: Places) -> None:
    directory = Path(places.env["JUPYTER_CONFIG_DIR"])
    directory.mkdir(parents=True)
    lines = [f"c.MappingKernelManager.cull_{name} = {CULL_INTERVAL_S}" for name in ("idle_timeout", "interval")]
    lines.append("c.WarmcellProvisioner.network = 'host'")  # the process backend has no other
    (directory / "jupyter_server_config.py").write_text("\n".join(lines) + "\n")


async def is_state(server: JupyterServer, kernel_id: str, wanted: str) -> bool:
    """Also while the keeper is on its way."""
    answer = await server.http.get("/warmcell/api/v1/sandboxes")
    found = answer.json().get("sandboxes", [])
    return any((one["kernel_id"], one["state"]) == (kernel_id, wanted) for one in found)


async def first_state(channels: Channels) -> str:
    """What a page hears of its kernel that asks nothing."""
    async with asyncio.timeout(END_S):
        while True:
            said = json.loads(await channels.read() or "{}")
            if (said["msg_type"], said["parent_header"]) == ("status", {}):
                return str(said["content"]["execution_state"])


async def is_gone(server: JupyterServer, kernel_id: str) -> bool:
    return kernel_id not in {one["id"] for one in (await server.http.get("/api/kernels")).json()}


COUNT = """\
import time
open('{0}-counting', 'w').close()
for n in range(1, 41):
    time.sleep(0.05)
    print(n)
open('{0}-counted', 'w').close()
"""


async def exists(path: Path) -> bool:
    return path.exists()
