"""A real keeper, started on demand as everyone starts it, with a configuration of the test's own."""

import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

Configure = Callable[..., None]
KernelBody = Callable[..., dict[str, Any]]


@pytest.fixture
def configure(places: Places) -> Configure:
    """Write `jupyter_warmcell_config.py`: `configure(backend="process", prepared=0)`."""

    def write(**traits: object) -> None:
        directory = places.root / "jupyter" / "config"
        directory.mkdir(parents=True, exist_ok=True)
        lines = [f"c.Warmcell.{name} = {value!r}" for name, value in traits.items()]
        (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines))

    write(backend="process", keeper_idle_s=0.2, prepared=0)
    return write


@pytest.fixture
async def keeper(configure: Configure) -> AsyncIterator[KeeperClient]:
    """A connection to the keeper of this test, which ends it by going away."""
    async with await KeeperClient.connect() as client:
        yield client
        for kernel in (await client.get("/kernels"))["kernels"]:
            await client.delete(f"/kernels/{kernel['kernel_id']}")
        for sandbox in (await client.get("/sandboxes"))["sandboxes"]:
            await client.delete(f"/sandboxes/{sandbox['id']}")


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """A plain sandbox with the test's folder as workspace and no template."""
    return {"python": sys.executable, "workspace": {"path": str(tmp_path)}, "preload": [], "network": "host"}


@pytest.fixture
def kernel_body(spec: dict[str, Any], places: Places) -> KernelBody:
    """The body of `POST /kernels`, with a fresh id and connection."""

    def body(**changes: Any) -> dict[str, Any]:
        kernel_id = str(uuid.uuid4())
        directory = Paths.default().kernels / kernel_id[:8]
        ports = {f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
        connection = {"transport": "ipc", "ip": str(directory / "k"), "key": "secret", **ports}
        connection["signature_scheme"] = "hmac-sha256"
        return {"kernel_id": kernel_id, "spec": spec, "connection": connection, "kernel_name": "warmcell", **changes}

    return body


async def until(what: Callable[[], Awaitable[bool]], *, timeout: float = 60.0) -> None:
    """Wait until `what` holds; for states that nobody announces, such as a process that is gone."""
    import asyncio

    deadline = time.monotonic() + timeout
    while not await what():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.02)


def kill(pid: int) -> None:
    """SIGKILL a process that this test has made."""
    os.kill(pid, signal.SIGKILL)
