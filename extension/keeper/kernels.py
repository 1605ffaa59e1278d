"""The kernels of this keeper: each is a proxy that stays, and a sandbox behind it that may change."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.extension.keeper.owners import OwnerWatch
from warmcell.kernel_provisioner.proxy import Connection, KernelProxy
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.lifecycle import TERMINAL
from warmcell.sandbox.live import KernelProcess, LiveSandbox
from warmcell.sandbox.models import GIB, ErrorInfo, SandboxId, SandboxInfo, SandboxSpec, Wire
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
"""From bound sockets to the first answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRequest(Wire):
    """Body of `POST /kernels`."""

    kernel_id: str
    spec: SandboxSpec
    connection: Mapping[str, Any]
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    notebook: str | None = None
    kernel_name: str = ""
    server: str | None = None
    persistent: bool = False


@dataclass
class Kernel:
    """One kernel as its clients know it."""

    request: KernelRequest
    proxy: KernelProxy
    sandbox_id: SandboxId | None = None
    process: KernelProcess | None = None
    owner: OwnerWatch | None = None
    ending: bool = False
    """Its process was told to end, so its end is no failure."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def describe(self) -> dict[str, Any]:
        """A row of `GET /kernels`. It has the key, so it never leaves the keeper's socket."""
        return {
            "kernel_id": self.request.kernel_id,
            "sandbox_id": self.sandbox_id,
            "alive": self.alive,
            "exit_code": self.process.exit_code if self.process is not None else None,
            "connection": dict(self.request.connection),
            "notebook": self.request.notebook,
            "kernel_name": self.request.kernel_name,
            "server": self.request.server,
            "server_alive": self.owner is not None and self.owner.alive,
        }


