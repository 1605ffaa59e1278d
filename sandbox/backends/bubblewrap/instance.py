"""A bubblewrap sandbox that is up."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from warmcell.sandbox.backends import layers, likeness
from warmcell.sandbox.backends.base import ExitInfo, SandboxInstance
from warmcell.sandbox.backends.bubblewrap import graphics, nodes
from warmcell.sandbox.backends.bubblewrap.helped import HelperChild
from warmcell.sandbox.backends.cgroups import Cgroup
from warmcell.sandbox.backends.child import Child
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.backends.layers import Parts
from warmcell.sandbox.backends.nvidia import GPU_NODES
from warmcell.sandbox.backends.places import RUN
from warmcell.sandbox.backends.processes import descendants, is_bare
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import ConflictError, OperationTimeoutError, UnsupportedOperationError
from warmcell.sandbox.models import GpuDevice, LimitStatus


class Remains:
    """What a sandbox, or the start of one, has to give back: descriptors, files and its control group."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.layer: Path | None = None
        self.child: Child | HelperChild | None = None
        self.cgroup: Cgroup | None = None
        self.init_fd = -1
        self.run_fd = -1
        self.base_fd = -1
        self.layer_fd = -1
        """Of the layer that it began with."""

    async def release(self, *, timeout: float) -> int:
        """Kill what lives and remove what is there; the exit code. Idempotent.

        Raises:
            OperationTimeoutError: Processes are left.
        """
        code = 0
        try:
            async with asyncio.timeout(timeout):
                # The first process of a pid namespace takes all others with it; bubblewrap ends once it is gone.
                if self.init_fd >= 0:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(self.init_fd, signal.SIGKILL)
                    if self.child is not None:
                        code = await self.child.wait()
                if self.child is not None:
                    code = await self.child.kill()
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
        for fd in {self.init_fd, self.run_fd, self.base_fd, self.layer_fd} - {-1}:
            os.close(fd)
        self.init_fd = self.run_fd = self.base_fd = self.layer_fd = -1
        return code

    def _remove_files(self) -> None:
        if self.layer is not None:
            remove_tree(self.layer)
        for path in sorted(self.directory.glob("*")):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()  # Mount points are empty on the host.
            else:
                path.unlink(missing_ok=True)


@dataclass(slots=True, kw_only=True)
class Entrance:
    """What a template's process needs to know of a sandbox of its nest."""

    env: Mapping[str, str]
    """With which the sandbox began."""
    init_fd: int
    most_processes: int
    """RLIMIT_NPROC of its processes; 0: none of its own."""
    visitors: Callable[[], Sequence[int]] = tuple
    """Host pids of kernels that are children of the template's process, in whatever sandbox."""


