"""A real kernel behind a proxy, with a client whose messages are all kept."""

import asyncio
import contextlib
import json
import queue
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.integration.proxy.conftest import TIMEOUT_S, Rig

PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
LOOK_AGAIN_S = 0.2
"""jupyter_client sends past asyncio, and what comes just then is not always announced."""
SERVER = Path(__file__).with_name("saved_kernel.py")


@contextlib.contextmanager
def process(prefix: Path) -> Any:
    """A kernel that can be paused."""
    file = prefix.with_suffix(".json")
    file.write_text(
        json.dumps({**PORTS, "transport": "ipc", "ip": str(prefix), "key": "", "signature_scheme": "hmac-sha256"})
    )
    nowhere = subprocess.DEVNULL
    made = subprocess.Popen([sys.executable, str(SERVER), str(file)], stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        yield made
    finally:
        made.kill()
        made.wait()


class Kernel:
    """A kernel behind a rig's proxy, with a client whose messages are all kept."""

    def __init__(self, rig: Rig, prefix: Path) -> None:
        self.rig, self.proxy, self.prefix = rig, rig.proxy, str(prefix)
        self.heard: list[dict[str, Any]] = []
        self.replies: list[dict[str, Any]] = []
        self.changed = asyncio.Condition()

    async def begin(self) -> None:
        """Connect proxy and client."""
        await self.proxy.connect_guest(self.prefix)
        await self.proxy.wait_ready(timeout=TIMEOUT_S)
        self.client = await self.rig.subscribed()

    async def listen(self) -> None:
        """Keep what comes."""

        async def take(get: Any, into: list[dict[str, Any]]) -> None:
            while True:
                try:
                    message = await get(timeout=LOOK_AGAIN_S)
                except queue.Empty:
                    continue
                async with self.changed:
                    into.append(message)
                    self.changed.notify_all()

        await asyncio.gather(
            take(self.client.get_iopub_msg, self.heard),
            take(self.client.get_shell_msg, self.replies),
            take(self.client.get_control_msg, self.replies),
        )

    async def until(self, condition: Any) -> None:
        """Wait for something among what came."""
        async with asyncio.timeout(TIMEOUT_S), self.changed:
            await self.changed.wait_for(condition)

    async def finished(self, *names: str) -> None:
        """Wait until these requests are answered and the kernel was idle after them."""

        def done() -> bool:
            answered = {each["parent_header"]["msg_id"] for each in self.replies}
            idle = {each["parent_header"]["msg_id"] for each in self.heard if state(each) == "idle"}
            return answered.issuperset(names) and idle.issuperset(names)

        await self.until(done)

    async def run(self, code: str) -> str:
        """What a cell prints."""
        name = self.client.execute(code)
        await self.finished(name)
        return self.text(name)

    def text(self, name: str | None = None) -> str:
        """What was printed, by one cell or at all."""
        return "".join(
            each["content"]["text"]
            for each in self.heard
            if each["msg_type"] == "stream" and name in (None, each["parent_header"].get("msg_id"))
        )

    def reply(self, name: str) -> dict[str, Any]:
        """The only reply to a request."""
        (found,) = (each for each in self.replies if each["parent_header"]["msg_id"] == name)
        content: dict[str, Any] = found["content"]
        return content

    async def pause(self, token: str = "t") -> tuple[str, ...]:
        """Leave the kernel."""
        return await self.proxy.pause(token=token, timeout=TIMEOUT_S)

    async def go_on(self, **wishes: Any) -> None:
        """Come back to it."""
        await self.proxy.go_on(self.prefix, **{"token": "t", "restored": False, "timeout": TIMEOUT_S, **wishes})

    def ask(self, kind: str, content: dict[str, Any] | None = None, *, channel: str = "shell") -> str:
        """Send any request; its msg_id."""
        message = self.client.session.msg(kind, content or {})
        getattr(self.client, f"{channel}_channel").send(message)
        return str(message["header"]["msg_id"])


def state(message: dict[str, Any]) -> str:
    """What a status says; empty for all else."""
    return str(message["content"].get("execution_state", "")) if message["msg_type"] == "status" else ""


PRINTER = """
import threading, time
stop = threading.Event()
def work():
    n = 0
    while not stop.is_set():
        print(n)
        n += 1
        time.sleep(0.0005)
    print("end of", n)
thread = threading.Thread(target=work)
thread.start()
"""


@contextlib.asynccontextmanager
async def behind(rig: Rig, prefix: Path) -> AsyncIterator[Kernel]:
    """A kernel behind this rig's proxy, listened to."""
    with process(prefix):
        made = Kernel(rig, prefix)
        await made.begin()
        listening = asyncio.create_task(made.listen())
        yield made
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
