"""A gVisor sandbox that is up."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from warmcell.sandbox import freezing, guest_files
from warmcell.sandbox.backends.base import ExitInfo
from warmcell.sandbox.backends.cgroups import Cgroup
from warmcell.sandbox.backends.child import START_TIMEOUT_S, Child, StageFailedError
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.backends.gvisor.binary import Runsc, command, first_line
from warmcell.sandbox.backends.places import RUN
from warmcell.sandbox.backends.processes import descendants, words_of
from warmcell.sandbox.errors import OperationTimeoutError, SnapshotError, UnsupportedOperationError
from warmcell.sandbox.guest_wire import wait_for_socket
from warmcell.sandbox.models import GpuDevice, LimitStatus

NAME = "w"
"""What runsc calls every sandbox: each has a state directory of its own, and socket paths are short."""
SANDBOX = b"runsc-sandbox"
"""What runsc calls the process that is a sandbox's kernel."""
STATE = "r"
PID = "p"
"""FIFO in the sandbox's directory that runsc writes the sandbox process's number to, the last thing before it starts or
restores what is to run there. It waits for somebody who reads that: so a sandbox can stand by."""
IMAGE = "i"
"""Link to the image, made once it is known."""
COMMAND_TIMEOUT_S = 30.0
STILL_AFTER_S = 1.0
"""What stands by is stopped then: a sandbox in which nothing runs takes 2 % of a processor all the same."""
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
        self.stands_by = True
        """Whether runsc waits at the FIFO, and notes nothing of what ends meanwhile."""

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
            if others and not self.stands_by:
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
        child: Child,
        run_directory: Path,
        limits: Mapping[str, LimitStatus],
        workspace_note: str,
    ) -> None:
        self._remains = remains
        self._child = child
        self.runsc = runsc
        self.shape = shape
        """Of its spec; an image of it goes on in sandboxes of an equal one."""
        self.image: Path | None = None
        """From which it went on, if it did."""
        self.unsaved = False
        """Whether it has changes that an image would not have."""
        self.pid = child.pid
        """Of runsc, until it is up."""
        self.run_directory = run_directory
        self.guest_run_directory = RUN
        self.limits = limits
        self.workspace_note = workspace_note
        self._stopping: asyncio.Task[int] | None = None
        self._stilling = asyncio.get_running_loop().call_later(STILL_AFTER_S, self._be_still)
        self._oom_kills = 0
        self._ended = asyncio.create_task(self._watch())

    shows_others = False

    @property
    def stands_by(self) -> bool:
        """Whether it waits for an image to go on from; see `go_on`."""
        return self._remains.stands_by

    def _be_still(self) -> None:
        if self.stands_by and not self._child.ended:
            with contextlib.suppress(UnsupportedOperationError):  # It is one that takes some time, then.
                freezing.freeze(self._busy)

    def _others(self) -> Sequence[int]:
        return () if self._child.ended else descendants(self._child.pid)

    def _busy(self) -> Sequence[int]:
        """What of one that stands by takes time, and nothing else: who serves it files would not see it end."""
        return [pid for pid in self._others() if words_of(pid)[0] == SANDBOX]

    async def come_up(self) -> None:
        """Have runsc go on, and wait until the guest's init serves, before which runsc cannot tell how a sandbox ends.

        Raises:
            StageFailedError: It ended instead, or took too long.
        """
        self._stilling.cancel()
        freezing.thaw(self._busy)
        pid_file = os.open(self._remains.directory / PID, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._remains.stands_by = False
        serving = asyncio.ensure_future(wait_for_socket(self.run_directory))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.wait({self._ended, serving}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            pass
        finally:
            up = serving.done() and not serving.cancelled() and serving.exception() is None
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            said = os.read(pid_file, 32) if up else b""
            os.close(pid_file)
        if not said.isdigit():
            raise StageFailedError(f"it ended with exit code {await self._child.kill()}", 0, self._child.tail)
        self.pid = int(said)

    async def go_on(self, image: Path, *, until: str) -> None:
        """Go on from the image of a whole sandbox of an equal spec, made by this very runsc. Only who stands by can.

        Args:
            image: It is needed no more when this returns.
            until: The file for which that one's init was told to wait.

        Raises:
            SnapshotError: It cannot; the sandbox is of no use any more, and the image is as before.
        """
        assert self.stands_by
        self.image = image
        try:
            await asyncio.to_thread((self._remains.directory / IMAGE).symlink_to, image)
            guest_files.create(self.run_directory / until).close()
            await self.come_up()
        except StageFailedError as error:
            raise SnapshotError(
                f"The sandbox could not be restored: {first_line(error.stderr) or error}",
                hint="Start it anew; its image is as before.",
                details={"step": str(error), "stderr": error.stderr[-1000:]},
            ) from error
        (self.run_directory / until).unlink(missing_ok=True)

    async def show_gpus(self, gpus: Sequence[GpuDevice]) -> None:
        """Never: its devices are those that it was made with."""
        raise UnsupportedOperationError("This sandbox shows no other GPUs", hint="Restart the kernel.")

    def processes(self) -> Sequence[int]:
        """Host pids of runsc, of the sandbox process with all that it runs in, and of what serves it files."""
        if self._child.ended:
            return ()
        return (self._child.pid, *self._others())

    def oom_kills(self) -> int:
        """As far as its memory group tells."""
        if self._remains.cgroup is not None:
            self._oom_kills = max(self._oom_kills, self._remains.cgroup.oom_kills())
        return self._oom_kills

    async def save_layer(self, target: Path) -> None:
        """Never: an image of the sandbox has its files."""
        raise no_layers()

    async def can_be_replaced_by(self, other: object, *, fork_server: bool = False) -> bool:
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
        self._stilling.cancel()
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


def no_images() -> UnsupportedOperationError:
    """Of one with GPUs: an image has nothing of what is on them."""
    return UnsupportedOperationError(
        "A gVisor sandbox with a GPU cannot be saved, restored or forked",
        hint="Use the bubblewrap backend for that, or a sandbox without a GPU.",
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
