"""What only containers have: limits that the guest can read, and a label that says whose they are."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from tests.engines import Dockerd
from tests.security.conftest import BACKENDS
from warmcell.sandbox.backends.docker.labels import SANDBOX, container_name, ours
from warmcell.sandbox.models import MIB, SandboxId
from warmcell.sandbox.testing.contract import Subject
from warmcell.sandbox.testing.contract.subject import SMALL

pytestmark = pytest.mark.parametrize("subject", [BACKENDS["docker"]], indirect=True)

CAPPED = dataclasses.replace(SMALL, memory_bytes=192 * MIB, pids=48, cpus=0.5)
READ = """
import json, os
def said(*paths):
    for path in paths:
        if os.path.exists(f"/sys/fs/cgroup/{path}"):
            return open(f"/sys/fs/cgroup/{path}").read().split()
    return None
print(json.dumps({
    "memory": said("memory/memory.limit_in_bytes", "memory.max"),
    "with swap": said("memory/memory.memsw.limit_in_bytes"),
    "swap": said("memory.swap.max"),
    "pids": said("pids/pids.max", "pids.max"),
    "cpu": said("cpu.max") or [*said("cpu/cpu.cfs_quota_us"), *said("cpu/cpu.cfs_period_us")],
}))
"""


async def test_its_control_group_has_the_limits_and_no_swap(subject: Subject) -> None:
    """As the kernel tells them to the guest itself, by either version of control groups."""
    async with subject.box(limits=CAPPED) as box:
        told: dict[str, Any] = json.loads((await box.run(subject.python, "-c", READ)).stdout)
        writes = await box.shell(
            "for file in /sys/fs/cgroup/*/pids.max /sys/fs/cgroup/pids.max; do echo 9 > $file; done"
        )
    assert told["memory"] == [str(192 * MIB)]
    assert told["with swap"] in (None, told["memory"])
    assert told["swap"] in (None, ["0"])
    assert told["pids"] == ["48"]
    quota, period = map(int, told["cpu"])
    assert quota / period == pytest.approx(0.5)
    assert writes.exit_code != 0


async def test_it_is_marked_as_ours_and_has_nothing_of_the_engines(subject: Subject, docker: Dockerd) -> None:
    """Its labels lead to its keeper; no socket, device or right is given to it beside what all containers have."""
    async with subject.box() as box:
        sandbox_id = SandboxId(box.directory.name)
        (found,) = json.loads(docker.docker("inspect", container_name(sandbox_id)))
        (listed,) = await asyncio.to_thread(docker.engine.labelled, f"{SANDBOX}={sandbox_id}")
    assert found["Config"]["Labels"].items() >= ours(sandbox_id).items()
    assert listed.name == container_name(sandbox_id)
    host = found["HostConfig"]
    assert (host["Privileged"], host["CapAdd"], host["CapDrop"]) == (False, None, ["ALL"])
    assert (host["PidMode"], host["IpcMode"], host["NetworkMode"], host["UTSMode"]) == ("", "private", "none", "")
    assert not host["Devices"]
    assert not host["DeviceRequests"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert not [mount for mount in found["Mounts"] if ".sock" in mount["Source"] or mount["RW"]]
