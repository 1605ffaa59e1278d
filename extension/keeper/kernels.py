"""The kernels of this keeper: each is a proxy that stays, and a sandbox behind it that may change."""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.extension.keeper.death import death, unless_dead
from warmcell.extension.keeper.ledger import KernelNote, Ledger, SessionNote
from warmcell.extension.keeper.owners import OwnerWatch
from warmcell.kernel_provisioner.proxy import Connection, KernelProxy
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.kernel import Frontend, KernelProcess
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import ErrorInfo, SandboxId, SandboxInfo, SandboxSpec, Wire
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
    listens: bool = False
    """Whether its proxy's host side was bound."""
    started: bool = False
    """Whether a process of it has ever answered."""
    ending: bool = False
    """Its process was told to end, so its end is no failure."""
    asks: str = ""
    """Token of the wish that its cell waits for, while that is done."""
    waking: bool = False
    """Something that a client wants of it has it resumed now."""
    restore_asked_by: str = ""
    """msg_id of the cell that asks to be undone, for as long as that is done."""
    sessions: tuple[SessionNote, ...] = ()
    """What its Jupyter server has open on it."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by a start and by its removal."""

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
            "busy": self.proxy.busy,
            "cwd": self.request.cwd,
            "session_name": self.request.env.get("JPY_SESSION_NAME"),
            "sessions": [session.to_json() for session in self.sessions],
        }

    def note(self) -> KernelNote:
        """What a keeper that comes later has to know."""
        return KernelNote(
            kernel_id=self.request.kernel_id,
            server=self.request.server,
            notebook=self.request.notebook,
            session_name=self.request.env.get("JPY_SESSION_NAME"),
            kernel_name=self.request.kernel_name,
            sessions=self.sessions,
        )

    def call(self, *, notebook: str | None, session_name: str | None) -> None:
        """Its notebook has this path now, and its code sees that from its next start or resume on."""
        env = dict(self.request.env)
        if session_name is not None:
            env["JPY_SESSION_NAME"] = session_name
        self.request = dataclasses.replace(self.request, notebook=notebook, env=env)


class Kernels:
    """Starts, ends and removes them. Failures of a start stay visible as a failed sandbox."""

    def __init__(self, service: SandboxService, paths: Paths) -> None:
        self.sandbox_in_use: Callable[[LiveSandbox], None] = lambda box: None
        """Told of a sandbox before a kernel starts in it."""
        self.sandbox_renewed: Callable[[LiveSandbox], Awaitable[None]] = _nothing
        """Told of a sandbox that a kernel goes on in, before it does."""
        self.front_of: Callable[[Kernel, LiveSandbox], Frontend | None] = lambda kernel, box: None
        """Makes who speaks with a kernel when its memory is saved or brought back."""
        self.ledger = Ledger(paths.ledger)
        self._service = service
        self._paths = paths
        self._kernels: dict[str, Kernel] = {}
        self._starts: dict[str, set[asyncio.Task[SandboxInfo]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

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
        if self._closed:
            raise errors.ConflictError("The keeper is going away", hint="Start the kernel again in a moment.")
        starts = self._starts.setdefault(request.kernel_id, set())
        task = asyncio.create_task(self._start(request, owner_pid))
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
            kernel.sessions = note.sessions
            kernel.call(notebook=note.notebook, session_name=note.session_name)
            box = self._find(kernel)
            if box is not None:
                box.tell(notebook=note.notebook)
        self.note(kernel)

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
        await self._end(kernel, grace=grace)
        box = self._find(kernel)
        if restart and box is not None and box.info.state is State.RUNNING:
            self._service.restart_follows(box.info.id)

    async def signal(self, kernel_id: str, signum: int) -> None:
        """Send a signal to its process group."""
        kernel = self.get(kernel_id)
        box = self._find(kernel)
        if box is not None and kernel.alive:
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
        self.note(kernel)
        log.info("kernel %s adopted by process %d for %s", kernel_id, owner_pid, server)
        return kernel

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

    def note(self, kernel: Kernel) -> None:
        """Have a keeper that comes after this one know of it, if it is to outlive whoever asked for it."""
        if kernel.request.persistent:
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
        async with kernel.lock:
            if self._kernels.get(kernel_id) is kernel:
                await self._remove(kernel)

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

    async def _start(self, request: KernelRequest, owner_pid: int) -> SandboxInfo:
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
                    await self._connect_host(kernel, request)
                    self._own(kernel, owner_pid)
                    sandbox_id = await self._sandbox(kernel, request)
                    return await self._start_process(kernel, sandbox_id, began)
                except BaseException as error:
                    await self._start_failed(kernel, error)
                    raise

    async def _proxy(self, request: KernelRequest) -> KernelProxy:
        try:
            return KernelProxy(Connection.from_json(request.connection), name=request.kernel_id)
        except errors.WarmcellError as error:
            await self._refuse(request, error)
            raise

    async def _refuse(self, request: KernelRequest, error: errors.WarmcellError) -> None:
        """Let a page see why, although there was never a sandbox."""
        await self._service.refuse(
            request.spec, error, owner="notebook", kernel_id=request.kernel_id, notebook=request.notebook
        )

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

    async def _sandbox(self, kernel: Kernel, request: KernelRequest) -> SandboxId:
        """The sandbox for the next process: the one it has where that fits, else a new one."""
        died = self.ledger.loss(request.kernel_id, request.server, request.notebook)
        if kernel.sandbox_id is not None:
            spec = await self._service.check(request.spec)
            box = self._find(kernel)
            if box is not None:
                fits = spec.shape(box.gpus) == box.shape and spec.gpu == box.spec.gpu
                if fits and box.info.state in (State.RUNNING, State.SUSPENDED):
                    box.spec = spec
                    await self._service.reopen(box.info.id)
                    return box.info.id
                died = box.info.error
            await kernel.proxy.drop_guest()
            await self._service.stop(kernel.sandbox_id)
            kernel.sandbox_id = None
        info = await self._service.create(
            request.spec, owner="notebook", kernel_id=request.kernel_id, notebook=request.notebook
        )
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
        env = {**kernel.request.env, **box.spec.env, **gpu_environment(box.gpus)}
        oom_before = box.oom_kills()
        process = kernel.process = await self._service.start_kernel(sandbox_id, env=env, cwd=kernel.request.cwd)
        box.frontend = self.front_of(kernel, box)
        self.spawn(self._watch(kernel, process, box, oom_before))
        if process.token:  # It has been up for a while, and waits for somebody to become.
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
        info = self._service.kernel_ready(sandbox_id, started_ms=1000 * (time.perf_counter() - began))
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
        raise errors.InvalidRequestError(
            f"{directory} cannot be made: {error.strerror}", hint="Remove what is there, or use another kernel id."
        ) from error


async def _nothing(box: LiveSandbox) -> None:
    """Nobody wants to know."""
