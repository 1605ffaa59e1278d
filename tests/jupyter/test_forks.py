"""Clones of a notebook's kernel are kernels of its Jupyter server; snapshots are named, taken out and brought in."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.server import JupyterServer
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]

API = "/warmcell/api/v1"
EMPTY = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
async def server(places: Places) -> AsyncIterator[JupyterServer]:
    async with JupyterServer(places, settings={"prepared": 0}) as running:
        yield running


async def kernels(server: JupyterServer) -> set[str]:
    return {str(one["id"]) for one in (await server.http.get("/api/kernels")).json()}


async def test_a_clone_is_a_kernel_of_the_server_and_outlives_it(places: Places, server: JupyterServer) -> None:
    """Listed by Jupyter, opened by a session of its own, suspended with the server, taken up by the next, restarted."""
    source = await server.start_kernel("warmcell")
    async with server.channels(source) as channels:
        await channels.execute("kept = [1, 2]")
        answer = await server.http.post(f"{API}/sandboxes/{(await server.sandbox(source))['id']}/fork", json={"n": 1})
        assert answer.status_code == 201, answer.text
        (clone,) = (box["kernel_id"] for box in answer.json()["sandboxes"])
        assert await kernels(server) == {source, clone}
        (server.root / "copy.ipynb").write_text(json.dumps(EMPTY))
        body = {"path": "copy.ipynb", "name": "copy.ipynb", "type": "notebook", "kernel": {"id": clone}}
        session = (await server.http.post("/api/sessions", json=body)).json()
        assert session["kernel"]["id"] == clone
        async with server.channels(clone) as copy:
            await copy.execute("kept.append(3); assert kept == [1, 2, 3]")
        await channels.execute("assert kept == [1, 2]")
    await server.stop()
    async with JupyterServer(places, settings={"prepared": 0}) as second:
        found = (await second.http.get("/api/sessions")).json()
        assert [(one["path"], one["kernel"]["id"]) for one in found] == [("copy.ipynb", clone)]
        assert await kernels(second) == {source, clone}
        async with second.channels(clone) as copy:
            await copy.execute("assert kept == [1, 2, 3]")
            await second.restart_kernel(clone)
            await copy.execute("assert 'kept' not in globals()")
        for kernel_id in (clone, source):
            await second.delete_kernel(kernel_id)
        assert (await second.http.get(f"{API}/sandboxes")).json()["sandboxes"] == []


SECOND_FAILS = """
from warmcell.extension.server import memory
from warmcell.sandbox.errors import TransportError
adopt, seen = memory.adopt, []
async def failing(kernels, kernel):
    seen.append(kernel)
    if len(seen) == 2:
        raise TransportError("The keeper is gone", hint="Try again.")
    return await adopt(kernels, kernel)
memory.adopt = failing
"""
"""Of a server's configuration: of what it takes up the second cannot be had."""


