"""A page's websocket through a real Jupyter server, while the kernel behind the proxy is paused and suspended."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from benchmarks.server import listening
from tests.integration.proxy.conftest import TIMEOUT_S
from tests.integration.proxy.kernels import PRINTER, Kernel, process
from tests.leaks import Places

START_S = 60.0


class Page:
    """What a browser has open."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self.socket = socket
        self.heard: list[dict[str, Any]] = []
        self.session = uuid4().hex

    async def ask(self, kind: str, content: dict[str, Any], *, channel: str = "shell") -> str:
        """Send a request; its msg_id."""
        name = uuid4().hex
        header = {
            "msg_id": name,
            "msg_type": kind,
            "session": self.session,
            "username": "",
            "date": "",
            "version": "5.4",
        }
        await self.socket.write_message(
            json.dumps(
                {
                    "channel": channel,
                    "header": header,
                    "parent_header": {},
                    "metadata": {},
                    "content": content,
                    "buffers": [],
                }
            )
        )
        return name

    async def execute(self, code: str) -> str:
        """Send a cell."""
        return await self.ask("execute_request", {"code": code, "silent": False, "allow_stdin": False})

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read up to something."""
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                said = await self.socket.read_message()
                assert said is not None
                self.heard.append(json.loads(said))

    async def finished(self, name: str) -> None:
        """Read up to the reply to a request and the idle after it."""
        await self.until(lambda: {"idle", "reply"} <= {_end(each) for each in self.about(name)})

    def about(self, name: str) -> list[dict[str, Any]]:
        """What has this request as its parent."""
        return [each for each in self.heard if each["parent_header"].get("msg_id") == name]

    def text(self) -> str:
        """All that was printed."""
        return "".join(each["content"]["text"] for each in self.heard if each["msg_type"] == "stream")


def _end(message: dict[str, Any]) -> str:
    if message["msg_type"] == "status":
        return str(message["content"]["execution_state"])
    return "reply" if message["msg_type"].endswith("_reply") else ""


@pytest.fixture
async def kernel(rig: Any, places: Places) -> AsyncIterator[Kernel]:
    with process(places.root / "k"):
        made = Kernel(rig, places.root / "k")
        await made.begin()
        yield made


Open = Callable[[], contextlib.AbstractAsyncContextManager[Page]]


@pytest.fixture
async def page(kernel: Kernel, places: Places) -> AsyncIterator[Open]:
    """Opens pages of a server that knows the proxy's connection file."""
    files, token = places.root / "external", secrets.token_hex(8)
    files.mkdir()
    (files / "k.json").write_text(json.dumps({**kernel.proxy.connection.to_json(), "kernel_name": "python3"}))
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ServerApp.port=0"),
        *("--ServerApp.ip=127.0.0.1", "--ServerApp.allow_external_kernels=True", "--ServerApp.jpserver_extensions={}"),
        *(f"--ServerApp.external_connection_dir={files}", f"--ServerApp.root_dir={places.root}"),
        *("--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=0",),
        env={**os.environ, **places.env, "JUPYTER_TOKEN": token},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert server.stderr is not None
    try:
        async with asyncio.timeout(START_S):
            while not (found := re.search(rb"http://(127\.0\.0\.1:\d+)/", await server.stderr.readline())):
                assert server.returncode is None
            address = found[1].decode()
            await listening(f"http://{address}")
        reading = asyncio.create_task(server.stderr.read())
        async with httpx.AsyncClient(headers={"Authorization": f"token {token}"}) as http:
            (model,) = (await http.get(f"http://{address}/api/kernels")).json()

        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[Page]:
            socket = await websocket_connect(
                f"ws://{address}/api/kernels/{model['id']}/channels?token={token}&session_id={uuid4().hex}",
                connect_timeout=TIMEOUT_S,
            )
            try:
                yield Page(socket)
            finally:
                socket.close()
                while await socket.read_message() is not None:
                    pass

        yield opened
    finally:
        server.terminate()
        await server.wait()
    await reading


async def test_a_page_hears_everything_over_pauses(kernel: Kernel, page: Open) -> None:
    """What a thread prints arrives whole and in order; the page's socket stays open."""
    async with page() as seen:
        await seen.finished(await seen.execute(PRINTER))
        for number in range(10):
            await kernel.pause()
            await kernel.go_on(restored=bool(number % 2))
        await seen.finished(await seen.execute("stop.set(); thread.join()"))
        await seen.until(lambda: "end of" in seen.text())
        *numbers, end = seen.text().splitlines()
        assert numbers == [str(n) for n in range(int(end.split()[-1]))]


async def test_a_page_that_is_refreshed_wakes_nothing_and_its_next_cell_wakes_once(kernel: Kernel, page: Open) -> None:
    """The server's own handshake and a page's first questions are answered without the kernel."""
    async with page() as first:
        await first.finished(await first.execute("x = 5"))
        await kernel.pause()
        woken = asyncio.Queue[int]()
        await kernel.proxy.suspended(on_wake=lambda: woken.put_nowait(1))
        async with page() as second:
            for kind, content, channel in (
                ("kernel_info_request", {}, "shell"),
                ("comm_info_request", {"target_name": "jupyter.widget"}, "shell"),
                ("history_request", {"hist_access_type": "tail", "n": 1, "output": False, "raw": True}, "shell"),
                ("debug_request", {"type": "request", "seq": 1, "command": "debugInfo"}, "control"),
            ):
                await second.finished(await second.ask(kind, content, channel=channel))
            assert woken.empty()
            names = [await second.execute(f"print(x + {n})") for n in range(3)]
            await asyncio.wait_for(woken.get(), TIMEOUT_S)
            await kernel.go_on(restored=True)
            for name in names:
                await second.finished(name)
            assert second.text() == "5\n6\n7\n"
            assert woken.empty()
