"""The inventory and a lease on the machine's own NVIDIA GPUs, where there are some."""

import os
from pathlib import Path

import pytest

from tests.leaks import Places
from warmcell.sandbox.errors import NoGpuAvailableError, UnknownGpuKindError
from warmcell.sandbox.gpus.environment import environment
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.nvml import NvmlInventory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.models import SandboxId


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA driver: /dev/nvidiactl is missing")
async def test_the_machines_gpus_can_be_leased(places: Places) -> None:
    """Each device has a UUID and a node that is there; what is leased is named to CUDA and to nobody else."""
    inventory = NvmlInventory()
    devices = await inventory.devices()
    assert devices or inventory.problem
    assert all(os.path.exists(node) for device in devices for node in device.device_nodes)
    pool = GpuPool(inventory, LeaseDirectory(places.leases))
    free = [device for device in devices if not await inventory.processes(device)]
    if free:
        (leased,) = await pool.lease("any", holder=SandboxId("one"))
        assert leased.uuid in {device.uuid for device in free}
        assert environment((leased,))["CUDA_VISIBLE_DEVICES"] == leased.uuid
        with pytest.raises(NoGpuAvailableError):
            await pool.lease(f"any:{len(devices)}", holder=SandboxId("two"))
    pool.close()
    inventory.close()


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
async def test_a_machine_without_a_driver_has_none(places: Places) -> None:
    """No device, no problem, and a request for one says that there is no GPU."""
    inventory = NvmlInventory()
    assert await inventory.devices() == ()
    assert inventory.problem == ""
    pool = GpuPool(inventory, LeaseDirectory(places.leases))
    assert await pool.status() == []
    with pytest.raises(UnknownGpuKindError, match="This machine has no GPU"):
        await pool.lease("any", holder=SandboxId("one"))
