"""Notebooks of a real keeper: a client that stays connected to a kernel and keeps everything that it hears."""

import asyncio
import contextlib
import os
import queue
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.integration.keeper.conftest import until
from tests.leaks import Places
from warmcell.kernel_provisioner.transport import socket_prefix
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
ANSWER_S = 120.0

LOOK_S = 0.2
"""A reply that came while something was sent wakes nobody who reads from the same socket (pyzmq)."""


def configure(places: Places, **traits: object) -> None:
    """Write the configuration of keepers to come."""
    directory = places.root / "jupyter" / "config"
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"keeper_idle_s": 0.2, "prepared": 0, **traits}
    lines = [f"c.Warmcell.{name} = {value!r}" for name, value in settings.items()]
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines))


@contextlib.asynccontextmanager
async def keeper(places: Places, **traits: object) -> AsyncIterator[KeeperClient]:
    """A keeper that ends with everything that it has, without saving it."""
    configure(places, **traits)
    async with await KeeperClient.connect() as client:
        try:
            yield client
        finally:
            with contextlib.suppress(TransportError):  # It was killed; its sandboxes have gone with it.
                await end_all(client)


async def end_all(client: KeeperClient) -> None:
    """Nothing is left that a keeper would wait for."""
    for kernel in (await client.get("/kernels"))["kernels"]:
        await client.delete(f"/kernels/{kernel['kernel_id']}")
    for sandbox in (await client.get("/sandboxes"))["sandboxes"]:
        await client.delete(f"/sandboxes/{sandbox['id']}")


async def gone(client: KeeperClient, *, signum: int) -> None:
    """End the keeper, and wait for it and all that it had."""
    pid = int((await client.get("/status"))["pid"])
    os.kill(pid, signum)

    async def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    await until(ended, timeout=60)