async def test_a_fork_of_which_not_all_can_be_had_leaves_nothing(places: Places) -> None:
    """Neither a kernel that Jupyter would start anew under a clone's id, nor a sandbox of which nobody knows."""
    directory = Path(places.env["JUPYTER_CONFIG_DIR"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "jupyter_server_config.py").write_text(SECOND_FAILS)
    async with JupyterServer(places, settings={"prepared": 0}) as server:
        source = await server.start_kernel("warmcell")
        box = (await server.sandbox(source))["id"]
        answer = await server.http.post(f"{API}/sandboxes/{box}/fork", json={"n": 3})
        assert answer.json()["message"].startswith("The keeper is gone"), answer.text
        assert await kernels(server) == {source}
        assert [one["id"] for one in (await server.http.get(f"{API}/sandboxes")).json()["sandboxes"]] == [box]
        await server.delete_kernel(source)


async def test_a_fork_outlives_the_kernel_that_it_came_from(server: JupyterServer) -> None:
    """Its source is shut down, and it goes on with all it has."""
    source = await server.start_kernel("warmcell")
    async with server.channels(source) as channels:
        await channels.execute("kept = [1, 2]")
    box = (await server.sandbox(source))["id"]
    (clone,) = (await server.http.post(f"{API}/sandboxes/{box}/fork", json={"n": 1})).json()["sandboxes"]
    await server.delete_kernel(source)
    async with server.channels(clone["kernel_id"]) as copy:
        await copy.execute("assert kept == [1, 2]")
    assert await kernels(server) == {clone["kernel_id"]}
    assert (await server.sandbox(clone["kernel_id"]))["id"] == clone["id"]
    await server.delete_kernel(clone["kernel_id"])


BUSY = """
import time
n = ended = 0
try:
    open({begun!r}, "w").close()
    while True:
        n += 1
        time.sleep(0.01)
except KeyboardInterrupt:
    ended = n
"""


async def test_a_fork_in_the_middle_of_a_cell(server: JupyterServer) -> None:
    """The cell goes on in both, each until it is interrupted by itself."""
    source, begun = await server.start_kernel("warmcell"), server.root / "begun"
    async with server.channels(source) as channels:
        running = asyncio.create_task(channels.execute(BUSY.format(begun=str(begun))))
        async with asyncio.timeout(60):
            while not begun.exists():  # noqa: ASYNC110 - nobody tells it
                await asyncio.sleep(0.02)
        box = (await server.sandbox(source))["id"]
        (clone,) = (await server.http.post(f"{API}/sandboxes/{box}/fork", json={"n": 1})).json()["sandboxes"]
        assert not running.done()
        async with server.channels(clone["kernel_id"]) as copy:
            asked = asyncio.create_task(copy.execute("assert ended > 1"))
            await interrupt(server, clone["kernel_id"])
            await asked
        assert not running.done()
        await interrupt(server, source)
        await running
        await channels.execute("assert ended > 1")
    for kernel_id in (clone["kernel_id"], source):
        await server.delete_kernel(kernel_id)


async def interrupt(server: JupyterServer, kernel_id: str) -> None:
    """What the page's button does."""
    (await server.http.post(f"/api/kernels/{kernel_id}/interrupt")).raise_for_status()


async def test_a_clone_that_a_cell_has_made_can_be_opened(server: JupyterServer) -> None:
    """It is the cell's own until somebody opens it; then the server lists it."""
    source = await server.start_kernel("warmcell")
    async with server.channels(source) as channels:
        await channels.execute("import warmcell; x = 5; clones = warmcell.fork(1)")
    boxes = (await server.http.get(f"{API}/sandboxes")).json()["sandboxes"]
    (clone,) = (box for box in boxes if box["kernel_id"] != source)
    assert await kernels(server) == {source}
    opened = await server.http.post(f"{API}/sandboxes/{clone['id']}/open", json={})
    assert opened.status_code == 200, opened.text
    assert await kernels(server) == {source, clone["kernel_id"]}
    async with server.channels(clone["kernel_id"]) as channels:
        await channels.execute("assert x == 5")
    for kernel_id in (clone["kernel_id"], source):
        await server.delete_kernel(kernel_id)


async def test_a_page_names_takes_out_and_is_refused_to_bring_in(server: JupyterServer) -> None:
    """PATCH gives a name; an export comes as a file to be saved; an import that is not allowed says how it would be."""
    kernel_id = await server.start_kernel("warmcell")
    box = (await server.sandbox(kernel_id))["id"]
    made = (await server.http.post(f"{API}/sandboxes/{box}/snapshot", json={"name": "first"})).json()
    renamed = await server.http.patch(f"{API}/snapshots/{made['id']}", json={"name": "best"})
    assert (renamed.status_code, renamed.json()["name"]) == (200, "best")
    verified = await server.http.post(f"{API}/snapshots/best/verify?kernel_id={kernel_id}", json={})
    assert (verified.status_code, verified.json()["id"]) == (200, made["id"]), verified.text
    archive = await server.http.get(f"{API}/snapshots/best/export?kernel_id={kernel_id}&files_only=1")
    assert archive.status_code == 200, archive.text
    assert "best.warmcell" in archive.headers["Content-Disposition"]
    refused = await server.http.post(f"{API}/snapshots/import", content=archive.content)
    assert (refused.status_code, refused.json()["code"]) == (501, "unsupported"), refused.text
    assert "c.Warmcell.import_snapshots" in refused.json()["hint"]
    await server.delete_kernel(kernel_id)


async def test_a_page_brings_in_what_it_took_out(places: Places) -> None:
    """Where the operator allows it, an export's bytes become a snapshot again."""
    async with JupyterServer(places, settings={"prepared": 0, "import_snapshots": True}) as server:
        kernel_id = await server.start_kernel("warmcell")
        box = (await server.sandbox(kernel_id))["id"]
        made = (await server.http.post(f"{API}/sandboxes/{box}/snapshot", json={"name": "first"})).json()
        archive = await server.http.get(f"{API}/snapshots/{made['id']}/export")
        assert len(archive.content) > made["memory_bytes"] // 10
        brought = await server.http.post(f"{API}/snapshots/import?name=again", content=archive.content)
        assert (brought.status_code, brought.json()["engine"]) == (201, "criu"), brought.text
        broken = await server.http.post(f"{API}/snapshots/import", content=archive.content[:1000])
        assert broken.json()["code"] == "snapshot_corrupt", broken.text
        listed = (await server.http.get(f"{API}/snapshots")).json()["snapshots"]
        assert {one["name"] for one in listed} == {"first", "again"}
        await server.delete_kernel(kernel_id)
