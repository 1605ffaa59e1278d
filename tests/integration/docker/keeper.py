"""Brings up one sandbox, prints the pid of its first process, and waits to be killed: `python -m … HOST`."""

import asyncio
import sys

from tests.engines import IMAGE
from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths, private_directory


async def main() -> None:
    """Never ends by itself."""
    paths = Paths.default().make()
    backend = DockerBackend(paths=paths, host=sys.argv[1], image=IMAGE)
    sandbox_id = new_sandbox_id()
    directory = private_directory(paths.sandboxes / sandbox_id)
    made = await backend.create(SandboxSpec(python=""), sandbox_id=sandbox_id, directory=directory)
    sys.stdout.write(f"{made.pid}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


asyncio.run(main())
