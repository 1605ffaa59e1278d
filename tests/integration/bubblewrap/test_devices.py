"""Nodes of leased devices, with another device in the place of a GPU."""

import os
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import subject_of
from tests.leaks import Places
from warmcell.sandbox.models import GpuDevice

pytestmark = pytest.mark.bubblewrap

STAND_INS = ("/dev/fuse", "/dev/net/tun", "/dev/vsock", "/dev/loop-control")


@pytest.fixture
def node() -> str:
    """A device that no sandbox has by itself."""
    found = next((path for path in STAND_INS if Path(path).is_char_device()), None)
    if found is None:
        pytest.skip(f"this machine has none of {', '.join(STAND_INS)}")
    return found


def device(node: str, **changes: object) -> GpuDevice:
    fields = {"uuid": "GPU-1", "index": 0, "name": "Stand-in", "memory_total_bytes": 1, "device_nodes": (node,)}
    return GpuDevice(**{**fields, **changes})  # type: ignore[arg-type]


async def test_a_leased_device_is_there_as_a_device(places: Places, node: str) -> None:
    """The very node of the host, not a file of that name."""
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[device(node)]
    )
    try:
        seen = Path(f"/proc/{instance.pid}/root{node}").stat()
        assert seen.st_rdev == os.stat(node).st_rdev
        mounts = Path(f"/proc/{instance.pid}/mountinfo").read_text().splitlines()
        (options,) = [line.split()[5].split(",") for line in mounts if line.split()[4] == node]
        assert "nodev" not in options
        assert "nosuid" in options
    finally:
        await instance.stop()
    subject.nothing_is_left(sandbox_id, directory)


async def test_what_is_not_leased_is_not_there(places: Places, node: str) -> None:
    """Nor is a simulated device, whose nodes would be none of its own."""
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    simulated = device(node, simulated=True)
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[simulated]
    )
    try:
        assert not Path(f"/proc/{instance.pid}/root{node}").exists()
    finally:
        await instance.stop()
    subject.nothing_is_left(sandbox_id, directory)
