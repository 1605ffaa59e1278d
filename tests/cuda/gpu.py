"""Whether there is a GPU to test with, what is on it, and kernels of a real keeper that use it."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.integration.snapshots import notebooks
from tests.integration.snapshots.notebooks import Notebook
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.gpus.cuda_parking import FLOOR, version
from warmcell.sandbox.gpus.nvml import NvmlInventory
from warmcell.sandbox.models import GpuDevice

BACKEND = os.environ.get("WARMCELL_CUDA_BACKEND", "process")
"""`bubblewrap` where that works; the carried packages are then to be in the environment itself."""

CARRIED = ("LD_LIBRARY_PATH", *(("PYTHONPATH",) if BACKEND == "process" else ()))
"""What kernels need of this environment: some machines have the driver's libraries where only that variable names them."""


@cache
def absence() -> str:
    """Why the tests cannot run here; empty if they can."""
    if not Path("/dev/nvidiactl").exists():
        return "no NVIDIA driver: /dev/nvidiactl is missing"
    ask = "import json, torch; print(json.dumps([torch.cuda.is_available(), torch.cuda.device_count()]))"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=300)
    if told.returncode != 0:
        return f"torch cannot be used: {told.stderr.strip().splitlines()[-1:]}"
    if not json.loads(told.stdout)[0]:
        return "torch finds no GPU"
    found = asyncio.run(_first())
    if found is None or version(found.driver_version) < FLOOR:
        return f"the NVIDIA driver {found and found.driver_version} cannot park; 575.57.08 or newer can"
    return ""


async def _first() -> GpuDevice | None:
    inventory = NvmlInventory()
    try:
        devices = await inventory.devices()
        return devices[0] if devices else None
    finally:
        inventory.close()


@dataclass
class Machine:
    """A keeper with the machine's own GPUs."""

    client: KeeperClient
    inventory: NvmlInventory
    workspace: Path

    async def whole(self) -> list[GpuDevice]:
        """Its GPUs that are not divided."""
        found = [device for device in await self.inventory.devices() if not device.mig]
        return found or pytest.skip("all GPUs are divided (MIG)")

    async def on(self, device: GpuDevice) -> tuple[int, int]:
        """How many processes compute on a device, and how much of its memory is used."""
        await asyncio.sleep(1.1)  # The inventory's answers may be a second old.
        (now,) = (each for each in await self.inventory.devices() if each.uuid == device.uuid)
        return len(await self.inventory.processes(device)), now.memory_used_bytes or 0

    @contextlib.asynccontextmanager
    async def notebook(self, gpu: str | None) -> AsyncIterator[Notebook]:
        """A kernel with a lease, or without a GPU; at the end others can have the GPU."""
        environment = {name: os.environ[name] for name in CARRIED if name in os.environ}
        spec: dict[str, Any] = {"gpu": gpu, "network": "host", "env": environment}
        async with notebooks.notebook(self.client, self.workspace, **spec) as made:
            try:
                yield made
            finally:
                await self.client.delete(f"/kernels/{made.kernel_id}")


@contextlib.asynccontextmanager
async def machine(places: Places, workspace: Path, **traits: object) -> AsyncIterator[Machine]:
    """A keeper that parks nobody by itself, unless told to."""
    quiet: dict[str, object] = {"backend": BACKEND, "park_after": 0, "gpu_yield_after": 0, "park_memory": 0.8}
    inventory = NvmlInventory()
    try:
        async with notebooks.keeper(places, **{**quiet, **traits}) as client:
            yield Machine(client, inventory, workspace)
    finally:
        inventory.close()


async def parked(book: Notebook) -> dict[str, Any]:
    """Park it, now that its cell has ended."""
    await book.until_idle()
    return await book.do("park")
