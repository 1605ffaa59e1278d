"""Kernels outlive their server and their keeper: ids, sessions and variables are kept, and a loss is said."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import Channels, JupyterServer
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]

SETTINGS = {"prepared": 0}
END_S = 60.0
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
        while not await what():
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
    """SIGTERM: kernels are suspended, a busy one too; the next server has them under all their old names and ids."""
    async with server_of(places) as first:
        notebook = await open_session(first, "work.ipynb")
        console = await open_session(first, "console-1", "console")
        kernel_id, other_id = notebook["kernel"]["id"], console["kernel"]["id"]
        await execute(first, kernel_id, "kept = [1, 2, 3]")
        (first.root / "work.ipynb").rename(first.root / "renamed.ipynb")
        answer = await first.http.patch(f"/api/sessions/{notebook['id']}", json={"path": "renamed.ipynb"})
        assert answer.status_code == 200, answer.text
        before = await sessions(first)
        async with first.channels(other_id) as channels:
            begun = asyncio.create_task(channels.execute(COUNT))
            await until(lambda: exists(places.root / "notebooks" / "counting"))
            await first.stop()
            begun.cancel()
            await asyncio.gather(begun, return_exceptions=True)
        async with server_of(places) as second:
            assert await sessions(second) == before
            assert (notebook["id"], "renamed.ipynb", "notebook", kernel_id) in before
            assert {await state(second, one) for one in (kernel_id, other_id)} == {"suspended"}
            await execute(second, kernel_id, "kept.append(4); assert kept == [1, 2, 3, 4]")
            await execute(second, other_id, "assert n == 40, n")
            info = await second.sandbox(kernel_id)
            assert (info["state"], info["notebook"]) == ("running", str(second.root / "renamed.ipynb"))
            for one in (kernel_id, other_id):
                await second.delete_kernel(one)
            assert (await second.http.get("/warmcell/api/v1/sandboxes")).json() == {"sandboxes": []}


COUNT = """\
import time
open('counting', 'w').close()
for n in range(1, 41):
    time.sleep(0.05)
"""


async def exists(path: Path) -> bool:
    return path.exists()
