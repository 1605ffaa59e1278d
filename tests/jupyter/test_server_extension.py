"""The server extension in a real Jupyter server: REST, events, re-attached kernels, sandboxed_only."""

import asyncio
import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from benchmarks.server import JupyterServer
from tests.leaks import Places
from warmcell.extension.server.handlers import routes

pytestmark = pytest.mark.bubblewrap

API = "/warmcell/api/v1"
CONCRETE = {
    "(gpus|meters|templates|doctor)": "gpus",
    r"(?:sandboxes|openapi\.json)": "sandboxes",
    "/[a-z0-9]+/(?:commands|runs|contexts|files|ports|run|interrupt|connect|metrics)(?:/.*)?": "/abc/files",
    "(suspend|resume|snapshot|restore|park|wake|gpu)": "suspend",
    "([a-z0-9]+)": "abc",
    "([^/]+)": "abc",
}


@pytest.fixture
async def server(places: Places) -> AsyncIterator[JupyterServer]:
    async with JupyterServer(places, settings={"prepared": 0}) as running:
        yield running


def verbs() -> list[tuple[str, str]]:
    """Every verb of every route, with something in place of each group."""
    found = []
    for pattern, handler in routes():
        path = pattern
        for group, value in CONCRETE.items():
            path = path.replace(group, value)
        assert re.fullmatch(pattern, path), path
        found += [(verb.upper(), path) for verb in ("get", "post", "put", "patch", "delete") if verb in vars(handler)]
    return found


async def test_every_verb_wants_to_know_who_asks(server: JupyterServer) -> None:
    """Without a token nothing is answered; the list of verbs is taken from the routes themselves."""
    assert len(verbs()) >= 6
    async with httpx.AsyncClient(base_url=server.url) as stranger:
        for verb, path in verbs():
            answer = await stranger.request(verb, path, json={})
            assert answer.status_code == 403, (verb, path, answer.status_code)
            assert answer.json()["code"] == "unauthenticated", (verb, path, answer.text)


