"""Sandboxes with a small program in each, which counts, and an engine that saves and restores them."""

import asyncio
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines import IMAGE, PYTHON, Dockerd
from tests.leaks import Places
from warmcell.sandbox.backends.base import SandboxBackend, SandboxInstance
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.models import MIB, Limits, SandboxId, SandboxSpec, SnapshotId, Workspace
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.base import Dumped
from warmcell.sandbox.snapshots.criu import CriuEngine

PROGRAM = """
import ctypes, os, signal, sys, time, zlib
signal.signal(signal.SIGTRAP, lambda *_: os._exit(133))
{before}
show = ctypes.CDLL(None).prctl
data = bytearray(os.urandom(1 << 20) * {mib})
first, count = zlib.crc32(data), 0
while True:
    count += 1
    {each}
    if count % 20 == 0:
        assert zlib.crc32(data) == first
    show(15, b"n%d" % count)
    time.sleep(0.01)
"""
"""Shows how far it is as its name, so it needs no file that would have to be there when it is restored, and
looks at its memory without a copy of it, which would be in an image or not by chance.

Like a kernel it has a handler for the trap that a killed criu may leave, which is never to run.
"""


@dataclass
class Box:
    """A sandbox, and what runs in it."""

    instance: SandboxInstance
    channel: GuestChannel
    python: str = sys.executable
    kernel: int = 0

    @property
    def pid(self) -> int:
        return self.instance.pid

    async def sh(self, script: str) -> str:
        """What a shell script says."""
        done = await self.channel.exec(["sh", "-c", script])
        return done.stdout.strip()

    async def start(self, *, before: str = "pass", each: str = "pass", mib: int = 4) -> int:
        """Start the program; its number."""
        program = PROGRAM.format(before=before, each=each, mib=mib)
        script = 'cd / && setsid "$0" -c "$1" </dev/null >/dev/null 2>&1 & echo $!'
        done = await self.channel.exec(["sh", "-c", script, self.python, program])
        self.kernel = int(done.stdout)
        await self.goes_on()
        return self.kernel

    async def count(self) -> int:
        """How far it has counted; 0 if it has not begun, or is dead."""
        said = await self.sh(f"cat /proc/{self.kernel}/comm 2>/dev/null")
        return int(said[1:]) if said[1:].isdigit() else 0

    async def goes_on(self, *, past: int = 0) -> int:
        """Wait until it has counted beyond `past`, and a bit more; how far."""
        deadline = time.monotonic() + 120
        while (count := await self.count()) <= past:
            assert time.monotonic() < deadline, f"it stands at {count}: {await self.sh('ps ax')}"
            await asyncio.sleep(0.02)
        return count

    async def numbers(self) -> list[int]:
        """Of all processes in it."""
        return sorted(int(word) for word in (await self.sh("cd /proc; echo [0-9]*")).split())


@dataclass
class Boxes:
    """Makes sandboxes of one test."""

    paths: Paths
    engine: CriuEngine
    stack: AsyncExitStack
    backend: SandboxBackend
    python: str = sys.executable
    image: str | None = None

    async def fresh(self, *, enrolled: bool = False, workspace: str | None = None, layer: Path | None = None) -> Box:
        """A sandbox in which nothing was started."""
        sandbox_id = SandboxId(secrets.token_hex(6))
        directory = self.paths.sandboxes / sandbox_id
        directory.mkdir(mode=0o700)
        self.stack.callback(shutil.rmtree, directory)
        spec = SandboxSpec(
            python=self.python,
            image=self.image,
            limits=Limits(memory_bytes=1024 * MIB, layer_bytes=64 * MIB),
            workspace=Workspace(path=workspace) if workspace else None,
        )
        instance = await self.backend.create(spec, sandbox_id=sandbox_id, directory=directory, layer=layer)
        self.stack.push_async_callback(instance.stop)
        channel = await GuestChannel.open(instance.run_directory)
        self.stack.push_async_callback(channel.close)
        box = Box(instance, channel, self.python)
        if enrolled:
            await self.engine.enroll(box)
        return box

    async def running(self, *, before: str = "pass", each: str = "pass", mib: int = 4, workspace: str = "") -> Box:
        """A sandbox in which the program counts."""
        box = await self.fresh(enrolled=True, workspace=workspace or None)
        await box.start(before=before, each=each, mib=mib)
        return box

    async def dump(self, box: Box, image: str, *, then: str = "go_on", frozen: "Frozen | None" = None) -> Dumped:
        """Save what runs in a sandbox."""
        return await self.engine.dump(
            box,
            pid=box.kernel,
            image=SnapshotId(image),
            then="stop" if then == "stop" else "go_on",
            while_frozen=frozen or nothing,
        )

    async def restored(self, image: str, *, workspace: str = "") -> Box:
        """A fresh sandbox in which an image was restored."""
        box = await self.fresh(workspace=workspace or None)
        box.kernel = (await self.engine.restore(box, image=SnapshotId(image))).pid
        return box


Frozen = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """No layer to save."""


ON_EACH = pytest.mark.parametrize(
    "boxes", ["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)], indirect=True
)
"""For tests of what is the same whatever a sandbox is made of."""


def engine_of(request: pytest.FixtureRequest) -> Dockerd | None:
    """The engine of containers whose sandboxes a test asks for in `ON_EACH`; None: they are bubblewrap's."""
    if getattr(request, "param", "bubblewrap") != "docker":
        return None
    made: Dockerd = request.getfixturevalue("docker")
    return made


@asynccontextmanager
async def boxes_of(places: Places, containers: Dockerd | None = None) -> AsyncIterator[Boxes]:
    """Sandboxes and an engine below the directories of a test; all ended when the block ends."""
    paths = Paths(runtime=places.runtime, state=places.state, leases=places.leases).make()
    engine = CriuEngine(paths=paths)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        if containers is None:
            yield Boxes(paths, engine, stack, BubblewrapBackend(paths=paths))
        else:
            backend = DockerBackend(paths=paths, host=containers.host, image=IMAGE)
            yield Boxes(paths, engine, stack, backend, python=PYTHON, image=IMAGE)
