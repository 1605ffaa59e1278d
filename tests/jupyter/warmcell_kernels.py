"""Kernelspecs and managers for tests: small sandboxes without a template, and what to ask of their kernels."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.ioloop.manager import AsyncIOLoopKernelManager
from jupyter_client.manager import AsyncKernelManager

from tests.lanes import TOP
from tests.leaks import Places
from warmcell.kernel_provisioner.provisioner import WarmcellProvisioner
from warmcell.sandbox.paths import Paths

TIMEOUT_S = 120.0
NAME = "bare"


def configure(places: Places, **settings: object) -> None:
    """A keeper that prepares nothing and ends soon after its last kernel."""
    directory = Path(places.env["JUPYTER_CONFIG_DIR"])
    directory.mkdir(parents=True, exist_ok=True)
    values = {"keeper_idle_s": 0.5, "prepared": 0, **settings}
    lines = [f"c.Warmcell.{name} = {value!r}" for name, value in values.items()]
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines) + "\n")


def kernelspec(places: Places, *, name: str = NAME, metadata: bool = True, **config: object) -> None:
    """Install a Warmcell kernelspec, by default without a template; without metadata for its argv alone."""
    content = json.loads((TOP / "kernel_provisioner" / "kernelspec" / "kernel.json").read_text())
    content["metadata"]["kernel_provisioner"]["config"] = {"preload": [], **config}
    if not metadata:
        content["metadata"] = {}
        content["argv"] += ["--config", json.dumps({"preload": [], **config})]
    directory = Path(places.env["JUPYTER_DATA_DIR"]) / "kernels" / name
    directory.mkdir(parents=True)
    (directory / "kernel.json").write_text(json.dumps(content))


def provisioner_of(manager: AsyncKernelManager) -> WarmcellProvisioner:
    """Ours, with its type."""
    assert isinstance(manager.provisioner, WarmcellProvisioner)
    return manager.provisioner


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what another process does, by asking; what the keeper has logged tells why it does not."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not await condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        log = Paths.default().keeper_log
        said = log.read_text()[-8000:] if log.exists() else "nothing"
        raise AssertionError(f"it did not happen within {TIMEOUT_S:.0f} s; the keeper has logged:\n{said}") from None


@contextlib.asynccontextmanager
async def started(
    *, name: str = NAME, watched: bool = False, made: Mapping[str, Any] | None = None, **launch: Any
) -> AsyncIterator[AsyncKernelManager]:
    """A kernel in a sandbox; `watched`: with a restarter, as in Jupyter's server."""
    kind = AsyncIOLoopKernelManager if watched else AsyncKernelManager
    manager = kind(kernel_name=name, **(made or {}))
    await manager.start_kernel(**launch)
    try:
        yield manager
    finally:
        await manager.shutdown_kernel(now=True)


@contextlib.asynccontextmanager
async def connected(manager: AsyncKernelManager) -> AsyncIterator[AsyncKernelClient]:
    """A client of it that is ready. Its session is its own: a manager's clients share ids with the manager."""
    client = manager.client()
    client.session.session = uuid4().hex
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=TIMEOUT_S)
        yield client
    finally:
        client.stop_channels()


async def said(client: AsyncKernelClient, code: str) -> str:
    """What a cell prints, and the name of its error if it has one."""
    heard: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        content = message["content"]
        heard.append(content["ename"] if message["msg_type"] == "error" else content.get("text", ""))

    await client.execute_interactive(code, output_hook=hear, timeout=TIMEOUT_S)
    return "".join(heard).strip()
