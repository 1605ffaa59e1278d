"""How a kernel of this keeper comes to its sandbox and its process, and what is left where that fails."""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from warmcell.extension.keeper.agents.output import ENTRY_MAX_BYTES
from warmcell.extension.keeper.death import death, unless_dead
from warmcell.extension.keeper.kernel import Kernel, KernelRequest
from warmcell.extension.keeper.ledger import Ledger
from warmcell.extension.keeper.owners import OwnerWatch
from warmcell.kernel_provisioner.proxy import MESSAGE_MAX_BYTES, Connection, KernelProxy
from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import to_its_end
from warmcell.sandbox.choosing import AGENT
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.kernel import Frontend, KernelProcess
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import ErrorInfo, SandboxId, SandboxInfo
from warmcell.sandbox.paths import FULL, Paths, no_room
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
"""From bound sockets to the first answer."""


class KernelStarts:
    """The kernels there are, and their starts and ends. Failures of a start stay visible as a failed sandbox."""

    def __init__(self, service: SandboxService, paths: Paths) -> None:
        self.sandbox_in_use: Callable[[LiveSandbox], None] = lambda box: None
        """Told of a sandbox before a kernel starts in it."""
        self.sandbox_renewed: Callable[[LiveSandbox], Awaitable[None]] = _nothing
        """Told of a sandbox that a kernel goes on in, before it does."""
        self.front_of: Callable[[Kernel, LiveSandbox], Frontend | None] = lambda kernel, box: None
        """Makes who speaks with a kernel when its memory is saved or brought back."""
        self.adopted: Callable[[Kernel], None] = lambda kernel: None
        """Told of a kernel that a Jupyter server has taken up, or has kept when this keeper took it up."""
        self.ledger = Ledger(paths.ledger)
        self._service = service
        self._paths = paths
        self._kernels: dict[str, Kernel] = {}
        self._starts: dict[str, set[asyncio.Task[SandboxInfo]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def note(self, kernel: Kernel) -> None:
        """Have a keeper that comes after this one know of it, if a server has it and will ask."""
        if kernel.request.persistent and kernel.request.terms is None:
            self.ledger.put(kernel.note())

    async def remove(self, kernel_id: str) -> None:
        """Its sandbox, proxy and sockets go; a start that is under way ends. Idempotent."""
        starts = self._starts.get(kernel_id, set())
        for task in starts:
            if not task.cancelling():
                task.cancel()
        if starts:
            await asyncio.wait(set(starts))
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            self.ledger.drop(kernel_id)
            return
        if kernel.lock.locked():
            await self._hasten(kernel)
        async with kernel.lock:
            if self._kernels.get(kernel_id) is kernel:
                await to_its_end(self._remove(kernel))

    async def _hasten(self, kernel: Kernel) -> None:
        """What is being done with its memory fails now: nobody wants it any more, and it may take long."""
        kernel.ending = True
        box = self._find(kernel)
        if box is not None:
            with contextlib.suppress(errors.WarmcellError):
                self._service.leave_queue(box.info.id)
            with contextlib.suppress(errors.WarmcellError):
                await box.signal_kernel(signal.SIGKILL)

    async def _start(self, request: KernelRequest, owner_pid: int, *, sandbox_only: bool) -> SandboxInfo:
        """What `start` does, as a task that `remove` can cancel. One at a time for each kernel."""
        began = time.perf_counter()
        while True:
            kernel = self._kernels.get(request.kernel_id)
            if kernel is None:
                kernel = self._kernels[request.kernel_id] = Kernel(request, await self._proxy(request))
            async with kernel.lock:
                if self._kernels.get(request.kernel_id) is not kernel:
                    continue  # it was removed while we waited for it
                try:
                    if kernel.alive:
                        await self._end(kernel, grace=0.0)
                    sandbox_id = await self._host_and_sandbox(kernel, request, owner_pid, without_kernel=sandbox_only)
                    if sandbox_only:
                        kernel.started = True
                        return self._service.info(sandbox_id)
                    return await self._start_process(kernel, sandbox_id, began)
                except BaseException as error:
                    await to_its_end(self._start_failed(kernel, error))
                    raise

    async def _proxy(self, request: KernelRequest) -> KernelProxy:
        try:
            most = MESSAGE_MAX_BYTES if request.terms is None else ENTRY_MAX_BYTES
            connection = Connection.from_json(request.connection)
            return KernelProxy(connection, name=request.kernel_id, message_max_bytes=most)
        except errors.WarmcellError as error:
            await self._refuse(request, error)
            raise

    async def _refuse(self, request: KernelRequest, error: errors.WarmcellError) -> None:
        """Let a page see why, although there was never a sandbox."""
        await self._service.refuse(
            request.spec, error, owner="notebook", kernel_id=request.kernel_id, notebook=request.notebook
        )

    async def _host_and_sandbox(
        self, kernel: Kernel, request: KernelRequest, owner_pid: int, *, without_kernel: bool
    ) -> SandboxId:
        """Where its clients come, and its sandbox: of a first start both at once, as neither needs the other."""
        connecting = asyncio.create_task(self._connect_host(kernel, request))
        making: asyncio.Task[SandboxId] | None = None
        try:
            if not kernel.listens:
                making = asyncio.create_task(self._sandbox(kernel, request, without_kernel=without_kernel))
            await connecting
            self._own(kernel, owner_pid)
            return await (making or self._sandbox(kernel, request, without_kernel=without_kernel))
        except BaseException:
            under_way = [connecting, *([] if making is None else [making])]
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            raise

    async def _connect_host(self, kernel: Kernel, request: KernelRequest) -> None:
        """Have the host side bound. jupyter_client unlinks its socket files at every restart."""
        try:
            _make_directory(self._socket_directory(request))
            if kernel.listens:
                await kernel.proxy.rebind(Connection.from_json(request.connection))
            else:
                await kernel.proxy.start()
                kernel.listens = True
        except errors.WarmcellError as error:
            if kernel.sandbox_id is None:
                await self._refuse(request, error)
            raise
        kernel.request = request

    async def _remove(self, kernel: Kernel) -> None:
        """Nothing of it is left: not in the list, no owner, sockets or directory on the host, no sandbox."""
        del self._kernels[kernel.request.kernel_id]
        if not self._closed:
            self.ledger.drop(kernel.request.kernel_id)
        kernel.ending = True
        if kernel.owner is not None:
            kernel.owner.close()
        await kernel.proxy.close()
        directory = self._socket_directory(kernel.request)
        if directory is not None:
            with contextlib.suppress(OSError):  # the client has removed it, or has put something of its own there
                directory.rmdir()
        box = self._find(kernel)
        if box is not None and not (self._closed and box.info.state is State.SUSPENDED):
            await self._service.stop(box.info.id)

    def _socket_directory(self, request: KernelRequest) -> Path | None:
        """Where the host side's sockets lie, if that is a directory for this kernel alone in a place of ours."""
        directory = Path(str(request.connection.get("ip", ""))).parent
        ours = request.connection.get("transport") == "ipc" and directory.parent == self._paths.kernels
        return directory if ours else None

    async def _sandbox(self, kernel: Kernel, request: KernelRequest, *, without_kernel: bool) -> SandboxId:
        """The sandbox for the next process: the one it has where that fits, else a new one."""
        owner = "notebook" if request.terms is None else AGENT
        died = self.ledger.loss(request.kernel_id, request.server, request.notebook)
        if kernel.sandbox_id is not None:
            spec = await self._service.check(request.spec, owner=owner, principal=request.principal)
            box = self._find(kernel)
            if box is not None:
                if request.spec.umask is None:  # It stays with what it was made with, whoever has started this keeper.
                    spec = dataclasses.replace(spec, umask=box.spec.umask)
                fits = spec.shape(box.gpus) == box.shape and spec.gpu == box.spec.gpu
                if fits and box.info.state in (State.RUNNING, State.SUSPENDED):
                    box.spec = dataclasses.replace(spec, egress=box.spec.egress)
                    await self._service.set_network(box.info.id, request.spec.egress)
                    await self._service.reopen(box.info.id)
                    return box.info.id
                died = box.info.error
            await kernel.proxy.drop_guest()
        before = kernel.sandbox_id
        if before is not None:
            await self._service.stop(before, keep_gpus=True)  # They will do for the next one, if it asks for such.
            kernel.sandbox_id = None
        try:
            info = await self._service.create(
                request.spec,
                owner=owner,
                principal=request.principal,
                terms=request.terms,
                kernel_id=request.kernel_id,
                notebook=request.notebook,
                gpus_of=before,
                without_kernel=without_kernel,
            )
        finally:
            if before is not None:
                self._service.release_gpus(before)
        kernel.sandbox_id = info.id
        if died is not None:  # the new one says it when its kernel has answered
            self._service.live(info.id).tell(error=died)
        return info.id

    async def _start_process(self, kernel: Kernel, sandbox_id: SandboxId, began: float) -> SandboxInfo:
        """A process in this sandbox, from asking for it to its first answer."""
        box = self._service.live(sandbox_id)
        self.sandbox_in_use(box)
        await kernel.proxy.drop_guest()
        kernel.ending = False
        env = {**kernel.request.env, **await box.network_environment(), **box.spec.env, **gpu_environment(box.gpus)}
        oom_before = box.oom_kills()
        process = kernel.process = await self._service.start_kernel(sandbox_id, env=env, cwd=kernel.request.cwd)
        started = time.perf_counter()
        oom_before = min(oom_before, box.oom_kills())  # What is behind the sandbox may be another one now.
        box.frontend = self.front_of(kernel, box)
        self.spawn(self._watch(kernel, process, box, oom_before))
        if process.token:  # It has been up for a while, and waits for somebody to become.
            self.sandbox_in_use(box)
            prefix, token = str(process.socket_prefix), process.token
            go_on = kernel.proxy.go_on(
                prefix,
                token=token,
                restored=True,
                clone=True,
                env=env,
                cwd=kernel.request.cwd,
                timeout=READY_TIMEOUT_S,
            )
            await unless_dead(process, go_on)
            process.token = ""
        else:
            await kernel.proxy.connect_guest(str(process.socket_prefix))
            await self._answer(kernel, process, box, oom_before)
        ready = time.perf_counter()
        box.took(ready=1000 * (ready - started))
        restored_ms = box.info.phases_ms.get("restore")
        if restored_ms is not None:  # A restart has that begin while the kernel before it ends: nobody waited for all.
            box.took(restore=min(restored_ms, 1000 * (started - began)))
        info = self._service.kernel_ready(sandbox_id, started_ms=1000 * (ready - began))
        kernel.started = True
        kernel.sessions = kernel.sessions or self.ledger.sessions(kernel.request.kernel_id)
        self.note(kernel)
        return info

    async def _answer(self, kernel: Kernel, process: KernelProcess, box: LiveSandbox, oom_before: int) -> None:
        """Wait until it has answered, but no longer than it lives."""
        ready = asyncio.create_task(kernel.proxy.wait_ready(timeout=READY_TIMEOUT_S))
        exited = asyncio.create_task(process.exited.wait())
        try:
            await asyncio.wait({ready, exited}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done() or ready.exception() is not None:
                if not process.alive:
                    raise death(
                        process.exit_code or 0,
                        oom_killed=box.oom_kills() > oom_before,
                        spec=box.spec,
                        when="while it started",
                    )
                ready.result()
        finally:
            for task in (ready, exited):
                task.cancel()
            await asyncio.gather(ready, exited, return_exceptions=True)

    async def _start_failed(self, kernel: Kernel, error: BaseException) -> None:
        """A first start leaves nothing but the failed sandbox's info; a restart leaves the kernel as it was: dead."""
        try:
            if kernel.started:
                await self._restart_failed(kernel, error)
                return
            if kernel.sandbox_id is not None and isinstance(error, errors.WarmcellError):
                sandbox_id, kernel.sandbox_id = kernel.sandbox_id, None
                await self._service.fail(sandbox_id, error)
            await self._remove(kernel)
        except errors.WarmcellError:  # what went wrong first is what the caller is told
            log.exception("kernel %s: what was left of its start could not be removed", kernel.request.kernel_id)

    async def _restart_failed(self, kernel: Kernel, error: BaseException) -> None:
        box = self._find(kernel)
        if box is None or box.info.state is not State.RUNNING:
            return
        if kernel.alive:
            await self._end(kernel, grace=0.0)
        await kernel.proxy.drop_guest()
        why = ErrorInfo.from_json(error.to_json()) if isinstance(error, errors.WarmcellError) else box.info.error
        box.tell(error=why, phase=None)

    def _find(self, kernel: Kernel) -> LiveSandbox | None:
        """Its sandbox; None if it has none, or one that failed so long ago that nobody knows it any more."""
        if kernel.sandbox_id is None:
            return None
        try:
            return self._service.live(kernel.sandbox_id)
        except errors.SandboxNotFoundError:
            return None

    async def _end(self, kernel: Kernel, *, grace: float) -> None:
        kernel.ending = True
        box = self._find(kernel)
        if box is not None:
            await box.end_kernel(grace=grace)

    async def _watch(self, kernel: Kernel, process: KernelProcess, box: LiveSandbox, oom_before: int) -> None:
        """What clients wait for is no longer coming: let go of the guest, and say why it ended."""
        await process.exited.wait()
        expected = kernel.ending
        if kernel.process is not process or self._kernels.get(kernel.request.kernel_id) is not kernel:
            return
        # Nobody knows of its ranks any more. The next kernel would wait for the GPUs that they hold.
        self.spawn(self._service.stop_children(box.info.id, owner="remote"))
        await kernel.proxy.drop_guest()
        if box.info.state in TERMINAL or kernel.process is not process:
            return
        error = box.info.error
        if not expected and process.exit_code:
            why = death(process.exit_code, oom_killed=box.oom_kills() > oom_before, spec=box.spec)
            error = ErrorInfo.from_json(why.to_json())
            log.warning("kernel %s: %s", kernel.request.kernel_id, why)
        box.tell(exit_code=process.exit_code, error=error)

    def _own(self, kernel: Kernel, pid: int) -> None:
        if kernel.owner is not None:
            kernel.owner.close()
        kernel.owner = OwnerWatch(pid, lambda: self._owner_ended(kernel))

    def _owner_ended(self, kernel: Kernel) -> None:
        if not kernel.request.persistent:
            log.info("kernel %s goes: the process that asked for it has ended", kernel.request.kernel_id)
            self.spawn(self.remove(kernel.request.kernel_id))

    def spawn(self, what: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine to its end beside everything else; cancelled when the keeper goes."""
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the keeper failed", exc_info=error)


def _make_directory(directory: Path | None) -> None:
    if directory is None:
        return
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise no_room(directory.parent) from error
        raise errors.InvalidRequestError(
            f"{directory} cannot be made: {error.strerror}", hint="Remove what is there, or use another kernel id."
        ) from error


async def _nothing(box: LiveSandbox) -> None:
    """Nobody wants to know."""
