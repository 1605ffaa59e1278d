"""Kernels in several sandboxes that are forks of one template's process, with a client each.

Run as a program it is a keeper of two such kernels in the directory that it is given. It prints the host pids of all
that lives below it, and waits to be killed.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.integration.process.guest import CHANNELS, Kernel, connected
from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.bubblewrap.nest import Nest
from warmcell.sandbox.backends.processes import descendants
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.channel import KernelStarted
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxSpec, Workspace
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService

PRELOAD = ("wave", "no_such_module")


@dataclass
class Shared:
    """A service without snapshots, and what is started with it."""

    service: SandboxService
    spec: SandboxSpec
    stack: contextlib.AsyncExitStack

    async def sandbox(self) -> LiveSandbox:
        """A new one, its template imported."""
        info = await self.service.create(self.spec, owner="test")
        box = self.service.live(info.id)
        await box.prepare()
        await box.wait_template()
        return box

    async def kernel(self, box: LiveSandbox, *, env: Mapping[str, str] | None = None) -> Kernel:
        """Its next kernel."""
        started = await self.service.start_kernel(SandboxId(box.info.id), env=env or {}, cwd="")
        self.service._starts.end(box.info.id)
        ports = {f"{name}_port": number for number, name in enumerate(CHANNELS, 1)}
        link = Path(self.stack.enter_context(_short_link(box.run_directory)))
        client = await connected(
            {
                "transport": "ipc",
                "ip": str(link / started.socket_prefix.name),
                "signature_scheme": "hmac-sha256",
                **ports,
            }
        )
        self.stack.callback(client.stop_channels)
        told = KernelStarted(pid=started.pid, started_from=started.started_from, sockets=started.socket_prefix.name)
        return Kernel(started=told, client=client)

    def template_pid(self, box: LiveSandbox) -> int:
        """Host pid of the process that its kernels are forks of."""
        assert box.shared is not None
        (pid,) = box.shared.pids
        return pid

    def nest(self, box: LiveSandbox) -> Nest:
        """Where it is made."""
        assert box.shared is not None
        nest = box.shared.nest
        assert isinstance(nest, Nest)
        return nest


@contextlib.contextmanager
def _short_link(target: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="wc-") as directory:
        link = f"{directory}/r"
        os.symlink(target, link)
        yield link


@contextlib.asynccontextmanager
async def shared_kernels(places: Places, *, preload: tuple[str, ...] = PRELOAD) -> AsyncIterator[Shared]:
    """A service whose templates have processes of their own; at the end all of it is gone."""
    paths = Paths(runtime=places.runtime, state=places.state, leases=places.leases).make()
    folder = places.root / "work"
    folder.mkdir()
    service = SandboxService(
        backends={"bubblewrap": BubblewrapBackend(paths=paths)},
        default_backend="bubblewrap",
        gpus=GpuPool(SimulatedInventory(()), LeaseDirectory(paths.leases)),
        paths=paths,
        bounds=Bounds(),
        prepared_per_template=0,
    )
    spec = SandboxSpec(python=sys.executable, workspace=Workspace(path=str(folder)), preload=preload)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(service.close)
        yield Shared(service, spec, stack)


async def hold(root: Path) -> None:
    """Hold two kernels until the end of the input."""
    places = Places(root)
    async with shared_kernels(places) as made:
        for _ in range(2):
            await made.kernel(await made.sandbox())
        sys.stdout.write(json.dumps(descendants(os.getpid())) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(hold(Path(sys.argv[1])))
