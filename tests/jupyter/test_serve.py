"""`warmcell serve`, a headless server: sandboxes by URL and token, nothing else of the machine, and its own end."""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import JupyterServer
from tests.leaks import Places
from warmcell import AsyncSandbox
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import SandboxNotFoundError

pytestmark = pytest.mark.bubblewrap

API = "/warmcell/api/v1"
BOX = {"spec": {"preload": []}}
START_TIMEOUT_S = 120
BIG = bytes(range(256)) * 40 * 1024
END_TIMEOUT_S = 120


def configure(places: Places, *more: str) -> None:
    """The cheapest sandboxes."""
    directory = places.root / "jupyter" / "config"
    directory.mkdir(parents=True, exist_ok=True)
    lines = ("backend = 'bubblewrap'", "keeper_idle_s = 0.2", "prepared = 0", "e2b_internet = True")
    lines += ("egress_allowed = ['*']", "egress_principals = ['*']")
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(f"c.Warmcell.{line}" for line in (*lines, *more)))


@contextlib.asynccontextmanager
async def serving(places: Places, *options: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """The command as a process of its own, with what it said when it listened."""
    server = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "warmcell"),
        *("serve", "--json", "--port", "0", *options),
        env={**os.environ, **places.env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert server.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            yield server, json.loads(await server.stdout.readline())
    finally:
        if server.returncode is None:
            server.terminate()
        async with asyncio.timeout(END_TIMEOUT_S):
            await server.communicate()


async def token_of(name: str, **body: Any) -> dict[str, str]:
    """Headers with a new token of a principal's."""
    async with await KeeperClient.connect() as keeper:
        made = await keeper.post("/tokens", {"principal": name, **body})
    return {"Authorization": f"Bearer {made['token']}"}


async def test_sandboxes_are_served_by_url_and_token_and_nothing_else(places: Places) -> None:
    """Code runs, its output comes as it is printed; there are no files, kernels or pages, and strangers get nothing.

    The server ends by itself once nobody is connected and no sandbox runs, and not before.
    """
    configure(places)
    ann, bob = await token_of("ann"), await token_of("bob")
    async with serving(places, "--idle", "5") as (server, said):
        own = {"Authorization": f"Bearer {said['token']}"}
        async with httpx.AsyncClient(base_url=said["url"], timeout=60) as http:
            unknown = await http.get(f"{API}/sandboxes")
            assert (unknown.status_code, unknown.json()["code"]) == (403, "unauthenticated")
            assert "warmcell token create" in unknown.json()["hint"]
            for path in (
                "/api/contents",
                "/api/kernels",
                "/api/sessions",
                "/api/terminals",
                "/lab",
                "/tree",
                "/files/x",
            ):
                assert (await http.get(path, headers=own)).status_code == 404, path
            for path in ("/tokens", "/principals", "/kernels", "/images", "/sandboxes/x/../../tokens"):
                assert (await http.get(API + path, headers=own)).status_code == 404, path
            forged = {"Authorization": ann["Authorization"][:-1] + "~"}
            assert (await http.get(f"{API}/sandboxes", headers=forged)).status_code == 401
            named = {**bob, "Warmcell-Principal": "ann"}

            made = await http.post(f"{API}/sandboxes", json=BOX, headers=ann)
            assert made.status_code == 201, made.text
            box = f"{API}/sandboxes/{made.json()['id']}"
            assert [(await http.get(box, headers=one)).status_code for one in (own, ann, bob, named)] == [
                200,
                200,
                404,
                404,
            ]
            assert (await http.get(f"{API}/sandboxes", headers=named)).json()["sandboxes"] == []

            token = ann["Authorization"].removeprefix("Bearer ")
            async with AsyncSandbox(url=said["url"], token=token, preload=[]) as mine:
                told: list[str] = []
                shown = await mine.run("print('told', flush=True)\nx = 41\nx + 1", on_stdout=told.append)
                assert (shown.text, "".join(told)) == ("42", "told\n")
                await mine.files.write("big.bin", BIG)
                assert await mine.files.read("big.bin") == BIG
                assert (await mine.exec("sh", "-c", "wc -c < big.bin; exit 3")).exit_code == 3
                with pytest.raises(SandboxNotFoundError):
                    await AsyncSandbox.connect(mine.id, url=said["url"], token=bob["Authorization"].split()[1])

            code = "import sys\nprint('before', flush=True)\nassert sys.stdin is not None"
            async with http.stream("POST", f"{box}/runs?follow=1", json={"code": code}, headers=ann) as answer:
                assert answer.headers["Content-Type"] == "application/x-ndjson"
                lines = [json.loads(line) async for line in answer.aiter_lines()]
            assert (lines[1]["content"]["text"], lines[-1]["ended"]["status"]) == ("before\n", "ok")
            assert (await http.post(f"{box}/runs?follow=1", json={"code": "1"}, headers=bob)).status_code == 404

            e2b, key = f"/warmcell/e2b/sandboxes/{made.json()['id']}", {"X-API-KEY": token}
            assert (await http.put(f"{e2b}/network", json={}, headers=key)).status_code == 204
            assert (await http.get(e2b, headers=key)).json()["allowInternetAccess"], "as the operator has set"

        async with httpx.AsyncClient(base_url=said["url"], timeout=60) as http:  # it has waited for the sandbox
            assert server.returncode is None
            assert (await http.delete(box, headers=ann)).status_code == 204
        async with asyncio.timeout(END_TIMEOUT_S):
            assert await server.wait() == 0


@pytest.mark.parametrize("state", [pytest.param("suspended", marks=pytest.mark.criu), "frozen"])
async def test_it_ends_though_a_sandbox_sleeps(places: Places, state: str) -> None:
    """Suspended, or frozen in memory where nothing can be saved: it is there for who comes later."""
    configure(places, *(["snapshots = 'none'"] if state == "frozen" else []))
    async with await KeeperClient.connect() as keeper:
        box = f"/sandboxes/{(await keeper.post('/sandboxes', {**BOX, 'terms': {}}))['id']}"
        async with serving(places, "--idle", "0.3") as (server, said):
            async with httpx.AsyncClient(base_url=said["url"], timeout=60) as http:
                own = {"Authorization": f"token {said['token']}"}
                assert (await http.get(API + box, headers=own)).status_code == 200
            if state == "suspended":
                await keeper.post(f"{box}/suspend", {})
            else:
                await keeper.patch(box, {"timeout_s": 0.1})
            async with asyncio.timeout(END_TIMEOUT_S):
                assert await server.wait() == 0
        info = await keeper.get(box)
        assert (info["state"], info["terms"]["frozen"]) == {"frozen": ("running", True)}.get(state, (state, False))
        await keeper.delete(box)


async def test_a_server_without_any_token_is_not_served(places: Places) -> None:
    """What a configuration for another Jupyter takes away it says, instead of being open to whoever comes."""
    configure(places)
    (places.root / "jupyter" / "config" / "jupyter_config.py").write_text("c.IdentityProvider.token = ''")
    server = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).parent / "warmcell"), "serve", "--json", "--port", "0", "--idle", "0.1"),
        env={**os.environ, **places.env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(START_TIMEOUT_S):
        said, complaint = await server.communicate()
    assert (server.returncode, said) == (1, b"")
    assert b"c.IdentityProvider.token" in complaint


async def test_tokens_are_good_for_our_paths_of_a_whole_server_only(places: Places) -> None:
    """A Jupyter server with pages takes them for Warmcell's REST, and for nothing of its own."""
    settings = {"backend": "bubblewrap", "prepared": 0}
    async with JupyterServer(places, settings=settings) as server:
        ann = await token_of("ann")
        async with httpx.AsyncClient(base_url=server.url, timeout=60, headers=ann) as http:
            made = await http.post(f"{API}/sandboxes", json=BOX)
            assert made.status_code == 201, made.text
            assert (await http.get(f"{API}/sandboxes")).json()["sandboxes"][0]["principal"] == "ann"
            users = await server.http.get(f"{API}/sandboxes")
            assert [one["id"] for one in users.json()["sandboxes"]] == [made.json()["id"]]
            for path in ("/api/contents", "/api/kernels", "/api/sessions", "/api/kernelspecs", "/api/status", "/lab"):
                assert (await http.get(path, follow_redirects=False)).status_code in (302, 403), path
            assert (await http.post("/api/kernels", json={"name": "warmcell"})).status_code == 403
            assert (await http.put(f"{API}/kernels/x/settings", json={})).status_code == 404
            assert (await http.delete(f"{API}/sandboxes/{made.json()['id']}")).status_code == 204


@pytest.mark.parametrize("option", [["--port", "x"], ["--idle"]])
def test_a_line_that_cannot_be_understood_is_exit_code_2(option: list[str]) -> None:
    """Before anything listens."""
    from warmcell.extension.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["serve", *option])
    assert caught.value.code == 2


async def test_it_says_how_it_is_used(places: Places) -> None:
    """To people: its URL, as the SDK takes it, and where tokens come from; nothing of notebooks and browsers."""
    configure(places)
    server = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).parent / "warmcell"), "serve", "--port", "0"),
        env={**os.environ, **places.env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert server.stderr is not None
    said = ""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while "?token=" not in said:
                said += (await server.stderr.readline()).decode()
        found = re.search(r"serves sandboxes at (http://127\.0\.0\.1:\d+), to Sandbox", said)
        assert found is not None, said
        token = re.search(r"\?token=(\w+)", said)
        assert token is not None
        assert "warmcell token create" in said
        assert not re.search("notebook|browser", said)
        assert await AsyncSandbox.list(url=found[1], token=token[1]) == []
    finally:
        server.terminate()
        await server.communicate()
