"""Where an environment is made: a sandbox that may write to it, and whose commands are a build's steps."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.images.base import Output
from warmcell.sandbox.models import SandboxSpec

GUEST_TIMEOUT_S = 15.0
_AS_USUAL = 'umask 022; exec "$@"'
"""Whoever uses the environment may be another user than whoever makes it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """A sandbox at work."""

    channel: GuestChannel
    output: Output
    may_change: bool
    """Whether its folder can be written to, if it has one."""

    async def run(self, step: str, argv: Sequence[str], *, env: Mapping[str, str]) -> None:
        """Run a command, its output told.

        Raises:
            ImageBuildError: It ended with another exit code than 0.
            CapacityError: So it did for want of space.
        """
        async with self.channel.exec_stream(["/bin/sh", "-c", _AS_USUAL, "sh", *argv], env=env) as process:
            await process.close_stdin()
            async for _, content in process.output():
                began = time.perf_counter()
                self.output.feed(content)
                # What is there already is had without a wait: a flood of it would leave nobody else a turn.
                await asyncio.sleep(time.perf_counter() - began)
        self.output.end()
        if process.exit_code != 0:
            raise self.output.error(step, f"exit code {process.exit_code}", exit_code=process.exit_code)


@contextlib.asynccontextmanager
async def bench(
    backend: SandboxBackend, spec: SandboxSpec, *, sandboxes: Path, output: Output
) -> AsyncGenerator[Bench]:
    """A sandbox for a build; nothing of it is left afterwards.

    Raises:
        WarmcellError: As `SandboxBackend.create`.
    """
    sandbox_id = new_sandbox_id()
    directory = sandboxes / sandbox_id
    directory.mkdir(mode=0o700)
    try:
        instance = await backend.create(spec, sandbox_id=sandbox_id, directory=directory)
        try:
            channel = await GuestChannel.open(instance.run_directory, timeout=GUEST_TIMEOUT_S)
            try:
                yield Bench(channel, output, not instance.workspace_note)
            finally:
                await channel.close()
        finally:
            await instance.stop()
    finally:
        directory.rmdir()
