"""A process that holds sandboxes, to be killed; run with a backend's name and how many.

With `started` they are bubblewrap's, and each is started anew instead of forked; with `standing` gVisor's, which wait
for an image.

Prints one JSON line, the host pids of all their processes or the error that a start gave. Then waits for the end of its
input.
"""

import asyncio
import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend, SandboxInstance
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.gvisor import GvisorBackend
from warmcell.sandbox.backends.nursery import Nursery
from warmcell.sandbox.backends.process import ProcessBackend
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import MIB, Limits, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.gvisor import GvisorEngine


async def still(instance: SandboxInstance) -> None:
    """Wait until the sandbox's kernel is stopped."""
    async with asyncio.timeout(60):
        while "T" not in map(state_of, instance.processes()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def state_of(pid: int) -> str:
    """As /proc tells it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def main(name: str, count: int) -> None:
    paths = Paths.default().make()
    makers: dict[str, Callable[[], SandboxBackend]] = {
        "bubblewrap": lambda: BubblewrapBackend(paths=paths, nursery=Nursery()),
        "gvisor": lambda: GvisorBackend(paths=paths, nursery=Nursery()),
        "standing": lambda: GvisorEngine(paths=paths, backend=GvisorBackend(paths=paths)).maker(ProcessBackend(), None),
        "process": ProcessBackend,
        "started": lambda: BubblewrapBackend(paths=paths),
    }
    backend = makers[name]()
    pids: list[int] = []
    for _ in range(count):
        sandbox_id = SandboxId(secrets.token_hex(6))
        directory = paths.sandboxes / sandbox_id
        directory.mkdir(mode=0o700)
        spec = SandboxSpec(
            python=sys.executable,
            network=backend.capabilities.networks[0],
            limits=Limits(memory_bytes=512 * MIB, layer_bytes=64 * MIB),
        )
        try:
            instance = await backend.create(spec, sandbox_id=sandbox_id, directory=directory)
        except WarmcellError as error:
            directory.rmdir()
            sys.stdout.write(json.dumps(error.to_json()) + "\n")
            return
        if instance.stands_by:
            await still(instance)
        else:
            channel = await GuestChannel.open(instance.run_directory)
            await channel.exec(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &"])
            await channel.close()
        pids += instance.processes()
    sys.stdout.write(json.dumps({"pids": pids}) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
