"""The kernels of this keeper, as those see them who ask for one, signal it, adopt it or end it."""

import asyncio
import dataclasses
import logging
import signal

from warmcell.extension.keeper.kernel import Kernel, KernelRequest
from warmcell.extension.keeper.kernel_starts import KernelStarts
from warmcell.extension.keeper.ledger import SessionNote
from warmcell.extension.keeper.owners import pid_of
from warmcell.sandbox import errors
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo

log = logging.getLogger(__name__)


class Kernels(KernelStarts):
    """Starts, ends and removes them."""

    def all(self) -> list[Kernel]:
        """All of them."""
        return list(self._kernels.values())

    def of(self, sandbox_id: SandboxId) -> Kernel | None:
        """The one in this sandbox, if there is one."""
        try:
            kernel = self._kernels.get(self._service.info(sandbox_id).kernel_id or "")
        except errors.SandboxNotFoundError:
            return None
        return kernel if kernel is not None and kernel.sandbox_id == sandbox_id else None

    def get(self, kernel_id: str) -> Kernel:
        """One of them.

        Raises:
            NotFoundError: There is none of that id.
        """
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            raise errors.NotFoundError(f"There is no kernel {kernel_id}", hint="It has ended, or never was here.")
        return kernel

    async def start(self, request: KernelRequest, *, owner_pid: int, sandbox_only: bool = False) -> SandboxInfo:
        """Start a kernel, or the next generation of one whose process is gone; returns once it has answered.

        Args:
            request: What it is.
            owner_pid: The process that it goes with; 0: none.
            sandbox_only: Returns once its sandbox is up and its clients can connect; a second call starts its process.

        Raises:
            WarmcellError: What stood in the way. Of a first start nothing is left then; a kernel that
                had a sandbox keeps it where its shape did not change.
        """
        if self._closed:
            raise errors.ConflictError("The keeper is going away", hint="Start the kernel again in a moment.")
        starts = self._starts.setdefault(request.kernel_id, set())
        task = asyncio.create_task(self._start(request, owner_pid, sandbox_only=sandbox_only))
        starts.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise errors.ConflictError(
                f"Kernel {request.kernel_id} was removed while it started", hint="Start it again if that was a mistake."
            ) from None
        finally:
            starts.discard(task)
            if not starts:
                self._starts.pop(request.kernel_id, None)

    async def add(self, request: KernelRequest) -> Kernel:
        """A kernel whose clients can connect, and whose process is somebody else's to bring up.

        Raises:
            WarmcellError: Its clients cannot connect; nothing is left of it.
        """
        kernel = self._kernels[request.kernel_id] = Kernel(request, await self._proxy(request))
        try:
            await self._connect_host(kernel, request)
        except BaseException:
            await self._remove(kernel)
            raise
        return kernel

    def take_up(self, kernel: Kernel) -> None:
        """A kernel that the keeper before had is here; it keeps its sessions and the name of its notebook."""
        note = self.ledger.take_up(kernel.request.kernel_id)
        if note is not None:
            owner = pid_of(note.owner)
            if owner is not None:  # its server has seen the keeper go, and goes on
                self._own(kernel, owner)
            kernel.sessions = note.sessions
            kernel.call(notebook=note.notebook, session_name=note.session_name)
            box = self._find(kernel)
            if box is not None:
                box.tell(notebook=note.notebook)
        self.note(kernel)
        if kernel.owned:
            self.adopted(kernel)

    def follow(self, kernel: Kernel, process: KernelProcess, box: LiveSandbox) -> None:
        """From now on this is the kernel's process; the one before, if it is another, is none any more."""
        before, kernel.process = kernel.process, process
        self.spawn(self._watch(kernel, process, box, box.oom_kills()))
        if before is not None and before is not process:
            before.exited.set()

    async def end(self, kernel_id: str, *, grace: float, restart: bool = False) -> None:
        """End its process, by force after `grace` seconds; proxy and sandbox stay for the next generation.

        Args:
            kernel_id: Which.
            grace: Seconds that it has to leave by itself.
            restart: That generation is started right after this.
        """
        kernel = self.get(kernel_id)
        box = self._find(kernel)
        if restart and box is not None and box.info.state is State.RUNNING and box.info.parked is None:
            self._service.restart_follows(box.info.id)
        await self._end(kernel, grace=grace)

    async def signal(self, kernel_id: str, signum: int) -> None:
        """Send a signal to its process group."""
        kernel = self.get(kernel_id)
        box = self._find(kernel)
        if box is not None and box.info.queue is not None and signum == signal.SIGINT:
            self._service.leave_queue(box.info.id)
        elif box is not None and kernel.alive:
            kernel.ending = kernel.ending or signum in (signal.SIGKILL, signal.SIGTERM)
            await box.signal_kernel(signum)

    async def wait(self, kernel_id: str, *, timeout: float) -> Kernel:
        """Wait until its process is dead, at most `timeout` seconds."""
        kernel = self.get(kernel_id)
        if kernel.process is not None:
            try:
                async with asyncio.timeout(timeout):
                    await kernel.process.exited.wait()
            except TimeoutError:
                pass
        return kernel

    def adopt(self, kernel_id: str, *, server: str | None, owner_pid: int) -> Kernel:
        """Another server process owns it from now on.

        Raises:
            ConflictError: The one that owns it lives.
        """
        kernel = self.get(kernel_id)
        if kernel.owner is not None and kernel.owner.alive and kernel.owner.pid != owner_pid:
            raise errors.ConflictError(
                f"Kernel {kernel_id} belongs to process {kernel.owner.pid}, which runs",
                hint="Use it there, or end that Jupyter server first.",
                details={"pid": kernel.owner.pid},
            )
        # A clone, which was nobody's, is from now on like any other kernel of that server.
        persistent = kernel.request.persistent or server is not None
        kernel.request = dataclasses.replace(kernel.request, server=server, persistent=persistent)
        self._own(kernel, owner_pid)
        box = self._find(kernel)
        if box is not None and persistent:
            box.stays = True
        self.note(kernel)
        log.info("kernel %s adopted by process %d for %s", kernel_id, owner_pid, server)
        self.adopted(kernel)
        return kernel

    def leave(self, kernel_id: str, *, owner_pid: int, soon: bool) -> Kernel:
        """The process that owns it lets go of it, so that another one may adopt it.

        Args:
            kernel_id: Which.
            owner_pid: Of whom this comes. From others than the owner it means nothing.
            soon: Not yet, but before long: whoever comes for it had better wait.
        """
        kernel = self.get(kernel_id)
        if kernel.owner is not None and kernel.owner.pid == owner_pid and kernel.request.persistent:
            if soon:
                kernel.owner.leaving = True
            else:
                kernel.owner.close()
                kernel.owner = None
                self.note(kernel)
        return kernel

    async def unowned(self, kernel_id: str, *, timeout: float) -> Kernel:
        """Wait until no process owns it, at most `timeout` seconds.

        Raises:
            NotFoundError: It is removed.
        """
        try:
            async with asyncio.timeout(timeout):
                while (kernel := self.get(kernel_id)).owned:
                    assert kernel.owner is not None
                    await kernel.owner.over.wait()
        except TimeoutError:
            pass
        return self.get(kernel_id)

    def set_sessions(
        self, kernel_id: str, sessions: tuple[SessionNote, ...], *, notebook: str | None, session_name: str | None
    ) -> Kernel:
        """What its Jupyter server has open on it from now on, and under which path.

        Raises:
            NotFoundError: There is no such kernel.
        """
        kernel = self.get(kernel_id)
        kernel.sessions = sessions
        kernel.call(notebook=notebook, session_name=session_name)
        box = self._find(kernel)
        if box is not None and box.info.notebook != notebook:
            box.tell(notebook=notebook)
        self.note(kernel)
        return kernel

    async def forget_sandbox(self, sandbox_id: SandboxId) -> None:
        """Remove the kernel whose sandbox this is, if there is one."""
        for kernel in self.all():
            if kernel.sandbox_id == sandbox_id:
                await self.remove(kernel.request.kernel_id)

    def start_no_more(self) -> None:
        """The keeper is going: what is suspended from now on stays so."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """Whether the keeper is going."""
        return self._closed

    async def close(self) -> None:
        """Remove all, and start no more."""
        self._closed = True
        everything = {*self._kernels, *self._starts}
        await asyncio.gather(*(self.remove(kernel_id) for kernel_id in everything), return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
