"""gVisor sandboxes of a test's own, with kernels to speak with."""

import contextlib
import json
import secrets
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.process.guest import CHANNELS, Kernel, connected
from tests.leaks import Places
from warmcell.sandbox.backends.gvisor import GvisorBackend, GvisorInstance
from warmcell.sandbox.backends.nursery import Nursery
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.models import MIB, Limits, SandboxId, SandboxSpec, SnapshotId, Workspace
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.base import Dumped, Then
from warmcell.sandbox.snapshots.gvisor import GvisorEngine

LIMITS = Limits(layer_bytes=64 * MIB, shm_bytes=16 * MIB, memory_bytes=1024 * MIB)
PORTS = {f"{name}_port": number for number, name in enumerate(CHANNELS, 1)}


@dataclass
class Box:
    """A sandbox that is up."""

    instance: GvisorInstance
    directory: Path
    channel: GuestChannel

    async def start_kernel(self, engine: str = "cold") -> Kernel:
        """A kernel in it, with a client."""
        run = self.instance.run_directory
        content = {"transport": "ipc", "ip": f"{self.instance.guest_run_directory}/k1", "key": "", **PORTS}
        (run / "k1.json").write_text(json.dumps({**content, "signature_scheme": "hmac-sha256"}))
        (run / "k1.json").chmod(0o644)
        file = f"{self.instance.guest_run_directory}/k1.json"
        started = await self.channel.start_kernel(file, env={}, engine=engine)  # type: ignore[arg-type]
        return Kernel(started, await self._client(started.sockets))

    async def kernel_again(self, kernel: Kernel) -> Kernel:
        """The same, spoken with by a new client."""
        return Kernel(kernel.started, await self._client(kernel.started.sockets))

    async def _client(self, sockets: str) -> Any:
        path = self.directory / "run" / sockets
        return await connected({"transport": "ipc", "ip": str(path), "key": "", **PORTS})


class Boxes:
    """Makes, saves and restores them; whatever is still there at the end is stopped."""

    def __init__(self, places: Places) -> None:
        self.paths = paths = Paths(runtime=places.runtime, state=places.state, leases=places.leases).make()
        nursery = Nursery()
        self.backend = GvisorBackend(paths=paths, nursery=nursery)
        self.engine = GvisorEngine(paths=paths, backend=self.backend)
        self._root = paths.sandboxes
        self._stack = contextlib.AsyncExitStack()
        self._stack.push_async_callback(nursery.close)

    def spec(self, workspace: Path | None = None, **changes: Any) -> SandboxSpec:
        """What they are."""
        given = None if workspace is None else Workspace(path=str(workspace))
        return SandboxSpec(
            **{"python": sys.executable, "backend": "gvisor", "workspace": given, "limits": LIMITS, **changes}
        )

    async def make(self, spec: SandboxSpec | None = None, *, image: SnapshotId | None = None) -> Box:
        """A new one, or one that goes on from an image."""
        sandbox_id = SandboxId(secrets.token_hex(6))
        directory = self._root / sandbox_id
        directory.mkdir(mode=0o700)
        create = self.backend.create if image is None else self.engine.maker(self.backend, image).create
        try:
            instance = await create(spec or self.spec(), sandbox_id=sandbox_id, directory=directory)
        except BaseException:
            assert list(directory.iterdir()) == []
            directory.rmdir()
            raise
        self._stack.push_async_callback(self._end, instance, directory)
        return Box(instance, directory, await GuestChannel.open(instance.run_directory))

    async def save(self, box: Box, kernel: Kernel, *, then: Then = "go_on") -> SnapshotId:
        """Save one whose kernel has no client any more."""
        image, _ = await self.saved(box, kernel, then=then)
        return image

    async def saved(self, box: Box, kernel: Kernel, *, then: Then = "go_on") -> tuple[SnapshotId, Dumped]:
        """The same, and what is told of it."""
        kernel.client.stop_channels()
        image = SnapshotId(secrets.token_hex(6))
        dumped = await self.engine.dump(box.instance, pid=kernel.pid, image=image, then=then, while_frozen=_nothing)
        return image, dumped

    async def image(self) -> SnapshotId:
        """Of one that had nothing in it but its init, and is gone: for what a kernel would take seconds to be in."""
        box = await self.make()
        init = (await box.channel.hello()).pid
        image = SnapshotId(secrets.token_hex(6))
        await self.engine.dump(box.instance, pid=init, image=image, then="stop", while_frozen=_nothing)
        await box.instance.stop()
        return image

    async def close(self) -> None:
        """Stop all."""
        await self._stack.aclose()

    async def _end(self, instance: GvisorInstance, directory: Path) -> None:
        await instance.stop()
        assert list(directory.iterdir()) == []
        directory.rmdir()


async def _nothing() -> None:
    return


@contextlib.asynccontextmanager
async def boxes_of(places: Places) -> AsyncIterator[Boxes]:
    """For one test."""
    boxes = Boxes(places)
    try:
        yield boxes
    finally:
        await boxes.close()
