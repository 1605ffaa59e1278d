"""URLs of files and of web ports at `warmcell serve`: what they open, for whom, for how long, and what stays out."""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from tests.cutting import AsyncCutting, Cutting, count_through, count_through_in_loop
from tests.leaks import Places, own_places
from warmcell import AsyncSandbox, Sandbox
from warmcell.sandbox.client.transport import Where
from warmcell.sandbox.errors import UnauthenticatedError, UnsupportedOperationError

pytestmark = pytest.mark.bubblewrap

API = "/warmcell/api/v1"
PORT = 8000
DOMAIN = "boxes.test"
END_TIMEOUT_S = 120
STALLED_S = 4
APP = """
import asyncio, json
from tornado import web, websocket

class Echo(websocket.WebSocketHandler):
    def check_origin(self, origin):
        return origin == "http://localhost:8000"
    def open(self):
        self.write_message(json.dumps(dict(self.request.headers)))
    def on_message(self, message):
        self.write_message(message, binary=isinstance(message, bytes))

@web.stream_request_body
class Page(web.RequestHandler):
    async def prepare(self):
        self.request.connection.set_max_body_size(2**30)
        self.size = 0
    def data_received(self, chunk):
        self.size += len(chunk)
    def get(self):
        self.set_header("Set-Cookie", "theirs=1")
        self.set_header("Clear-Site-Data", '"cookies"')
        self.write({"headers": dict(self.request.headers), "uri": self.request.uri, "size": self.size})
    post = put = get

async def main():
    web.Application([
        ("/ws", Echo),
        ("/moved", web.RedirectHandler, {"url": "/there?x=1", "permanent": False}),
        (".*", Page),
    ]).listen(8000, "127.0.0.1")
    print("listening", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def home() -> Iterator[Places]:
    """Directories of one server and its keeper for all tests of this module."""
    with own_places() as made:
        config = made.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ["backend = 'bubblewrap'", "keeper_idle_s = 0.2", "prepared = 0", f"port_domain = {DOMAIN!r}"]
        lines.append(f"stalled_after = {STALLED_S}")
        (config / "jupyter_warmcell_config.py").write_text("\n".join(f"c.Warmcell.{line}" for line in lines))
        yield made


@pytest.fixture(scope="module")
def server(home: Places) -> Iterator[dict[str, str]]:
    """`warmcell serve`: its URL and its token."""
    argv = [str(Path(sys.executable).parent / "warmcell"), "serve", "--json", "--port", "0"]
    process = subprocess.Popen(
        argv, env={**os.environ, **home.env}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=END_TIMEOUT_S)


@pytest.fixture(scope="module")
def keeper(server: dict[str, str], home: Places) -> Iterator[httpx.Client]:
    """The keeper's own socket, as processes of the user have it."""
    headers = {"Authorization": f"token {server['token']}"}
    assert httpx.get(f"{server['url']}{API}/sandboxes", headers=headers, timeout=60).status_code == httpx.codes.OK
    transport = httpx.HTTPTransport(uds=str(home.runtime / "keeper.sock"))
    with httpx.Client(transport=transport, base_url=f"http://keeper{API}", timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def box(server: dict[str, str], keeper: httpx.Client) -> Iterator[Sandbox]:
    """A sandbox of ann's in which a web server listens."""
    token = keeper.post("/tokens", json={"principal": "ann"}).json()["token"]
    with Sandbox(url=server["url"], token=token, preload=[]) as made:
        made.files.write("app.py", APP)
        listening: list[str] = []
        shown = made.run(
            "import subprocess, sys\n"
            "app = subprocess.Popen([sys.executable, 'app.py'], stdout=subprocess.PIPE, text=True)\n"
            "print(app.stdout.readline())",
            on_stdout=listening.append,
        )
        assert "listening" in "".join(listening), shown
        yield made


Get = Callable[..., httpx.Response]


@pytest.fixture
def get(server: dict[str, str], box: Sandbox) -> Iterator[Get]:
    """A browser whose name server knows the domain."""
    with httpx.Client(base_url=server["url"], timeout=60) as http:

        def get(url: str, method: str = "GET", **how: object) -> httpx.Response:
            parts = urlsplit(url)
            http.cookies.clear()
            headers = {"Host": parts.netloc, **how.pop("headers", {})}  # type: ignore[dict-item]
            return http.request(method, url.removeprefix(f"http://{parts.netloc}"), headers=headers, **how)  # type: ignore[arg-type]

        yield get


def in_path(url: str, server: dict[str, str], box: Sandbox, port: int = PORT) -> str:
    """The same port below a path of the server, as it is where there is no domain."""
    return f"{server['url']}/warmcell/ports/{port}-{box.id}/{url.partition('ticket=')[2]}/"


def test_a_web_port_below_a_path_gets_no_credentials_and_sets_none(
    server: dict[str, str], box: Sandbox, get: Get
) -> None:
    """Whatever listens there sees path and query as if it were alone; its pages are sandboxed by the browser."""
    url = in_path(box.forward(PORT), server, box)
    secrets = {
        "Cookie": "_xsrf=2; username=3",
        "Authorization": f"token {server['token']}",
        "X-XSRFToken": "2",
        "Referer": f"{server['url']}/lab?token={server['token']}",
    }
    shown = get(f"{url}a%2Fb?x=1&_xsrf=2&token={server['token']}&token=its-own", headers=secrets)
    assert shown.status_code == httpx.codes.OK, shown.text
    seen = shown.json()
    assert seen["uri"] == "/a%2Fb?x=1&token=its-own"
    assert not set(secrets) & set(seen["headers"])
    assert server["token"] not in shown.text
    assert seen["headers"]["Host"] == "localhost:8000"
    assert (shown.headers.get("Set-Cookie"), shown.headers.get("Clear-Site-Data")) == (None, None)
    assert re.fullmatch("sandbox (?!.*allow-same-origin).*", shown.headers["Content-Security-Policy"])
    assert shown.headers["Access-Control-Allow-Origin"] == "*"
    big = os.urandom(2**20)
    assert get(url, "POST", content=big).json()["size"] == len(big)
    assert get(url, "PUT", content=iter([big, big])).json()["size"] == 2 * len(big)
    assert get(url, "HEAD").content == b""
    asked = {"Access-Control-Request-Method": "POST", "Origin": "null"}
    assert get(url, "OPTIONS", headers=asked).headers["Access-Control-Allow-Methods"] == "*"
    assert get(f"{url}moved").headers["Location"] == urlsplit(url).path + "there?x=1"
    assert get(url.rstrip("/")).headers["Location"] == urlsplit(url).path


def test_a_web_port_on_its_own_origin_takes_the_ticket_once(box: Sandbox, get: Get) -> None:
    """A cookie holds it then, for that host alone; other sandboxes' pages, though of the same site, may not."""
    url = box.forward(PORT)
    host = urlsplit(url).netloc
    assert re.fullmatch(rf"{PORT}-{box.id}\.{DOMAIN}:\d+", host)
    first = get(url)
    assert (first.status_code, first.headers["Location"]) == (302, "/")
    cookie, _, attributes = first.headers["Set-Cookie"].partition(";")
    assert {"HttpOnly", "SameSite=Lax"} < {one.strip() for one in attributes.split(";")}
    at = f"http://{host}/x"
    seen = get(at, headers={"Cookie": cookie})
    assert (seen.status_code, seen.json()["uri"]) == (200, "/x")
    assert "Cookie" not in seen.json()["headers"]
    assert "sandbox" not in seen.headers["Content-Security-Policy"]
    assert get(at).status_code == httpx.codes.UNAUTHORIZED
    for other in (
        {"Origin": f"http://9000-other.{DOMAIN}"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ):
        assert get(at, headers={"Cookie": cookie, **other}).status_code == httpx.codes.FORBIDDEN, other
    assert get(at, headers={"Cookie": cookie, "Origin": f"http://{host}"}).status_code == httpx.codes.OK
    elsewhere = f"http://{PORT + 1}-{box.id}.{DOMAIN}/"
    assert get(elsewhere, headers={"Cookie": cookie}).status_code == httpx.codes.FORBIDDEN


async def test_websockets_go_both_ways(server: dict[str, str], box: Sandbox) -> None:
    """Text and bytes, without the server's credentials; what listens there sees an origin of its own."""
    url = in_path(await asyncio.to_thread(box.forward, PORT), server, box).replace("http:", "ws:")
    headers = {"Cookie": "_xsrf=2", "Authorization": f"token {server['token']}", "Origin": "null"}
    talking = await websocket_connect(HTTPRequest(f"{url}ws", headers=headers))
    async with asyncio.timeout(END_TIMEOUT_S):
        seen = json.loads(str(await talking.read_message()))
        assert not {"Cookie", "Authorization"} & set(seen)
        assert seen["Origin"] == "http://localhost:8000"
        for said in ("text", b"\0" * 2**20):
            await talking.write_message(said, binary=isinstance(said, bytes))
            assert await talking.read_message() == said
        talking.close()
        assert await talking.read_message() is None
        with pytest.raises(HTTPClientError, match="401"):
            await websocket_connect(f"ws://{urlsplit(url).netloc}/warmcell/ports/{PORT}-{box.id}/e30.e30/ws")


def test_what_does_not_answer_is_said(server: dict[str, str], box: Sandbox, get: Get) -> None:
    """A port on which nothing listens, another than the ticket's, a sandbox that is none, and what speaks no HTTP."""
    url = in_path(box.forward(9), server, box, port=9)
    closed = get(url)
    assert (closed.status_code, closed.headers["Content-Type"]) == (502, "text/plain; charset=utf-8")
    assert "nothing listens on 9" in closed.text
    assert get(url.replace(f"/9-{box.id}", f"/{PORT}-{box.id}")).status_code == httpx.codes.FORBIDDEN
    assert get(url.replace(box.id, "nosuch")).status_code == httpx.codes.FORBIDDEN
    box.run(
        "import socket, threading\n"
        "rude = socket.create_server(('127.0.0.1', 8001))\n"
        "def answer():\n"
        "    for _ in range(2):\n"
        "        with rude.accept()[0] as one:\n"
        "            one.recv(100)\n"
        "            one.sendall(b'junk\\n\\n')\n"
        "threading.Thread(target=answer, daemon=True).start()"
    )
    assert get(in_path(box.forward(8001), server, box, port=8001)).status_code == httpx.codes.BAD_GATEWAY
    half = socket.create_connection((urlsplit(server["url"]).hostname or "", urlsplit(server["url"]).port or 0))
    with half:  # what is broken off disturbs nobody
        half.sendall(f"POST {urlsplit(url).path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx".encode())
    assert get(in_path(box.forward(PORT), server, box)).status_code == httpx.codes.OK


def test_urls_of_files_open_one_file_one_way(server: dict[str, str], box: Sandbox, get: Get) -> None:
    """To read, to write, or a folder as a tar; nothing else, and not the way round."""
    box.files.write("d/out ü.txt", b"result")
    reading = box.files.download_url("d/out ü.txt")
    shown = get(reading)
    assert (shown.content, shown.headers["Content-Type"]) == (b"result", "application/octet-stream")
    assert shown.headers["Content-Disposition"] == "attachment; filename*=UTF-8''out%20%C3%BC.txt"
    writing = box.files.upload_url("d/in.txt")
    assert get(writing, "PUT", content=b"input").status_code == httpx.codes.OK
    assert box.files.read("d/in.txt") == b"input"
    assert get(box.files.download_url("d", tree=True)).headers["Content-Type"] == "application/x-tar"
    for method, url in (
        ("PUT", reading),
        ("DELETE", reading),
        ("GET", writing),
        ("GET", reading.replace("out", "in")),
        ("GET", f"{reading}&path=d/in.txt"),
        ("PUT", f"{writing}&mode=511"),
        ("GET", reading.replace("/files?", "/files/stat?")),
        ("GET", reading.replace(f"/sandboxes/{box.id}/files", "/tokens")),
    ):
        assert get(url, method).status_code == httpx.codes.FORBIDDEN, (method, url)
    headers = {"Authorization": f"token {server['token']}"}
    assert get(reading[:-3] + "abc", headers=headers).status_code == httpx.codes.UNAUTHORIZED


def test_urls_end_with_the_token_that_they_were_made_with(
    server: dict[str, str], keeper: httpx.Client, box: Sandbox, get: Get
) -> None:
    """Those of another token of the same principal, which sees the same sandboxes, hold on."""
    made = keeper.post("/tokens", json={"principal": "ann"}).json()
    again = Sandbox.connect(box.id, url=server["url"], token=made["token"])
    again.files.write("kept.txt", b"x")
    urls = [again.files.download_url("kept.txt"), in_path(again.forward(PORT), server, box)]
    others = [box.files.download_url("kept.txt"), in_path(box.forward(PORT), server, box)]
    again.close()
    assert {get(url).status_code for url in urls + others} == {200}
    assert keeper.delete(f"/tokens/{made['id']}").status_code == httpx.codes.NO_CONTENT
    assert {get(url).status_code for url in urls} == {401}
    assert {get(url).status_code for url in others} == {200}


def sleepers(keeper: httpx.Client, box: Sandbox, count: int) -> None:
    """Return when so many commands sleep."""
    while (
        sum(one["argv"] == ["sleep", "600"] for one in keeper.get(f"/sandboxes/{box.id}/commands").json()["commands"])
        < count
    ):
        time.sleep(0.05)


async def test_what_is_open_ends_with_the_token_that_opened_it(
    server: dict[str, str], keeper: httpx.Client, box: Sandbox, home: Places
) -> None:
    """Within seconds, each kind in its own words: commands, code, events, watches, files, ports, and E2B's streams."""
    made = (await asyncio.to_thread(keeper.post, "/tokens", json={"principal": "ann"})).json()
    mine, api = {"Authorization": f"Bearer {made['token']}"}, f"{server['url']}{API}"
    one = f"{api}/sandboxes/{box.id}"
    async with AsyncExitStack() as stack:
        again = await AsyncSandbox.connect(box.id, url=server["url"], token=made["token"])
        stack.push_async_callback(again.close)
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=END_TIMEOUT_S))
        changes = await stack.enter_async_context(again.files.watch("."))
        port = in_path(await again.forward(PORT), server, box).replace("http:", "ws:")
        talking = await websocket_connect(HTTPRequest(f"{port}ws", headers={"Origin": "null"}))
        stack.callback(talking.close)
        assert await talking.read_message() is not None
        kernel = (await asyncio.to_thread(keeper.get, f"/sandboxes/{box.id}")).json()["kernel_id"]
        address = f"{server['url']}/warmcell/jupyter/api/kernels/{kernel}/channels".replace("http", "ws", 1)
        channels = await websocket_connect(HTTPRequest(address, headers=mine))
        stack.callback(channels.close)
        e2b = {"X-API-KEY": made["token"]}
        opens = (
            await http.post(f"{server['url']}/warmcell/e2b/sandboxes/{box.id}/connect", json={}, headers=e2b)
        ).json()
        data = {"E2b-Sandbox-Id": box.id, "X-Access-Token": opens["envdAccessToken"]}
        message = json.dumps({"process": {"cmd": "sleep", "args": ["600"]}}).encode()

        async def said(method: str, url: str, **how: Any) -> tuple[int, str]:
            async with http.stream(method, url, **how) as answer:
                began.release()
                return answer.status_code, "".join([piece async for piece in answer.aiter_text()])

        def stuck() -> bytes:
            head = (
                f"PUT {API}/sandboxes/{box.id}/files?path=never HTTP/1.1\r\nAuthorization: {mine['Authorization']}\r\n"
            )
            with socket.socket(socket.AF_UNIX) as sender:
                sender.connect(str(home.runtime / "keeper.sock"))
                sender.sendall(f"{head}Host: x\r\nContent-Length: 100000\r\n\r\nx".encode())
                asyncio.run_coroutine_threadsafe(released(), loop)
                return sender.recv(4096)

        async def released() -> None:
            began.release()

        loop = asyncio.get_running_loop()
        began = asyncio.Semaphore(0)
        streams = [
            asyncio.create_task(again.exec("sleep", "600")),
            asyncio.create_task(anext(aiter(changes))),
            asyncio.create_task(said("GET", f"{api}/events", headers=mine)),
            asyncio.create_task(
                said(
                    "POST",
                    f"{one}/runs?follow=1",
                    headers=mine,
                    json={"code": "import time; time.sleep(600)", "linger_s": 0},
                )
            ),
            asyncio.create_task(
                said(
                    "POST",
                    f"{server['url']}/warmcell/e2b/process.Process/Start",
                    headers={**data, "E2b-Sandbox-Port": "49983", "Content-Type": "application/connect+json"},
                    content=b"\0" + len(message).to_bytes(4, "big") + message,
                )
            ),
            asyncio.create_task(
                said(
                    "POST",
                    f"{server['url']}/warmcell/e2b/execute",
                    headers={**data, "E2b-Sandbox-Port": "49999"},
                    json={"code": "import time; time.sleep(600)"},
                )
            ),
            asyncio.create_task(said("GET", f"{api}/principals/self?wait=300", headers=mine)),
        ]
        async with asyncio.timeout(END_TIMEOUT_S):
            for _ in range(4):
                await began.acquire()
            await asyncio.to_thread(sleepers, keeper, box, 2)
            streams.append(asyncio.create_task(asyncio.to_thread(stuck)))
            await began.acquire()
            await asyncio.to_thread(keeper.delete, f"/tokens/{made['id']}")
            revoked = time.monotonic()
            ends = await asyncio.gather(*streams, return_exceptions=True)
            assert await talking.read_message() is None
            while await channels.read_message() is not None:
                pass
        assert time.monotonic() - revoked < 30
        command, watch, events, run, start, execute, wait, upload = ends
        assert isinstance(command, UnauthenticatedError), command
        assert isinstance(watch, UnauthenticatedError), watch
        for status, text in (events, run):  # type: ignore[misc]
            assert (status, "refused" in text, "unauthenticated" in text) == (200, True, True), text
        assert '"code":"unauthenticated"' in start[1], start  # type: ignore[index]
        assert [json.loads(line)["type"] for line in execute[1].splitlines()][-2:] == ["error", "end_of_execution"]  # type: ignore[index]
        assert b" 401 " in upload.split(b"\r\n")[0], upload  # type: ignore[union-attr]
        assert wait[0] == httpx.codes.UNAUTHORIZED, wait  # type: ignore[index]
        assert channels.close_code == 1008
    assert not await asyncio.to_thread(box.files.exists, "never")
    assert (await asyncio.to_thread(box.run, "1 + 1")).text == "2"


