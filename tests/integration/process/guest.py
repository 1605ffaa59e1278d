"""A guest without a backend: our init as a plain process, spoken to through its run directory."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient

import warmcell.sandbox.guest
from warmcell.sandbox.channel import GuestChannel, KernelStarted

TREE = Path(warmcell.sandbox.guest.__file__).parent
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
SETTLED = ("ready", "failed")
TIMEOUT_S = 120.0


@dataclass
class Output:
    """What one cell came to."""

    status: str
    text: str = ""
    """Of stdout and stderr."""
    result: str = ""
    data: list[dict[str, Any]] = field(default_factory=list)
    """Of rich display."""
    error: str = ""


@dataclass
class Kernel:
    """A kernel of a guest, with a client."""

    started: KernelStarted
    client: AsyncKernelClient

    @property
    def pid(self) -> int:
        return self.started.pid

    async def run(self, code: str) -> Output:
        """Run one cell to its end."""
        client = self.client
        output = Output(status="")

        def on_output(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                output.text += content["text"]
            elif message["msg_type"] == "execute_result":
                output.result = content["data"].get("text/plain", "")
            elif message["msg_type"] == "display_data":
                output.data.append(content["data"])
            elif message["msg_type"] == "error":
                output.error = f"{content['ename']}: {content['evalue']}"

        async with asyncio.timeout(TIMEOUT_S):
            reply = await client.execute_interactive(
                code, output_hook=on_output, timeout=TIMEOUT_S, allow_stdin=False, stop_on_error=False
            )
        output.status = reply["content"]["status"]
        return output

    async def value(self, expression: str) -> Any:
        """The value of an expression, by way of JSON."""
        output = await self.run(f"import json as _json; print(_json.dumps({expression}))")
        assert output.status == "ok", output
        return json.loads(output.text)


class Guest:
    """A running init and what was asked of it."""

    def __init__(self, run: Path, process: asyncio.subprocess.Process, channel: GuestChannel) -> None:
        self.run = run
        self.process = process
        self.channel = channel
        self.events: list[Mapping[str, Any]] = []
        self._changed = asyncio.Condition()
        self._kernels: list[Kernel] = []
        self._count = 0

    async def watch(self) -> None:
        async for event in self.channel.events():
            async with self._changed:
                self.events.append(event)
                self._changed.notify_all()

    async def event(self, **wanted: Any) -> Mapping[str, Any]:
        """The first event, past or to come, with these fields."""
        return await self._event(0, lambda event: wanted.items() <= event.items())

    async def _event(self, start: int, fits: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            while True:
                for event in self.events[start:]:
                    if fits(event):
                        return event
                await self._changed.wait()

    async def prepared(self, *modules: str, env: Mapping[str, str] | None = None) -> Mapping[str, Any]:
        """Prepare a template and wait until it is ready, or failed without being tried again."""
        start = len(self.events)
        await self.channel.prepare(modules, name="test", env=env)
        while True:
            settled = await self._event(start, lambda e: e["event"] == "template" and e["state"] in SETTLED)
            if settled["state"] == "ready":
                return settled
            start = next(n for n, event in enumerate(self.events) if event is settled) + 1
            await self.channel.hello()  # What init has to say of it, it has said.
            try:
                async with asyncio.timeout(1.0):
                    await self._event(start, lambda e: e["event"] == "template")
            except TimeoutError:
                return settled

    def connection(self) -> tuple[str, dict[str, Any]]:
        """A new connection file: its path and its content."""
        self._count += 1
        ports = {f"{name}_port": n for n, name in enumerate(CHANNELS, 1)}
        content = {"transport": "ipc", "ip": f"{self.run}/k{self._count}", "key": "", **ports}
        path = self.run / f"k{self._count}.json"
        path.write_text(json.dumps({**content, "signature_scheme": "hmac-sha256"}))
        return str(path), content

    async def kernel(self, engine: str = "template", *, env: Mapping[str, str] | None = None, cwd: str = "") -> Kernel:
        """Start a kernel and connect to it."""
        path, content = self.connection()
        started = await self.channel.start_kernel(path, env=env or {}, cwd=cwd, engine=engine)  # type: ignore[arg-type]
        kernel = Kernel(started, await connected({**content, "ip": f"{self.run}/{started.sockets}"}))
        self._kernels.append(kernel)
        return kernel

    def close(self) -> None:
        for kernel in self._kernels:
            kernel.client.stop_channels()

    def children(self) -> Sequence[int]:
        """Pids of init's children."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]


class Client(AsyncKernelClient):
    """Its errors abort nothing: ipykernel answers `aborted` to what comes in the moment after one, by chance."""

    def execute(self, *args: Any, **changes: Any) -> Any:
        return super().execute(*args, **{"stop_on_error": False, **changes})


async def connected(content: Mapping[str, Any], *, key: str = "") -> AsyncKernelClient:
    """A client whose kernel has answered."""
    client = Client()
    client.load_connection_info({**content, "key": key.encode()})
    client.start_channels(hb=False)
    async with asyncio.timeout(TIMEOUT_S):
        await client.wait_for_ready(timeout=TIMEOUT_S)
    return client


@contextlib.asynccontextmanager
async def running_guest(
    root: Path,
    *,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    tree: Path = TREE,
    change: str = "",
) -> AsyncIterator[Guest]:
    """Start init in a run directory below `root`; at the end nothing of it may be left.

    Args:
        root: Where its directories are made.
        python: Its interpreter, and its kernels'.
        env: What is in its environment besides ours.
        tree: The guest's code.
        change: What it is to run first, as the package `warmcell_guest` is there.
    """
    run = root / "g"
    run.mkdir(mode=0o700)
    home = root / "h"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(home), **(env or {})}
    argv = [python, "-I", "-S", f"{tree}/init.py", "--run", str(run), "--guest", str(tree), "--python", python]
    if change:
        code = (
            "import sys; sys.modules['warmcell_guest'] = package = type(sys)('warmcell_guest'); "
            f"package.__path__ = [{str(tree)!r}]; from warmcell_guest.supervisor import server\n{change}\n"
            "sys.exit(server.main(sys.argv[1:]))"
        )
        argv[1:4] = ["-c", code]
    process = await asyncio.create_subprocess_exec(*argv, env=environment)
    guest = None
    watching = None
    try:
        guest = Guest(run, process, await GuestChannel.open(run))
        watching = asyncio.create_task(guest.watch())
        await guest.event(event="template")
        yield guest
    finally:
        if guest is not None:
            guest.close()
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(TIMEOUT_S):
            await process.wait()
        if watching is not None:
            await watching


def gone(pid: int, *, within: float = TIMEOUT_S) -> bool:
    """Whether that process ends within some seconds."""
    deadline = time.monotonic() + within
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        import select

        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(pidfd)