class BubblewrapInstance:
    """Implements `SandboxInstance`."""

    stands_by = False

    def __init__(
        self,
        remains: Remains,
        *,
        child: Child | HelperChild,
        pid: int,
        run_directory: Path,
        limits: Mapping[str, LimitStatus],
        workspace_note: str,
        parts: Parts,
        waits: bool = False,
        shown: Mapping[str, str] | None = None,
    ) -> None:
        self._remains = remains
        self._began_with = self._shown = dict(shown or {})
        """Nodes of devices: place in it → node of the host, which may have gone by now."""
        self._child = child
        self.pid = pid
        self.run_directory = run_directory
        self.guest_run_directory = RUN
        self.limits = limits
        self.workspace_note = workspace_note
        self.waits = waits
        self._parts = parts
        self.entrance: Entrance | None = None
        """Where kernels can enter it from a template's process."""
        self._stopping: asyncio.Task[int] | None = None
        self._oom_kills = 0
        self._first = frozenset(self.processes())
        """Those that it began with, which end with it."""
        self._ended = asyncio.create_task(self._watch())

    @property
    def shows_others(self) -> bool:
        """Where root has made it with a GPU: what all of them need is there then, and its /dev is root's."""
        made_here = not isinstance(self._child, HelperChild)
        return made_here and os.getuid() == 0 and bool(self._began_with)

    async def show_gpus(self, gpus: Sequence[GpuDevice]) -> None:
        """See the port."""
        if self._remains.init_fd < 0:
            raise ConflictError("The sandbox is going away", hint="Start another one.")
        process = os.dup(self._remains.init_fd)
        try:
            await in_thread(self._change_nodes, process, tuple(gpus))
        finally:
            os.close(process)

    def _change_nodes(self, process: int, gpus: tuple[GpuDevice, ...]) -> None:
        had, wanted = self._shown, dict(graphics.nodes(gpus))
        add = {place: node for place, node in wanted.items() if place not in had}
        remove = {place: node for place, node in had.items() if place not in wanted}
        if any(had[place] != node for place, node in wanted.items() if place in had):
            raise UnsupportedOperationError(
                "The other GPU has a node of the same name", hint="Restart the kernel with the other GPU."
            )
        if not add and not remove:
            return
        own = nodes.identities([node for place, node in remove.items() if place not in GPU_NODES])
        nodes.change(process, add=add, remove=remove)
        self._shown = wanted
        # After they are gone: whoever has none open by now gets none.
        user = nodes.user_of(own, self.processes)
        if user is not None:
            back = {place: node for place, node in remove.items() if os.path.exists(node)}
            nodes.change(process, add=back, remove=add)
            self._shown = {place: node for place, node in had.items() if place in wanted or place in back}
            raise UnsupportedOperationError(
                f"Process {user} of the sandbox has the device of its GPU open, or files on their way in a socket, "
                "besides what the driver parks",
                hint="End that program, or restart the kernel. It keeps its GPU.",
            )

    def processes(self) -> Sequence[int]:
        """Host pids of bubblewrap and of everything in the sandbox."""
        if isinstance(self._child, HelperChild):
            return self._child.processes()
        if self._child.ended:
            return ()
        entered = [] if self.entrance is None else [pid for pid in self.entrance.visitors() if self._is_inside(pid)]
        return (
            self._child.pid,
            *descendants(self._child.pid),
            *entered,
            *(d for pid in entered for d in descendants(pid)),
        )

    def _is_inside(self, pid: int) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{self.pid}/ns/pid")
        except OSError:
            return False

    @property
    def entrances(self) -> Sequence[Path]:
        """Files into which a process writes 0 to join its control group."""
        return () if self._remains.cgroup is None else self._remains.cgroup.entrances

    def oom_kills(self) -> int:
        """As far as its memory group tells."""
        if isinstance(self._child, HelperChild):
            self._oom_kills = max(self._oom_kills, self._child.oom_kills())
        if self._remains.cgroup is not None:
            self._oom_kills = max(self._oom_kills, self._remains.cgroup.oom_kills())
        return self._oom_kills

    async def save_layer(self, target: Path) -> None:
        """Copy its private files out; see the port."""
        if self._stopping is not None or self._remains.base_fd < 0:
            raise ConflictError("The sandbox is going away", hint="There is nothing to save any more.")
        handles = [os.dup(fd) for fd in (self._remains.base_fd, self._remains.layer_fd) if fd >= 0]
        try:
            await in_thread(layers.save, handles[0], self._parts, target, began_with=(*handles, -1)[1])
        finally:
            for handle in handles:
                os.close(handle)

    async def can_be_replaced_by(self, other: SandboxInstance, *, fork_server: bool = False) -> bool:
        """Whether it has no more processes than it began with, and the other's files; see the port."""
        bare = partial(self._is_bare, fork_server=fork_server)
        if not isinstance(other, BubblewrapInstance) or self._parts != other._parts or not bare():
            return False
        mine, theirs = self._remains, other._remains
        if mine.base_fd < 0 or theirs.base_fd < 0 or (mine.layer_fd < 0) != (theirs.layer_fd < 0):
            return False
        one, other_one, *began_with = handles = [
            os.dup(fd) for fd in (mine.base_fd, theirs.base_fd, mine.layer_fd, theirs.layer_fd) if fd >= 0
        ]
        try:
            return await in_thread(likeness.alike, one, other_one, began_with, self._parts) and bare()
        finally:
            for handle in handles:
                os.close(handle)

    def _is_bare(self, *, fork_server: bool) -> bool:
        return not self._child.ended and is_bare(self._first, self.processes(), fork_server=fork_server)

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