@contextlib.contextmanager
def own_disk(at: Path, *, options: str) -> Iterator[Path]:
    """A directory that is a file system of its own, in memory. Whoever uses it has ended when the block does."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "warmcell-test", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def connection(kernel_id: str) -> dict[str, Any]:
    """Where Jupyter would listen for a kernel of this id."""
    ports = {f"{name}_port": number for number, name in enumerate(CHANNELS, 1)}
    prefix = socket_prefix(kernel_id, Paths.default())
    return {"transport": "ipc", "ip": prefix, "key": "secret", "signature_scheme": "hmac-sha256", **ports}


@dataclass
class Page:
    """A client that is connected, and all that it has heard since."""

    client: AsyncKernelClient
    heard: list[dict[str, Any]] = field(default_factory=list)
    replies: dict[str, dict[str, Any]] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    def listen(self) -> None:
        """Keep what comes from now on."""
        self._tasks = [asyncio.create_task(each) for each in (self._iopub(), self._shell(), self._control())]

    async def close(self) -> None:
        """Hang up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.client.stop_channels()
        self.client.context.destroy(linger=0)

    async def ready(self) -> None:
        """Wait until output comes through to this client."""
        deadline = time.monotonic() + ANSWER_S
        while not self.heard:
            assert time.monotonic() < deadline, "the kernel does not answer"
            await self.ask("kernel_info")
            with contextlib.suppress(TimeoutError):
                await self.until(lambda: bool(self.heard), timeout=0.1)

    def send(self, code: str, **changes: Any) -> str:
        """Have a cell run; its msg_id. An error of it aborts no other, unless that is asked for."""
        msg_id: str = self.client.execute(code, **{"stop_on_error": False, **changes})
        return msg_id

    async def ask(self, what: str, *args: Any) -> dict[str, Any]:
        """The reply to a request that a page sends, by the name of the client's method."""
        return await self.reply(getattr(self.client, what)(*args))

    async def reply(self, msg_id: str, *, timeout: float = ANSWER_S) -> dict[str, Any]:
        """The content of the reply to a request."""
        await self.until(lambda: msg_id in self.replies, timeout=timeout)
        content: dict[str, Any] = self.replies[msg_id]["content"]
        return content

    async def done(self, msg_id: str, *, timeout: float = ANSWER_S) -> dict[str, Any]:
        """Wait until a cell is answered and idle; its reply."""
        reply = await self.reply(msg_id, timeout=timeout)
        await self.until(lambda: any(_is_idle(each) for each in self.of(msg_id)), timeout=timeout)
        return reply

    async def run(self, code: str, *, timeout: float = ANSWER_S) -> str:
        """Everything that a cell says, with its result and its error."""
        msg_id = self.send(code)
        await self.done(msg_id, timeout=timeout)
        return self.said(msg_id)

    async def until(self, what: Callable[[], bool], *, timeout: float = ANSWER_S) -> None:
        """Wait until what was heard makes `what` true."""
        async with asyncio.timeout(timeout):
            while not what():
                self._news.clear()
                waits = asyncio.create_task(self._news.wait())
                try:
                    await asyncio.wait({waits, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    waits.cancel()
                for each in self._tasks:
                    if each.done():
                        each.result()

    def of(self, msg_id: str) -> list[dict[str, Any]]:
        """What was published in answer to a request."""
        return [each for each in list(self.heard) if each["parent_header"].get("msg_id") == msg_id]

    def said(self, msg_id: str) -> str:
        """The text of what was published in answer to a request."""
        return "".join(_text(each) for each in self.of(msg_id)).strip()

    async def _iopub(self) -> None:
        while True:
            self.heard.append(await self.client.get_iopub_msg())
            self._news.set()

    async def _shell(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._replied(await self.client.get_shell_msg(timeout=LOOK_S))

    async def _control(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._replied(await self.client.get_control_msg(timeout=LOOK_S))

    def _replied(self, message: dict[str, Any]) -> None:
        self.replies[message["parent_header"]["msg_id"]] = message
        self._news.set()


@contextlib.asynccontextmanager
async def page(where: dict[str, Any]) -> AsyncIterator[Page]:
    """A client of the kernel that listens there."""
    client = AsyncKernelClient()
    connect: Any = {**where, "key": where["key"].encode()}
    client.load_connection_info(connect)
    client.start_channels(hb=False)
    made = Page(client)
    made.listen()
    try:
        yield made
    finally:
        await made.close()


@dataclass
class Notebook:
    """A kernel of a keeper, and a page on it that stays open."""

    keeper: KeeperClient
    body: dict[str, Any]
    sandbox_id: str
    page: Page

    @property
    def kernel_id(self) -> str:
        found: str = self.body["kernel_id"]
        return found

    async def run(self, code: str, *, timeout: float = ANSWER_S) -> str:
        """See `Page.run`."""
        return await self.page.run(code, timeout=timeout)

    async def info(self) -> dict[str, Any]:
        """What the keeper tells of its sandbox."""
        told: dict[str, Any] = await self.keeper.get(f"/sandboxes/{self.sandbox_id}")
        return told

    async def until_idle(self) -> None:
        """Wait until its keeper takes it for idle, which nobody is told."""
        async with asyncio.timeout(ANSWER_S):
            while (await self.keeper.get(f"/kernels/{self.kernel_id}"))["busy"]:  # noqa: ASYNC110 - nobody tells it
                await asyncio.sleep(0.02)

    async def do(self, verb: str, **body: Any) -> dict[str, Any]:
        """Something with its memory."""
        told: dict[str, Any] = await self.keeper.post(f"/sandboxes/{self.sandbox_id}/{verb}", body, timeout=120)
        return told


def body(workspace: Path, **spec: Any) -> dict[str, Any]:
    """A request for a kernel of a new id."""
    kernel_id = str(uuid.uuid4())
    where = {"python": sys.executable, "workspace": {"path": str(workspace)}, "preload": [], **spec}
    return {
        "kernel_id": kernel_id,
        "spec": where,
        "connection": connection(kernel_id),
        "cwd": str(workspace),
        "kernel_name": "warmcell",
        "persistent": True,
        "server": "test",
    }


@contextlib.asynccontextmanager
async def notebook(client: KeeperClient, workspace: Path, **spec: Any) -> AsyncIterator[Notebook]:
    """A kernel that has just started, with a page on it."""
    asked = body(workspace, **spec)
    info = await client.post("/kernels", asked, timeout=120)
    async with page(asked["connection"]) as made:
        await made.ready()
        yield Notebook(client, asked, info["id"], made)


@contextlib.asynccontextmanager
async def clones(source: Notebook, count: int) -> AsyncIterator[list[Notebook]]:
    """Forks of a notebook's kernel, each with a page on it."""
    told = (await source.do("fork", n=count))["sandboxes"]
    kernels = {one["sandbox_id"]: one for one in (await source.keeper.get("/kernels"))["kernels"]}
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for info in told:
            kernel = kernels[info["id"]]
            opened = await stack.enter_async_context(page(kernel["connection"]))
            await opened.ready()
            made.append(Notebook(source.keeper, kernel, info["id"], opened))
        yield made


def processes_of(places: Places) -> list[int]:
    """Processes of guests of this test: those in other mount namespaces than ours that see its directories."""
    ours, found = os.readlink("/proc/self/ns/mnt"), []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if not entry.isdigit() or os.readlink(f"/proc/{entry}/ns/mnt") == ours:
                continue
            if places.root.name in Path(f"/proc/{entry}/mountinfo").read_text():
                found.append(int(entry))
    return found


def _is_idle(message: dict[str, Any]) -> bool:
    return bool(message["msg_type"] == "status" and message["content"]["execution_state"] == "idle")


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    if message["msg_type"] == "stream":
        return str(content["text"])
    if message["msg_type"] == "execute_result":
        return str(content["data"]["text/plain"])
    return f"{content['ename']}: {content['evalue']}" if message["msg_type"] == "error" else ""
