"""A container that is up."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from warmcell.sandbox.backends import layers, likeness
from warmcell.sandbox.backends.base import ExitInfo, SandboxInstance
from warmcell.sandbox.backends.cgroups.group import counter
from warmcell.sandbox.backends.docker.engine import Container, Engine
from warmcell.sandbox.backends.layers import Parts
from warmcell.sandbox.backends.places import RUN
from warmcell.sandbox.backends.processes import descendants, is_bare
from warmcell.sandbox.backends.threads import ENGINE, in_thread
from warmcell.sandbox.errors import (
    ConflictError,
    NotFoundError,
    OperationTimeoutError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.models import GpuDevice, LimitStatus

log = logging.getLogger(__name__)

KILLED = 128 + int(signal.SIGKILL)
TELL_TIMEOUT_S = 10.0
"""How long the engine may take to take note of the end of a container."""
REMOVED = "The container was removed by somebody else"
SILENT = "The container engine did not tell how the container ended: {}"


class Remains:
    """What a container, or the start of one, has to give back: itself, descriptors and files."""

    def __init__(self, engine: Engine, directory: Path, name: str, labels: Mapping[str, str], left: set[str]) -> None:
        self.engine = engine
        self.directory = directory
        self.name = name
        self.labels = labels
        self._left = left
        self.foreign = False
        """Whether a container of that name is somebody else's."""
        self.init_fd = -1
        self.root_fd = -1
        self.run_fd = -1
        self.layer_fd = -1
        """Of the layer that it began with, whose path others may move."""

    def kill(self) -> None:
        """Kill its first process, which takes all others with it. The engine is not needed for that."""
        if self.init_fd >= 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self.init_fd, signal.SIGKILL)

    async def release(self, *, timeout: float) -> None:
        """Kill what lives and remove what is there. Idempotent.

        Where the engine does not answer its record of the container stays, marked as ours, for who cleans up later.

        Raises:
            OperationTimeoutError: Processes are left.
        """
        self.kill()
        if self.init_fd >= 0 and not await ended(self.init_fd, timeout):
            raise OperationTimeoutError(
                f"Processes of the sandbox in {self.directory.name} did not end within {timeout:.0f} s",
                hint="They wait for a device or a network file system; they end when it answers.",
                details={"operation": "stop", "timeout": timeout},
            )
        handles = {self.run_fd, self.root_fd, self.init_fd, self.layer_fd} - {-1}
        self.init_fd = self.root_fd = self.run_fd = self.layer_fd = -1
        await in_thread(self._remove_files, handles)
        try:
            await ENGINE.run(self._remove_container)
        except WarmcellError as error:
            self._left.add(self.name)
            log.warning("the container %s is left to be removed later: %s", self.name, error)

    def _remove_files(self, handles: Collection[int]) -> None:
        """Blocks: with the last handle of a container's files the kernel takes all its mounts down."""
        try:
            for path in sorted(self.directory.glob("*")):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        finally:  # `run` leads to a handle by its number: it goes before the number can be another sandbox's.
            for handle in handles:
                os.close(handle)

    def _remove_container(self) -> None:
        if not self.foreign:
            self.engine.remove(self.name)