class Kernels:
    """Starts, ends and removes them. Failures of a start stay visible as a failed sandbox."""

    def __init__(self, service: SandboxService, paths: Paths) -> None:
        self.sandbox_in_use: Callable[[LiveSandbox], None] = lambda box: None
        """Told of a sandbox before a kernel starts in it."""
        self._service = service
        self._paths = paths
        self._kernels: dict[str, Kernel] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def all(self) -> list[Kernel]:
        """All of them."""
        return list(self._kernels.values())

    def get(self, kernel_id: str) -> Kernel:
        """One of them.

        Raises:
            NotFoundError: There is none of that id.
        """
        kernel = self._kernels.get(kernel_id)
        if kernel is None:
            raise errors.NotFoundError(f"There is no kernel {kernel_id}", hint="It has ended, or never was here.")
        return kernel

    async def start(self, request: KernelRequest, *, owner_pid: int) -> SandboxInfo:
        """Start a kernel, or the next generation of one whose process is gone; returns once it has answered.

        Raises:
            WarmcellError: What stood in the way. Of a first start nothing is left then; a kernel that
                had a sandbox keeps it where its shape did not change.
        """
        began = time.perf_counter()
        kernel = self._kernels.get(request.kernel_id)
        if kernel is None:
            kernel = self._kernels[request.kernel_id] = Kernel(request, _proxy(request))
        async with kernel.lock:
            try:
                if kernel.alive:
                    await self._end(kernel, grace=0.0)
                await self._connect_host(kernel, request)
                self._own(kernel, owner_pid)
                sandbox_id = await self._sandbox(kernel, request)
                return await self._start_process(kernel, sandbox_id, began)
            except BaseException as error:
                await self._start_failed(kernel, error)
                raise

    async def end(self, kernel_id: str, *, grace: float) -> None:
        """End its process, by force after `grace` seconds; proxy and sandbox stay for the next generation."""
        await self._end(self.get(kernel_id), grace=grace)

    async def signal(self, kernel_id: str, signum: int) -> None:
        """Send a signal to its process group."""
        kernel = self.get(kernel_id)
        if kernel.sandbox_id is not None and kernel.alive:
            kernel.ending = kernel.ending or signum in (signal.SIGKILL, signal.SIGTERM)
            await self._service.live(kernel.sandbox_id).signal_kernel(signum)

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

    def adopt(self, kernel_id: str, *, server: str, owner_pid: int) -> Kernel:
        """Another server process owns it from now on."""
        kernel = self.get(kernel_id)
        self._own(kernel, owner_pid)
        log.info("kernel %s adopted by process %d for %s", kernel_id, owner_pid, server)
        return kernel

    async def remove(self, kernel_id: str) -> None:
        """Its sandbox, proxy and sockets go. Idempotent."""
        kernel = self._kernels.pop(kernel_id, None)
        if kernel is None:
            return
        kernel.ending = True
        await self._disconnect_host(kernel)
        if kernel.sandbox_id is not None:
            await self._service.stop(kernel.sandbox_id)

    async def forget_sandbox(self, sandbox_id: SandboxId) -> None:
        """Remove the kernel whose sandbox this is, if there is one."""
        for kernel in self.all():
            if kernel.sandbox_id == sandbox_id:
                await self.remove(kernel.request.kernel_id)

    async def close(self) -> None:
        """Remove all."""
        await asyncio.gather(*(self.remove(kernel_id) for kernel_id in list(self._kernels)), return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect_host(self, kernel: Kernel, request: KernelRequest) -> None:
        """Have the host side bound. jupyter_client unlinks its socket files at every restart."""
        directory = self._socket_directory(request)
        if directory is not None:
            directory.mkdir(mode=0o700, exist_ok=True)
        if kernel.process is None and kernel.sandbox_id is None:
            await kernel.proxy.start()
        else:
            await kernel.proxy.rebind(Connection.from_json(request.connection))
        kernel.request = request

    async def _disconnect_host(self, kernel: Kernel) -> None:
        """Nothing of it is left on the host: owner, sockets, and the directory they lay in."""
        if kernel.owner is not None:
            kernel.owner.close()
        await kernel.proxy.close()
        directory = self._socket_directory(kernel.request)
        if directory is not None:
            with contextlib.suppress(OSError):  # the client has removed it, or has put something of its own there
                directory.rmdir()

    def _socket_directory(self, request: KernelRequest) -> Path | None:
        """Where the host side's sockets lie, if that is a directory for this kernel alone in a place of ours."""
        directory = Path(str(request.connection.get("ip", ""))).parent
        ours = request.connection.get("transport") == "ipc" and directory.parent == self._paths.kernels
        return directory if ours else None

    async def _sandbox(self, kernel: Kernel, request: KernelRequest) -> SandboxId:
        """The sandbox for the next process: the one it has where that fits, else a new one."""
        if kernel.sandbox_id is not None:
            spec = await self._service.check(request.spec)
            box = self._service.live(kernel.sandbox_id)
            fits = spec.shape(box.gpus) == box.shape and spec.gpu == box.spec.gpu
            if fits and box.info.state not in TERMINAL:
                box.spec = spec
                return kernel.sandbox_id
            await kernel.proxy.drop_guest()
            await self._service.stop(kernel.sandbox_id)
            kernel.sandbox_id = None
        info = await self._service.create(
            request.spec, owner="notebook", kernel_id=request.kernel_id, notebook=request.notebook
        )
        kernel.sandbox_id = info.id
        return info.id

    async def _start_process(self, kernel: Kernel, sandbox_id: SandboxId, began: float) -> SandboxInfo:
        box = self._service.live(sandbox_id)
        self.sandbox_in_use(box)
        await kernel.proxy.drop_guest()
        kernel.ending = False
        env = {**kernel.request.env, **box.spec.env, **gpu_environment(box.gpus)}
        kernel.process = await self._service.start_kernel(sandbox_id, env=env, cwd=kernel.request.cwd)
        self.spawn(self._watch(kernel, kernel.process, sandbox_id, self._service.live(sandbox_id).oom_kills()))
        await kernel.proxy.connect_guest(str(kernel.process.socket_prefix))
        ready = asyncio.create_task(kernel.proxy.wait_ready(timeout=READY_TIMEOUT_S))
        exited = asyncio.create_task(kernel.process.exited.wait())
        try:
            await asyncio.wait({ready, exited}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise errors.SandboxDiedError(
                    f"The kernel ended while it started, with exit code {kernel.process.exit_code}",
                    hint="Give it more memory, or look at what its preload and start-up files do.",
                    details={"exit_code": kernel.process.exit_code},
                )
            ready.result()
        finally:
            for task in (ready, exited):
                task.cancel()
            await asyncio.gather(ready, exited, return_exceptions=True)
        return self._service.kernel_ready(sandbox_id, started_ms=1000 * (time.perf_counter() - began))

    async def _start_failed(self, kernel: Kernel, error: BaseException) -> None:
        """A first start leaves nothing but the failed sandbox's info; a restart leaves the kernel as it was: dead."""
        if kernel.sandbox_id is not None:
            box = self._service.live(kernel.sandbox_id)
            if isinstance(error, errors.WarmcellError) and box.info.state not in TERMINAL:
                box.tell(error=ErrorInfo.from_json(error.to_json()), phase=None)
            if box.info.generation > 1:
                await self._end(kernel, grace=0.0)
                return
            if isinstance(error, errors.WarmcellError):
                box.fail(error)
        self._kernels.pop(kernel.request.kernel_id, None)
        await self._disconnect_host(kernel)

    async def _end(self, kernel: Kernel, *, grace: float) -> None:
        kernel.ending = True
        if kernel.sandbox_id is not None:
            await self._service.live(kernel.sandbox_id).end_kernel(grace=grace)

    async def _watch(self, kernel: Kernel, process: KernelProcess, sandbox_id: SandboxId, oom_before: int) -> None:
        """What clients wait for is no longer coming: let go of the guest, and say why it ended."""
        await process.exited.wait()
        if kernel.process is not process or self._kernels.get(kernel.request.kernel_id) is not kernel:
            return
        await kernel.proxy.drop_guest()
        try:
            box = self._service.live(sandbox_id)
        except errors.SandboxNotFoundError:
            return
        error = None
        if not kernel.ending and process.exit_code:
            error = ErrorInfo.from_json(_death(process.exit_code, box.oom_kills() > oom_before, box.spec).to_json())
            log.warning("kernel %s: %s", kernel.request.kernel_id, error.message)
        box.tell(exit_code=process.exit_code, error=error or box.info.error)

    def _own(self, kernel: Kernel, pid: int) -> None:
        if kernel.owner is not None:
            kernel.owner.close()
        kernel.owner = OwnerWatch(pid, lambda: self._owner_ended(kernel))

    def _owner_ended(self, kernel: Kernel) -> None:
        if not kernel.request.persistent:
            log.info("kernel %s goes: the process that asked for it has ended", kernel.request.kernel_id)
            self.spawn(self.remove(kernel.request.kernel_id))

    def spawn(self, what: Any) -> None:
        """Run a coroutine to its end beside everything else; cancelled when the keeper goes."""
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _proxy(request: KernelRequest) -> KernelProxy:
    return KernelProxy(Connection.from_json(request.connection), name=request.kernel_id)


def _death(exit_code: int, oom_killed: bool, spec: SandboxSpec) -> errors.SandboxDiedError:
    details = {"exit_code": exit_code, "oom_killed": oom_killed}
    if oom_killed:
        cap = spec.limits.memory_bytes
        of = f" (its cap is {cap / GIB:.1f} GiB)" if cap else ""
        return errors.SandboxDiedError(
            f"The kernel was killed for memory{of}",
            hint="Give the notebook more memory in the Warmcell menu and restart, or load less at a time.",
            details=details,
        )
    name = signal.Signals(exit_code - 128).name if 128 < exit_code < 193 else ""
    return errors.SandboxDiedError(
        f"The kernel ended by itself with exit code {exit_code}" + (f" ({name})" if name else ""),
        hint="Restart it; if it happens again, the last cell's native code is the first suspect.",
        details=details,
    )