async def test_a_host_that_is_not_the_servers_is_refused_in_jupyters_words(server: JupyterServer) -> None:
    """No token is the cure of that, and who shows one is not asked for it."""
    answer = await server.http.get("/warmcell/api/v1/sandboxes", headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert "code" not in answer.json()


async def test_nouns_are_listed_and_the_unknown_is_a_typed_error(server: JupyterServer) -> None:
    """Lists are objects with the noun's name; an unknown id is 404 in the wire form."""
    for noun in ("gpus", "sandboxes", "templates"):
        assert (await server.http.get(f"{API}/{noun}")).json()[noun] == []
    answer = await server.http.get(f"{API}/sandboxes/nosuchid")
    assert answer.status_code == 404
    assert answer.json()["code"] == "sandbox_not_found"
    assert answer.json()["hint"]


async def test_what_was_used_is_told_to_the_page_and_to_prometheus(server: JupyterServer) -> None:
    """`/usage` with its words passed on, and the server's own `/metrics`, for those who may see that."""
    assert (await server.http.get(f"{API}/usage?by=owner&days=1")).json()["by"] == "owner"
    assert (await server.http.get(f"{API}/usage?by=x%26days")).status_code == 400
    lines = (await server.http.get("/metrics")).text.splitlines()
    assert "warmcell_keeper_up 1.0" in lines
    assert any(line.startswith("python_info{") for line in lines)
    async with httpx.AsyncClient(base_url=server.url) as stranger:
        assert (await stranger.get("/metrics")).status_code == 403


async def test_a_kernel_shows_as_a_sandbox_and_deleting_it_ends_the_kernel(server: JupyterServer) -> None:
    """DELETE /sandboxes/{id} takes the Jupyter kernel along; it is not restarted as if it had died."""
    kernel_id = await server.start_kernel("warmcell")
    info = await server.sandbox(kernel_id)
    assert (info["state"], info["isolated"], info["network"]) == ("running", True, "none")
    assert (await server.http.delete(f"{API}/sandboxes/{info['id']}")).status_code == 204
    assert (await server.http.get("/api/kernels")).json() == []
    assert (await server.http.get(f"{API}/sandboxes")).json()["sandboxes"] == []


async def test_events_begin_with_the_present_and_tell_changes(server: JupyterServer) -> None:
    """A page that listens sees a kernel come up and go."""
    async with server.http.stream("GET", f"{API}/events", timeout=60) as response:
        lines = response.aiter_lines()

        async def event() -> tuple[str, dict[str, object]]:
            name = ""
            async for line in lines:
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    return name, json.loads(line.removeprefix("data: "))
            raise AssertionError("the stream ended")

        name, data = await event()
        assert (name, data["sandboxes"]) == ("hello", [])
        kernel_id = await server.start_kernel("warmcell")
        seen: list[str] = []
        async with asyncio.timeout(60):
            while "running" not in seen:
                name, data = await event()
                assert data.get("kernel_id") in (kernel_id, None)
                seen += [str(data["state"])] if name == "sandbox" else []
        await server.delete_kernel(kernel_id)
        async with asyncio.timeout(60):
            while "stopped" not in seen:
                name, data = await event()
                seen += [str(data["state"])] if name == "sandbox" else []
    assert seen[0] == "creating"


async def test_settings_apply_with_the_next_restart(server: JupyterServer) -> None:
    """PUT settings, restart: the same kernel id with another memory cap, and its clients still connected."""
    kernel_id = await server.start_kernel("warmcell")
    async with server.channels(kernel_id) as channels:
        await channels.execute("x = 1")
        answer = await server.http.put(f"{API}/kernels/{kernel_id}/settings", json={"memory": "1GiB"})
        assert answer.status_code == 200, answer.text
        await server.restart_kernel(kernel_id)
        await channels.execute("assert 'x' not in globals()")
    info = await server.sandbox(kernel_id)
    assert info["limits"]["memory"]["value"] == 2**30
    await server.delete_kernel(kernel_id)


@pytest.mark.parametrize(
    ("kernel", "settings", "status", "says"),
    [
        ("warmcell", {"colour": "red"}, 400, "'colour' is no setting"),
        ("nobody", {"gpu": "A100"}, 404, "There is no kernel nobody"),
        ("python3", {"gpu": "A100"}, 400, "not one of Warmcell's"),
    ],
)
async def test_settings_that_cannot_be_are_refused_with_the_cure(
    server: JupyterServer, kernel: str, settings: dict[str, str], status: int, says: str
) -> None:
    """Unknown names, unknown kernels and other people's kernels each get one clear error."""
    kernel_id = kernel if kernel == "nobody" else await server.start_kernel(kernel)
    answer = await server.http.put(f"{API}/kernels/{kernel_id}/settings", json=settings)
    assert answer.status_code == status
    assert says in answer.json()["message"]
    assert answer.json()["hint"]
    if kernel != "nobody":
        await server.delete_kernel(kernel_id)


async def test_check_gives_the_error_that_a_start_would_give(server: JupyterServer) -> None:
    """An unknown GPU is refused before anything is made."""
    answer = await server.http.post(f"{API}/check", json={"spec": {"gpu": "H100"}})
    assert answer.status_code == 400
    assert answer.json()["code"] == "unknown_gpu_kind"
    assert (await server.http.post(f"{API}/check", json={"spec": {}})).status_code == 200


async def test_a_killed_server_loses_no_kernel(places: Places) -> None:
    """SIGKILL the server: the next one lists the kernel and its notebook's session, and runs its next cell."""
    async with JupyterServer(places, settings={"prepared": 0}) as first:
        (first.root / "work.ipynb").write_text(
            json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
        )
        body = {"path": "work.ipynb", "name": "work.ipynb", "type": "notebook", "kernel": {"name": "warmcell"}}
        session = (await first.http.post("/api/sessions", json=body)).json()
        kernel_id = session["kernel"]["id"]
        async with first.channels(kernel_id) as channels:
            await channels.execute("kept = 42")
        await first.kill()
        async with JupyterServer(places, settings={"prepared": 0}) as second:
            assert [kernel["id"] for kernel in (await second.http.get("/api/kernels")).json()] == [kernel_id]
            sessions = (await second.http.get("/api/sessions")).json()
            assert [(one["path"], one["kernel"]["id"]) for one in sessions] == [("work.ipynb", kernel_id)]
            async with second.channels(kernel_id) as channels:
                await channels.execute("assert kept == 42")
                await second.restart_kernel(kernel_id)
                await channels.execute("assert 'kept' not in globals()")
            await second.delete_kernel(kernel_id)


async def test_sandboxed_only_leaves_no_other_kernel_and_no_terminal(places: Places) -> None:
    """With c.Warmcell.sandboxed_only the plain kernel cannot be found or started, and terminals are gone."""
    async with JupyterServer(places, settings={"prepared": 0, "sandboxed_only": True}) as server:
        specs = (await server.http.get("/api/kernelspecs")).json()["kernelspecs"]
        assert set(specs) == {"warmcell"}
        refused = await server.http.post("/api/kernels", json={"name": "python3"})
        assert refused.status_code >= 400
        assert (await server.http.get("/api/kernels")).json() == []
        assert (await server.http.post("/api/terminals")).status_code == 404
        kernel_id = await server.start_kernel("warmcell")
        await server.delete_kernel(kernel_id)
