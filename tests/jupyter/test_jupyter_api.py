"""`/warmcell/jupyter/api/kernels`: clients that speak Jupyter alone have kernels in sandboxes, each its own."""

import asyncio
import contextlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from benchmarks.server import JupyterServer
from tests.leaks import Places, own_places
from warmcell.extension.server.jupyter_api.forms import from_json, to_v1
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = pytest.mark.bubblewrap

BASE = "/warmcell/jupyter/api"
V1 = "v1.kernel.websocket.jupyter.org"
TIMEOUT_S = 120


@pytest.fixture
async def server(places: Places) -> AsyncIterator[dict[str, Any]]:
    """`warmcell serve`, with tokens of two principals."""
    directory = places.root / "jupyter" / "config"
    directory.mkdir(parents=True)
    lines = ("backend = 'bubblewrap'", "keeper_idle_s = 0.2", "prepared = 0")
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(f"c.Warmcell.{line}" for line in lines))
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "warmcell"),
        *("serve", "--json", "--port", "0"),
        env={**os.environ, **places.env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            said = json.loads(await process.stdout.readline())
        async with await KeeperClient.connect() as keeper:
            made = {name: await keeper.post("/tokens", {"principal": name}) for name in ("ann", "bob")}
        yield {**said, **{name: one["token"] for name, one in made.items()}}
        async with await KeeperClient.connect() as keeper:
            for info in (await keeper.get("/sandboxes"))["sandboxes"]:  # of a test that failed
                await keeper.delete(f"/sandboxes/{info['id']}")
    finally:
        process.terminate()
        async with asyncio.timeout(TIMEOUT_S):
            await process.communicate()


def request(code: str) -> dict[str, Any]:
    """An `execute_request`, as a client sends it."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "msg_type": "execute_request",
        "username": "",
        "session": "s",
        "version": "5.4",
    }
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": True}
    return {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}


def read(message: str | bytes | None) -> dict[str, Any]:
    """A message in either form."""
    assert message is not None
    if isinstance(message, str):
        told: dict[str, Any] = json.loads(message)
        return told
    header, parent, _, content = (json.loads(part) for part in deserialize_msg_from_ws_v1(message)[1][:4])
    return {"msg_type": header["msg_type"], "parent_header": parent, "content": content}


async def heard(channels: WebSocketClientConnection, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What is said about a request, up to its reply and the end of its output."""
    said: list[dict[str, Any]] = []
    idle = replied = False
    async with asyncio.timeout(TIMEOUT_S):
        while not (idle and replied):
            message = read(await channels.read_message())
            if message["parent_header"].get("msg_id") != asked["header"]["msg_id"]:
                continue
            said.append(message)
            replied = replied or message["msg_type"] == "execute_reply"
            idle = idle or message["content"].get("execution_state") == "idle"
            if message["msg_type"] == "input_request":
                answer = {**asked, "header": {**asked["header"], "msg_id": "i", "msg_type": "input_reply"}}
                await channels.write_message(json.dumps({**answer, "channel": "stdin", "content": {"value": "7"}}))
    return said


async def test_kernels_are_used_as_jupyter_has_them(server: dict[str, Any]) -> None:
    """Made, listed, used over a WebSocket, interrupted, restarted and ended, by a principal that sees no others'."""
    address = f"{server['url']}{BASE}".replace("http", "ws", 1)
    with contextlib.ExitStack() as opened:
        async with httpx.AsyncClient(base_url=server["url"] + BASE, timeout=TIMEOUT_S) as http:
            assert "version" in (await http.get("/")).json()
            ann, bob, user = ({"Authorization": f"token {server[name]}"} for name in ("ann", "bob", "token"))
            assert (await http.get("/kernelspecs", headers=ann)).json()["default"] == "warmcell"
            assert (await http.get("/kernels")).status_code == httpx.codes.FORBIDDEN
            assert (await http.get("/kernels?token=wct_x")).status_code == httpx.codes.UNAUTHORIZED
            assert (
                await http.post("/kernels", json={"name": "ir"}, headers=ann)
            ).status_code == httpx.codes.BAD_REQUEST
            made = await http.post("/kernels", json={"name": "python3", "env": {"SAID": "hello"}}, headers=ann)
            assert made.status_code == httpx.codes.CREATED, made.text
            kernel_id = made.json()["id"]
            assert made.headers["Location"] == f"{BASE}/kernels/{kernel_id}"
            one, url = f"/kernels/{kernel_id}", f"{address}/kernels/{kernel_id}/channels"
            assert [each["id"] for each in (await http.get("/kernels", headers=ann)).json()] == [kernel_id]
            for other in (bob, user):
                assert (await http.get("/kernels", headers=other)).json() == []
                for method, path in (
                    ("GET", one),
                    ("DELETE", one),
                    ("POST", f"{one}/interrupt"),
                    ("POST", f"{one}/restart"),
                ):
                    assert (await http.request(method, path, headers=other)).status_code == httpx.codes.NOT_FOUND
                with pytest.raises(HTTPClientError, match="404"):
                    await websocket_connect(HTTPRequest(url, headers=other))
            with pytest.raises(HTTPClientError, match="403"):
                await websocket_connect(url)

            channels = await websocket_connect(f"{url}?token={server['ann']}")
            opened.callback(channels.close)
            asked = request("import os\nx = int(input('x?'))\nprint(os.environ['SAID'], x)\nx * 6")
            await channels.write_message(json.dumps(asked))
            said = await heard(channels, asked)
            assert "hello 7\n" in [each["content"].get("text") for each in said]
            results = [each["content"]["data"] for each in said if each["msg_type"] == "execute_result"]
            assert results == [{"text/plain": "42"}]

            v1 = await websocket_connect(HTTPRequest(url, headers=ann), subprotocols=[V1])
            opened.callback(v1.close)
            assert v1.selected_subprotocol == V1
            again = request("x")
            await v1.write_message(to_v1(*from_json(json.dumps(again))), binary=True)
            assert "'text/plain': '7'" in str(await heard(v1, again))

            asked = request("import time\nwhile True: time.sleep(0.01)")
            await channels.write_message(json.dumps(asked))
            while True:
                message = json.loads(str(await channels.read_message()))
                if message["msg_type"] == "execute_input" and "while True" in message["content"]["code"]:
                    break
            model = (await http.get(one, headers=ann)).json()
            assert (model["execution_state"], model["connections"]) == ("busy", 2)
            assert (await http.post(f"{one}/interrupt", headers=ann)).status_code == httpx.codes.NO_CONTENT
            assert (await heard(channels, asked))[-1]["parent_header"]["msg_id"] == asked["header"]["msg_id"]

            assert (await http.post(f"{one}/restart", headers=ann)).json()["id"] == kernel_id
            asked = request("'x' in globals()")
            await channels.write_message(json.dumps(asked))
            assert "False" in str(await heard(channels, asked))
            await channels.write_message("junk")
            while await channels.read_message() is not None:
                pass
            assert channels.close_code == 1003
            assert (await http.delete(one, headers=ann)).status_code == httpx.codes.NO_CONTENT
            assert (await http.get("/kernels", headers=ann)).json() == []
            v1.close()  # Its socket is closed once the server has answered that.
            while await v1.read_message() is not None:
                pass


async def test_another_jupyter_server_has_it_for_its_gateway(server: dict[str, Any]) -> None:
    """Its notebooks run there, in a principal's sandboxes: sessions, cells, interrupt, restart, and the end."""
    gateway = {
        "JUPYTER_GATEWAY_URL": f"{server['url']}/warmcell/jupyter",
        "JUPYTER_GATEWAY_AUTH_TOKEN": server["ann"],
    }
    with own_places() as elsewhere:
        async with JupyterServer(elsewhere, env=gateway) as lab, contextlib.AsyncExitStack() as opened:
            assert set((await lab.http.get("/api/kernelspecs")).json()["kernelspecs"]) == {"warmcell"}
            wanted = {"kernel": {"name": "warmcell"}, "name": "n", "path": "n.ipynb", "type": "notebook"}
            session = (await lab.http.post("/api/sessions", json=wanted)).json()
            kernel = f"/api/kernels/{session['kernel']['id']}"
            channels = await websocket_connect(f"{lab.url.replace('http', 'ws', 1)}{kernel}/channels?token={lab.token}")
            opened.callback(channels.close)

            async def shown(code: str) -> str:
                asked = request(code)
                await channels.write_message(json.dumps(asked))
                return str(await heard(channels, asked))

            assert "42" in await shown("x = 41\nx + 1")
            assert "'/home/warmcell'" in (await shown("import os; os.getcwd()")).replace('"', "")
            assert (await lab.http.post(f"{kernel}/interrupt")).status_code == httpx.codes.NO_CONTENT
            assert (await lab.http.post(f"{kernel}/restart")).status_code == httpx.codes.OK
            assert "'text/plain': 'False'" in await shown("'x' in globals()")
            async with await KeeperClient.connect() as keeper:
                assert [one["principal"] for one in (await keeper.get("/sandboxes"))["sandboxes"]] == ["ann"]
                ended = await lab.http.delete(f"/api/sessions/{session['id']}")
                assert ended.status_code == httpx.codes.NO_CONTENT
                assert (await keeper.get("/sandboxes"))["sandboxes"] == []
