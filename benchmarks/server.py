"""A real Jupyter server in a process of its own, and what a browser would send it."""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import secrets
import select
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tests.leaks import Places
from warmcell.kernel_provisioner import kernelspecs

START_TIMEOUT_S = 120.0
CONNECT_AGAIN_S = 0.02
"""Between two tries to reach a server that has said where it will listen."""
END_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 180.0
WARM_TIMEOUT_S = 180.0
LOOK_AGAIN_S = 0.1
"""Between two looks at whether a sandbox is prepared; nothing is measured meanwhile."""

WARMCELL = "/warmcell/api/v1"

PLAIN, OURS = "python3", "warmcell"
"""The kernelspecs that are measured beside each other."""

OWN_FIRST = {"JUPYTER_PREFER_ENV_PATH": "0"}
"""Else Jupyter takes the kernelspec that is installed in the environment."""


class BenchmarkError(RuntimeError):
    """What was to be measured did not happen, so there is no number."""


@dataclass
class JupyterServer:
    """One server with directories of its own; its keeper, if one was started, is ended with it."""

    places: Places
    settings: Mapping[str, object] = field(default_factory=dict)
    """What `c.Warmcell` is set to for this server's keeper."""
    env: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    """Interpreter of its kernels, plain and sandboxed; empty: this environment's."""

    async def __aenter__(self) -> Self:
        """Start it and wait until it listens."""
        self.root = self.places.root / "notebooks"
        self.root.mkdir(exist_ok=True)
        self._configure()
        chosen = OWN_FIRST if self.python else {}
        if self.python:
            self._write_kernelspecs()
        token = secrets.token_hex(16)
        self._said: deque[str] = deque(maxlen=60)
        self._process = await asyncio.create_subprocess_exec(
            *self._argv(),
            env={**os.environ, **self.places.env, **chosen, **self.env, "JUPYTER_TOKEN": token},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.root,
            start_new_session=True,
        )
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(url))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self.url = await url
                await listening(self.url)
        except BaseException:
            await self._end()
            raise
        self._token = token
        self.http = httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"token {token}"}, timeout=ANSWER_TIMEOUT_S
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """End it, its kernels and its keeper."""
        await self.http.aclose()
        await self._end()

    @property
    def token(self) -> str:
        """What it knows its user by."""
        return self._token

    async def kill(self) -> None:
        """SIGKILL the server alone; its keeper and its kernels are not told."""
        self._process.kill()
        await self._process.wait()

    async def stop(self, *, timeout: float = END_TIMEOUT_S) -> None:
        """SIGTERM the server alone, and wait for its end; it does with its kernels what it always does."""
        self._process.terminate()
        async with asyncio.timeout(timeout):
            await self._process.wait()

    async def start_kernel(self, name: str) -> str:
        """`POST /api/kernels`: the id of a new kernel."""
        answer = await self.http.post("/api/kernels", json={"name": name})
        return str(self._checked(answer)["id"])

    async def restart_kernel(self, kernel_id: str) -> None:
        """`POST /api/kernels/{id}/restart`."""
        self._checked(await self.http.post(f"/api/kernels/{kernel_id}/restart"))

    async def delete_kernel(self, kernel_id: str) -> None:
        """`DELETE /api/kernels/{id}`."""
        (await self.http.delete(f"/api/kernels/{kernel_id}")).raise_for_status()

    @contextlib.asynccontextmanager
    async def channels(self, kernel_id: str, *, page: str = "") -> AsyncIterator["Channels"]:
        """The kernel's websocket, as a page has it open; one that connects again is the same `page`."""
        session = page or uuid4().hex
        url = f"{self.url.replace('http', 'ws', 1)}/api/kernels/{kernel_id}/channels?session_id={session}"
        connection = await websocket_connect(
            f"{url}&token={self._token}", connect_timeout=ANSWER_TIMEOUT_S, max_message_size=2**30
        )
        channels = Channels(connection)
        try:
            yield channels
        finally:
            connection.close()
            with contextlib.suppress(TimeoutError):  # a server that was killed says nothing more
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await channels.end()

    async def sandbox(self, kernel_id: str) -> dict[str, Any]:
        """What Warmcell tells of the sandbox of a kernel."""
        found: list[dict[str, Any]] = self._checked(await self.http.get(f"{WARMCELL}/sandboxes"))["sandboxes"]
        return next(info for info in found if info["kernel_id"] == kernel_id)

    async def warm(self, *, prepared: bool = True) -> None:
        """Wait until a sandbox is prepared, unless none ever is, and no template is being imported."""
        deadline = time.monotonic() + WARM_TIMEOUT_S
        while True:
            templates: list[dict[str, Any]] = self._checked(await self.http.get(f"{WARMCELL}/templates"))["templates"]
            settled = all(one["status"]["state"] in ("ready", "none") for one in templates)
            if settled and (not prepared or any(one["prepared"] for one in templates)):
                return
            if time.monotonic() > deadline:
                log = (self.places.state / "keeper.log").read_text()[-3000:]
                raise BenchmarkError(f"no sandbox was prepared within {WARM_TIMEOUT_S:.0f} s: {templates}\n{log}")
            await asyncio.sleep(LOOK_AGAIN_S)

    def _configure(self) -> None:
        directory = Path(self.places.env["JUPYTER_CONFIG_DIR"])
        directory.mkdir(parents=True, exist_ok=True)
        lines = [f"c.Warmcell.{name} = {value!r}" for name, value in {"keeper_idle_s": 1.0, **self.settings}.items()]
        (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines) + "\n")

    def _write_kernelspecs(self) -> None:
        """Those of the two names that are measured, both with the same interpreter."""
        kernels = Path(self.places.env["JUPYTER_DATA_DIR"]) / "kernels"
        plain = {
            "argv": [self.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": PLAIN,
            "language": "python",
        }
        for name, content in ((PLAIN, plain), (OURS, kernelspecs.spec(OURS, {"python": self.python}))):
            (kernels / name).mkdir(parents=True, exist_ok=True)
            (kernels / name / "kernel.json").write_text(json.dumps(content))

    def _argv(self) -> Sequence[str]:
        root = ["--allow-root"] if os.getuid() == 0 else []
        return [
            *(sys.executable, "-m", "jupyter_server", "--no-browser", *root),
            *("--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={self.root}"),
        ]

    def _checked(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.is_error:
            asked = f"{answer.request.method} {answer.request.url.path}"
            words = "\n".join(self._said) if answer.is_server_error else ""
            raise BenchmarkError(f"{asked}: {answer.status_code} {answer.text}\n{words}".rstrip())
        content: dict[str, Any] = answer.json()
        return content

    async def _read(self, url: asyncio.Future[str]) -> None:
        """Keep the server's last words; the first URL in them is where it listens."""
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            said = line.decode(errors="replace").rstrip()
            self._said.append(said)
            found = re.search(r"(http://127\.0\.0\.1:\d+)/", said)
            if found and not url.done():
                url.set_result(found[1])
        if not url.done():
            url.set_exception(BenchmarkError("the Jupyter server did not start:\n" + "\n".join(self._said)))

    async def _end(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(END_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._reader
        await asyncio.to_thread(end_keeper, self.places)


class Channels:
    """The messages of one kernel over a websocket."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self._connection = connection
        self._session = uuid4().hex
        self._asked = ""
        self._ended = False
        """The end of the connection was heard, which is told once."""
        self._states: deque[dict[str, Any]] = deque()
        """What the kernel has said of its state while it did what was asked last."""

    async def execute(self, code: str, *, expressions: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Run code, then expressions by name; its `execute_reply`'s content.

        Raises:
            BenchmarkError: The reply is an error, or none came.
        """
        asked = {"code": code, "silent": False, "store_history": False, "user_expressions": dict(expressions or {})}
        request = self._request("execute_request", asked)
        self._asked = request["header"]["msg_id"]
        self._states.clear()
        await self._connection.write_message(json.dumps(request))
        content = await self._answer("execute_reply")
        if content["status"] != "ok":
            raise BenchmarkError(f"{code!r} gave {content.get('ename')}: {content.get('evalue')}")
        return content

    async def run(self, code: str) -> None:
        """Run code until its kernel says that it is idle again, which is after the reply; raises as `execute`."""
        await self.execute(code)
        while (await self._answer("status"))["execution_state"] != "idle":
            pass

    async def read(self) -> str | bytes | None:
        """The next message; None at the end of the connection."""
        said: str | bytes | None = await self._connection.read_message()
        self._ended = said is None
        return said

    async def end(self) -> None:
        """Wait until the connection has come to its end."""
        while not self._ended:
            await self.read()

    async def rest(self, earlier: "Channels") -> str:
        """What a cell still prints that this page has sent over an earlier connection; raises as `execute`."""
        printed = ""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while said := await self.read():
                message = json.loads(said)
                if message.get("parent_header", {}).get("msg_id") != earlier._asked:
                    continue
                printed += str(message["content"].get("text", ""))
                if message["msg_type"] == "execute_reply":
                    return printed
        raise BenchmarkError("the server closed the websocket before the reply")

    async def _answer(self, kind: str) -> dict[str, Any]:
        """The content of the next message of this kind that belongs to what was asked last."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while True:
                if kind == "status" and self._states:
                    return self._states.popleft()
                said = await self.read()
                if said is None:
                    raise BenchmarkError("the server closed the websocket before the reply")
                message = json.loads(said)
                content: dict[str, Any] = message["content"]
                if message.get("parent_header", {}).get("msg_id") != self._asked:
                    continue
                if message["msg_type"] == "status":
                    self._states.append(content)
                elif message["msg_type"] == kind:
                    return content

    def _request(self, kind: str, content: dict[str, object]) -> dict[str, Any]:
        header = {
            "msg_id": uuid4().hex,
            "msg_type": kind,
            "session": self._session,
            "username": "bench",
            "date": "",
            "version": "5.4",
        }
        return {
            "channel": "shell",
            "header": header,
            "parent_header": {},
            "metadata": {},
            "content": {"allow_stdin": False, "stop_on_error": False, **content},
            "buffers": [],
        }


async def listening(url: str) -> None:
    """Wait until someone listens there: Jupyter tells its URL before its loop runs, and listens in the loop."""
    where = urlsplit(url)
    while True:
        try:
            _, writer = await asyncio.open_connection(where.hostname, where.port)
        except ConnectionRefusedError:
            await asyncio.sleep(CONNECT_AGAIN_S)
        else:
            writer.close()
            return


def end_keeper(places: Places) -> None:
    """Have the keeper of these directories end, and wait for it."""
    try:
        with open(places.runtime / "keeper.lock", "rb") as lock:
            if _is_free(lock):
                return
            handle = os.pidfd_open(int(json.load(lock)["pid"]))
    except (FileNotFoundError, ProcessLookupError, ValueError):  # there is none, or it has just ended
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not select.select([handle], [], [], END_TIMEOUT_S)[0]:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def _is_free(lock: BinaryIO) -> bool:
    """Whether no keeper holds its lock; the pid in it is then an old one."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