def test_who_sends_too_slowly_is_told_so_and_holds_nothing(
    server: dict[str, str], keeper: httpx.Client, box: Sandbox
) -> None:
    """A byte now and then, of a file and of a request in JSON: an answer in the middle, and nothing is written."""
    token = keeper.post("/tokens", json={"principal": "ann"}).json()["token"]
    at = urlsplit(server["url"])
    for head in (
        f"PUT {API}/sandboxes/{box.id}/files?path=slow HTTP/1.1\r\nAuthorization: Bearer {token}\r\n",
        f"POST /warmcell/e2b/v2/sandboxes HTTP/1.1\r\nX-API-KEY: {token}\r\n",
    ):
        with socket.create_connection((at.hostname or "", at.port or 0), timeout=0.25) as slow:
            slow.sendall(f"{head}Host: x\r\nContent-Length: 100000\r\n\r\n".encode())
            answer, deadline = b"", time.monotonic() + END_TIMEOUT_S
            while b"}" not in answer and time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    piece = slow.recv(4096)
                    answer += piece
                    if not piece:
                        break
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    slow.sendall(b"x")
        assert b" 504 " in answer.split(b"\r\n")[0], answer
        assert b'"timeout"' in answer, answer
    assert not box.files.exists("slow")


def test_nobody_makes_urls_of_anothers_sandbox(server: dict[str, str], keeper: httpx.Client, box: Sandbox) -> None:
    """As with all verbs it does not exist; a token that may only look makes none either."""
    for scopes, status in ((["read", "run"], 404), (["read"], 403)):
        name = "bob" if "run" in scopes else "ann"
        made = keeper.post("/tokens", json={"principal": name, "scopes": scopes}).json()
        headers = {"Authorization": f"Bearer {made['token']}"}
        for path, body in ((f"ports/{PORT}", {}), ("files/url", {"path": "x"})):
            answer = httpx.post(f"{server['url']}{API}/sandboxes/{box.id}/{path}", json=body, headers=headers)
            assert answer.status_code == status, (scopes, path)


def test_a_sandbox_without_a_server_has_no_urls() -> None:
    """It is said, with what to do, before the keeper is asked."""
    from warmcell.sandbox.client.transport import Where

    with pytest.raises(UnsupportedOperationError, match="warmcell serve"):
        Where().absolute("/x")


async def test_what_is_cut_off_is_done_once_through_a_server_too(server: dict[str, str], keeper: httpx.Client) -> None:
    """It passes the break on to the keeper; a hundred of them with each SDK, half before any answer, and each thing is
    done once.
    """
    made = await asyncio.to_thread(keeper.post, "/tokens", json={"principal": "ann"})
    token, url = made.json()["token"], server["url"]
    counting = await asyncio.to_thread(lambda: Sandbox(url=url, token=token, preload=[]))
    try:
        transport = Cutting(Where.find(url, token), 100)
        await asyncio.to_thread(count_through, transport, counting, 20)
        in_loop = AsyncCutting(Where.find(url, token), 100)
        await count_through_in_loop(in_loop, counting, 20)
        assert transport.cuts == in_loop.cuts == {"body": 50, "head": 50}
    finally:
        await asyncio.to_thread(counting.kill)
        await asyncio.to_thread(counting.close)