class DockerInstance:
    """Implements `SandboxInstance`."""

    guest_run_directory = RUN
    waits = False
    stands_by = False
    shows_others = False

    def __init__(
        self,
        remains: Remains,
        container: Container,
        *,
        run_directory: Path,
        limits: Mapping[str, LimitStatus],
        workspace_note: str,
        parts: Parts,
        events: Path | None,
    ) -> None:
        self._remains = remains
        self._container = container
        self._parts = parts
        self._events = events
        self.pid = container.pid
        self.run_directory = run_directory
        self.limits = limits
        self.workspace_note = workspace_note
        self._oom_kills = 0
        self._stopping: asyncio.Task[None] | None = None
        self._ended = asyncio.create_task(self._watch())

    @property
    def container(self) -> str:
        """Its id, as the engine calls it."""
        return self._container.id

    async def show_gpus(self, gpus: Sequence[GpuDevice]) -> None:
        """Never: its devices are those that it was made with."""
        raise UnsupportedOperationError("This sandbox shows no other GPUs", hint="Restart the kernel.")

    def processes(self) -> Sequence[int]:
        """Host pids of all that is in it: orphans come back to its first process."""
        if self._remains.init_fd < 0 or self._ended.done():
            return ()
        return (self.pid, *descendants(self.pid))

    def oom_kills(self) -> int:
        """As far as its memory group tells."""
        if self._events is not None:
            self._oom_kills = max(self._oom_kills, counter(self._events, "oom_kill"))
        return self._oom_kills

    async def save_layer(self, target: Path) -> None:
        """Copy its private files out; see the port."""
        if self._stopping is not None or self._remains.root_fd < 0:
            raise ConflictError("The sandbox is going away", hint="There is nothing to save any more.")
        handles = [os.dup(fd) for fd in (self._remains.root_fd, self._remains.layer_fd) if fd >= 0]
        try:
            await in_thread(layers.save, handles[0], self._parts, target, began_with=(*handles, -1)[1])
        finally:
            for handle in handles:
                os.close(handle)

    async def can_be_replaced_by(self, other: SandboxInstance, *, fork_server: bool = False) -> bool:
        """Whether nothing but init runs in it, and it has the other's files; see the port."""
        bare = partial(self._is_bare, fork_server=fork_server)
        if not isinstance(other, DockerInstance) or self._parts != other._parts or not bare():
            return False
        mine, theirs = self._remains, other._remains
        if -1 in (mine.root_fd, theirs.root_fd) or (mine.layer_fd < 0) != (theirs.layer_fd < 0):
            return False
        one, another, *began_with = handles = [
            os.dup(fd) for fd in (mine.root_fd, theirs.root_fd, mine.layer_fd, theirs.layer_fd) if fd >= 0
        ]
        try:
            return await in_thread(likeness.alike, one, another, began_with, self._parts) and bare()
        finally:
            for handle in handles:
                os.close(handle)

    def _is_bare(self, *, fork_server: bool) -> bool:
        living = self.processes()
        return bool(living) and is_bare((self.pid,), living, fork_server=fork_server)

    async def wait(self) -> ExitInfo:
        """Wait for its end."""
        return await asyncio.shield(self._ended)

    async def stop(self, *, timeout: float = 5.0) -> ExitInfo:
        """End it and remove all of it."""
        if self._stopping is None or (self._stopping.done() and self._stopping.exception() is not None):
            self._stopping = asyncio.create_task(self._stop(timeout))
        await asyncio.shield(self._stopping)
        return await self.wait()

    async def _stop(self, timeout: float) -> None:
        self.oom_kills()
        self._remains.kill()
        await asyncio.wait({self._ended}, timeout=timeout)  # It asks the engine, which forgets what it removes.
        await self._remains.release(timeout=timeout)

    async def _watch(self) -> ExitInfo:
        handle = os.dup(self._remains.init_fd)
        try:
            await ended(handle, None)
        finally:
            os.close(handle)
        return await ENGINE.run(self._ask)

    def _ask(self) -> ExitInfo:
        """How it ended, as the engine knows it. Blocks."""
        engine, name = self._remains.engine, self.container
        try:
            code = engine.wait(name, timeout_s=TELL_TIMEOUT_S)
            found = engine.look(name)
            said = engine.said(name)
        except NotFoundError:
            return ExitInfo(exit_code=KILLED, message=REMOVED)
        except WarmcellError as error:
            return ExitInfo(exit_code=KILLED, oom_killed=self._oom_kills > 0, message=SILENT.format(error.message))
        if found is None or found.removing:
            said = REMOVED
        short = (found is not None and found.oom_killed) or self._oom_kills > 0
        return ExitInfo(exit_code=code, oom_killed=short and code == KILLED, message=said)


async def ended(process: int, timeout: float | None) -> bool:
    """Wait for the end of a process, by its pidfd; False if it lives on."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.add_reader(process, _settle, future)
    try:
        async with asyncio.timeout(timeout):
            await future
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(process)
    return True


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
