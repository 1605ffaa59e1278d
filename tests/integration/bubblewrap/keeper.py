"""A process that holds sandboxes, to be killed; run with a backend's name and how many.

With `started` they are bubblewrap's, and each is started anew instead of forked.

Prints one JSON line, the host pids of all their processes or the error that a start gave. Then waits for the end of its
input.
"""

import asyncio
import json
import secrets
import sys
from collections.abc import Callable

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.gvisor import GvisorBackend
from warmcell.sandbox.backends.nursery import Nursery
from warmcell.sandbox.backends.process import ProcessBackend
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import MIB, Limits, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths


async def main(name: str, count: int) -> None:
    paths = Paths.default().make()
    makers: dict[str, Callable[[], SandboxBackend]] = {
        "bubblewrap": lambda: BubblewrapBackend(paths=paths, nursery=Nursery()),
        "gvisor": lambda: GvisorBackend(paths=paths, nursery=Nursery()),
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
        channel = await GuestChannel.open(instance.run_directory)
        await channel.exec(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &"])
        await channel.close()
        pids += instance.processes()
    sys.stdout.write(json.dumps({"pids": pids}) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
