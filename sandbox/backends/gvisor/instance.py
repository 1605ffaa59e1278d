"""A gVisor sandbox that is up."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends.base import ExitInfo
from warmcell.sandbox.backends.cgroups import Cgroup
from warmcell.sandbox.backends.child import Child
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.backends.gvisor.binary import Runsc, command
from warmcell.sandbox.backends.places import RUN
from warmcell.sandbox.backends.processes import descendants
from warmcell.sandbox.errors import OperationTimeoutError, UnsupportedOperationError
from warmcell.sandbox.models import LimitStatus

NAME = "w"
"""What runsc calls every sandbox: each has a state directory of its own, and socket paths are short."""
STATE = "r"
COMMAND_TIMEOUT_S = 30.0
LAST_WORDS_S = 2.0
"""runsc that was about to speak with the process that is killed, as in a start, waits for its answer for ever."""


class Remains:
    """What a sandbox, or the start of one, has to give back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.child: Child | None = None
        self.cgroup: Cgroup | None = None
        self.run_fd = -1
        self.base_fd = -1

    async def release(self, *, timeout: float) -> int:
        """Kill what lives and remove what is there; the exit code. Idempotent.

        Raises:
            OperationTimeoutError: Processes are left.
        """
        code = 0
        try:
            async with asyncio.timeout(timeout):
                if self.child is not None:
                    code = await self._kill(self.child)
                if self.cgroup is not None:
                    await self.cgroup.remove()
        except TimeoutError:
            raise OperationTimeoutError(
                f"Processes of the sandbox in {self.directory.name} did not end within {timeout:.0f} s",
                hint="They wait for a device or a network file system; they end when it answers.",
                details={"operation": "stop", "timeout": timeout},
            ) from None
        # `run` leads to a descriptor by its number: it goes before the number can be another sandbox's.
        await asyncio.to_thread(self._remove_files)
        for fd in {self.run_fd, self.base_fd} - {-1}:
            os.close(fd)
        self.run_fd = self.base_fd = -1
        return code

    async def _kill(self, child: Child) -> int:
        """The sandbox process first: runsc then tells how it ended, and takes what serves it files along."""
        others = [] if child.ended else await asyncio.to_thread(_opened, descendants(child.pid))
        try:
            for fd in others:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            if others:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORDS_S):
                        await child.wait()
            code = await child.kill()
            for fd in others:
                await _gone(fd)
        finally:
            for fd in others:
                os.close(fd)
        return code

    def _remove_files(self) -> None:
        for path in sorted(self.directory.glob("*")):
            remove_tree(path)


class GvisorInstance:
    """Implements `SandboxInstance`."""

    waits = False

    def __init__(
        self,
        remains: Remains,
        *,
        runsc: Runsc,
        shape: str,
        image: Path | None,
        child: Child,
        pid: int,
        run_directory: Path,
        limits: Mapping[str, LimitStatus],
        workspace_note: str,
    ) -> None:
        self._remains = remains
        self._child = child
        self.runsc = runsc
        self.shape = shape
        """Of its spec; an image of it goes on in sandboxes of an equal one."""
        self.image = image
        """From which it went on, if it did."""
        self.unsaved = False
        """Whether it has changes that an image would not have."""
        self.pid = pid
        self.run_directory = run_directory
        self.guest_run_directory = RUN
        self.limits = limits
        self.workspace_note = workspace_note
        self._stopping: asyncio.Task[int] | None = None
        self._oom_kills = 0
        self._ended = asyncio.create_task(self._watch())

    def processes(self) -> Sequence[int]:
        """Host pids of runsc, of the sandbox process with all that it runs in, and of what serves it files."""
        if self._child.ended:
            return ()
        return (self._child.pid, *descendants(self._child.pid))

    def oom_kills(self) -> int:
        """As far as its memory group tells."""
        if self._remains.cgroup is not None:
            self._oom_kills = max(self._oom_kills, self._remains.cgroup.oom_kills())
        return self._oom_kills

    async def save_layer(self, target: Path) -> None:
        """Never: an image of the sandbox has its files."""
        raise no_layers()

    async def can_be_replaced_by(self, other: object) -> bool:
        """Never: nobody sees its files from outside."""
        return False

    async def tell(self, *words: str, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
        """Run a command of runsc's on it, its words with the sandbox's name left out at the end.

        Raises:
            CommandError: It failed.
            OperationTimeoutError: It took too long.
        """
        argv = self.runsc.argv(self._remains.directory / STATE, *words, NAME)
        await command(argv, timeout_s=timeout_s)

    async def wait(self) -> ExitInfo:
        """Wait for its end."""
        return await asyncio.shield(self._ended)

    async def stop(self, *, timeout: float = 5.0) -> ExitInfo:
        """End it and remove all of it."""
        if self._stopping is None or (self._stopping.done() and self._stopping.exception() is not None):
            self._stopping = asyncio.create_task(self._remains.release(timeout=timeout))
        await asyncio.shield(self._stopping)
        return await self.wait()

    async def _watch(self) -> ExitInfo:
        code = await self._child.wait()
        return ExitInfo(exit_code=code, oom_killed=self.oom_kills() > 0 and code == 137, message=self._child.tail)


def no_layers() -> UnsupportedOperationError:
    """For files alone: there is only the whole of a sandbox."""
    return UnsupportedOperationError(
        "Files of a gVisor sandbox cannot be saved alone", hint="Snapshot it: an image has its memory and its files."
    )


def _opened(pids: Sequence[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found


async def _gone(fd: int) -> None:
    """Wait for the end of a process."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
