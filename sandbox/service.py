"""`SandboxService`: the one use-case API of the engine. Everything else here is behind it.

It knows protocols only: backends by name, GPU leases, paths. It runs on one asyncio loop, in the
thread that lives as long as its sandboxes (see `SandboxBackend.create`).
"""

import asyncio
import dataclasses
import logging
import secrets
import string
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import KernelProcess, LiveSandbox
from warmcell.sandbox.models import (
    BackendReport,
    ExecResult,
    GpuDevice,
    SandboxId,
    SandboxInfo,
    SandboxSpec,
    TemplateInfo,
)
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.pool import WarmPool, memory_bytes

log = logging.getLogger(__name__)

FAILED_KEPT_S = 600.0
"""How long a sandbox that failed stays listed, so that a page can say why."""

TEMPLATE_TIMEOUT_S = 600.0
"""A prepared sandbox whose imports take longer is given up."""

SUBSCRIBER_BACKLOG = 1000
"""Changes that a slow subscriber may be behind before it is dropped."""

Change = SandboxInfo | TemplateInfo


class Subscription:
    """The changes that one reader has not seen yet. One that falls too far behind is ended, not waited for."""

    def __init__(self, forget: Callable[["Subscription"], None]) -> None:
        self._queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self._forget = forget
        self.ended = False

    async def next(self, *, timeout: float | None = None) -> Change | None:
        """The next change, or None after `timeout` seconds without one or at the end; see `ended`."""
        if self.ended and self._queue.empty():
            return None
        try:
            async with asyncio.timeout(timeout):
                return await self._queue.get()
        except TimeoutError:
            return None

    def put(self, change: Change) -> None:
        """Hand it a change."""
        if self._queue.qsize() >= SUBSCRIBER_BACKLOG:
            self.close()
        elif not self.ended:
            self._queue.put_nowait(change)

    def close(self) -> None:
        """Take no more changes and wake the reader. Idempotent."""
        if not self.ended:
            self.ended = True
            self._queue.put_nowait(None)
            self._forget(self)


class GpuLeases(Protocol):
    """Who has which GPU; `sandbox.gpus.pool.GpuPool` is the real one."""

    async def lease(self, request: str | tuple[str, ...], *, holder: SandboxId) -> tuple[GpuDevice, ...]: ...
    async def check(self, request: str | tuple[str, ...]) -> None: ...
    def release(self, holder: SandboxId) -> None: ...
    async def status(self) -> list[dict[str, Any]]: ...


class SandboxService:
    """Creates, starts kernels in, watches and stops the sandboxes of one keeper."""

    def __init__(
        self,
        *,
        backends: Mapping[str, SandboxBackend],
        default_backend: str,
        gpus: GpuLeases,
        paths: Paths,
        bounds: Bounds,
        prepared_per_template: int = 1,
        prepared_bytes: int = 2 * 2**30,
    ) -> None:
        self.bounds = bounds
        self._backends = backends
        self._default_backend = default_backend
        self._gpus = gpus
        self._paths = paths
        self._boxes: dict[SandboxId, LiveSandbox] = {}
        self._pool = WarmPool(self._prepare, per_template=prepared_per_template, cap_bytes=prepared_bytes)
        self._subscribers: set[Subscription] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # What there is ---------------------------------------------------------------------------------------------

    def infos(self) -> list[SandboxInfo]:
        """All sandboxes but the prepared ones, oldest first."""
        return sorted((box.info for box in self._boxes.values()), key=lambda info: info.created_at)

    def info(self, sandbox_id: SandboxId) -> SandboxInfo:
        """One of them.

        Raises:
            SandboxNotFoundError: There is none of that id.
        """
        return self.live(sandbox_id).info

    def live(self, sandbox_id: SandboxId) -> LiveSandbox:
        """The sandbox itself, for those who attach sockets to it; raises as `info`."""
        box = self._boxes.get(sandbox_id)
        if box is None:
            raise errors.SandboxNotFoundError(
                f"There is no sandbox {sandbox_id}", hint="`warmcell ps` lists those that exist."
            )
        return box

    @property
    def busy(self) -> bool:
        """Whether any sandbox is alive that somebody asked for."""
        return any(info.state not in TERMINAL for info in self.infos())

    async def gpus(self) -> list[dict[str, Any]]:
        """The GPUs of the machine with who holds each."""
        return await self._gpus.status()

    async def templates(self) -> list[TemplateInfo]:
        """The templates in use, by name and interpreter."""
        return await asyncio.to_thread(self._templates)

    def _templates(self) -> list[TemplateInfo]:
        prepared = self._pool.prepared()
        found: dict[tuple[object, ...], TemplateInfo] = {}
        for box in [*self._boxes.values(), *prepared]:
            if box.info.template is None or box.info.state in TERMINAL:
                continue
            key = (box.spec.template, box.spec.python, box.spec.preload)
            waiting = [one for one in prepared if (one.spec.template, one.spec.python, one.spec.preload) == key]
            found[key] = TemplateInfo(
                name=box.spec.template,
                python=box.spec.python,
                preload=box.spec.preload,
                status=box.info.template,
                prepared=len(waiting),
                prepared_bytes=sum(memory_bytes(one.processes) for one in waiting),
            )
        return list(found.values())

    def subscribe(self) -> Subscription:
        """Every change from now on; close it when done."""
        subscription = Subscription(self._subscribers.discard)
        self._subscribers.add(subscription)
        return subscription

    async def probe(self) -> Sequence[BackendReport]:
        """What each backend can do here, tried for real."""
        return await asyncio.gather(*(backend.probe() for backend in self._backends.values()))

    # What is done ----------------------------------------------------------------------------------------------

    async def check(self, spec: SandboxSpec) -> SandboxSpec:
        """The spec as it would be made; makes nothing.

        Raises:
            WarmcellError: The one that `create` would give, busy GPUs apart.
        """
        spec = self.bounds.check(spec)
        self._backend(spec)
        if spec.gpu is not None:
            await self._gpus.check(spec.gpu)
        return spec

    async def create(
        self,
        spec: SandboxSpec,
        *,
        owner: str,
        parent: SandboxId | None = None,
        kernel_id: str | None = None,
        notebook: str | None = None,
    ) -> SandboxInfo:
        """Bring up a sandbox, a prepared one where one of that shape waits.

        A failure stays listed for ten minutes as a sandbox in state `failed`; nothing else of it is left.

        Raises:
            WarmcellError: The spec is out of bounds, no GPU is free, or the backend failed.
        """
        box = self._new(spec, owner=owner, parent=parent, kernel_id=kernel_id, notebook=notebook)
        self._boxes[box.info.id] = box
        self._publish(box)
        try:
            spec = box.spec = await self.check(spec)
            live = sum(other.info.state not in TERMINAL for other in self._boxes.values())
            if live > self.bounds.max_sandboxes:
                raise errors.CapacityError(
                    f"There are {live - 1} sandboxes already", hint="Stop one, or raise c.Warmcell.max_sandboxes."
                )
            devices: tuple[GpuDevice, ...] = ()
            if spec.gpu is not None:
                box.phase("lease")
                devices = await self._gpus.lease(spec.gpu, holder=box.info.id)
            prepared = self._pool.take(spec.shape(devices))
            if prepared is not None:
                box = self._adopt(prepared, box, devices)
            else:
                box.directory.mkdir(mode=0o700)
                await box.bring_up(self._backend(spec), devices)
        except BaseException as error:
            await self._discard(box, error)
            raise
        self._spawn(self._watch(box))
        return box.info

    async def start_kernel(self, sandbox_id: SandboxId, *, env: Mapping[str, str], cwd: str) -> KernelProcess:
        """Start the next kernel in it; afterwards see that its template, and a prepared sandbox, are there.

        Raises:
            WarmcellError: As `LiveSandbox.start_kernel`.
        """
        box = self.live(sandbox_id)
        template = box.info.template
        detail = f"importing {template.importing}" if template is not None and template.state == "importing" else ""
        box.phase("kernel", detail)
        return await box.start_kernel(env=env, cwd=cwd)

    def kernel_ready(self, sandbox_id: SandboxId, *, started_ms: float) -> SandboxInfo:
        """Told by whoever connected to the kernel once it has answered, `started_ms` after it was asked for."""
        box = self.live(sandbox_id)
        assert box.kernel is not None
        box.tell(
            started_from=box.kernel.started_from,
            started_ms=round(started_ms, 1),
            phase=None,
            error=None,
            previous_error=box.info.error,
        )
        log.info("kernel of %s ready from %s in %.0f ms", sandbox_id, box.kernel.started_from, started_ms)
        self._spawn(self._keep_warm(box))
        return box.info

    async def exec(
        self, sandbox_id: SandboxId, argv: Sequence[str], *, env: Mapping[str, str], timeout: float = 60.0
    ) -> ExecResult:
        """Run a process in it to its end."""
        return await self.live(sandbox_id).exec(argv, env=env, timeout=timeout)

    async def stop(self, sandbox_id: SandboxId) -> None:
        """Stop it, and what was made from inside it. Idempotent: an unknown id is one that is gone."""
        box = self._boxes.get(sandbox_id)
        if box is None:
            return
        children = [info.id for info in self.infos() if info.parent == sandbox_id]
        await asyncio.gather(*(self.stop(child) for child in children))
        await self._remove(box)

    async def close(self) -> None:
        """Stop everything. The service is of no use afterwards."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.close()
        await asyncio.gather(*(self._remove(box) for box in list(self._boxes.values())), return_exceptions=True)
        for subscription in list(self._subscribers):
            subscription.close()

    # Behind it -------------------------------------------------------------------------------------------------

    def _backend(self, spec: SandboxSpec) -> SandboxBackend:
        name = self._default_backend if spec.backend == "auto" else spec.backend
        backend = self._backends.get(name)
        if backend is None:
            raise errors.InvalidRequestError(
                f"There is no backend {name!r} here", hint=f"Use one of {', '.join(sorted(self._backends))}."
            )
        if spec.network not in backend.capabilities.networks:
            raise errors.UnsupportedOperationError(
                f"The {name} backend has no network {spec.network!r}",
                hint=f"Ask for {' or '.join(backend.capabilities.networks)} in the kernelspec or the Warmcell menu.",
            )
        return backend

    def _new(
        self,
        spec: SandboxSpec,
        *,
        owner: str,
        parent: SandboxId | None = None,
        kernel_id: str | None = None,
        notebook: str | None = None,
    ) -> LiveSandbox:
        backend = self._backends.get(self._default_backend if spec.backend == "auto" else spec.backend)
        info = SandboxInfo(
            id=_new_id(),
            state=State.CREATING,
            backend=backend.name if backend is not None else spec.backend,
            isolated=backend.capabilities.isolated if backend is not None else True,
            owner=owner,
            parent=parent,
            kernel_id=kernel_id,
            notebook=notebook,
            python=spec.python,
            workspace=spec.workspace,
            network=spec.network,
            gpu=spec.gpu,
            created_at=time.time(),
        )
        return LiveSandbox(info, spec, self._paths.sandboxes / info.id, self._publish)

    async def _prepare(self, spec: SandboxSpec) -> LiveSandbox:
        """A sandbox for the pool: up, and its template settled."""
        box = self._new(dataclasses.replace(spec, gpu=None), owner="pool")
        box.directory.mkdir(mode=0o700)
        try:
            await box.bring_up(self._backend(spec), ())
            await box.prepare()
            async with asyncio.timeout(TEMPLATE_TIMEOUT_S):
                await box.template_settled.wait()
        except BaseException:
            await box.stop()
            raise
        return box

    def _adopt(self, prepared: LiveSandbox, asked: LiveSandbox, devices: tuple[GpuDevice, ...]) -> LiveSandbox:
        """The prepared sandbox becomes the one that was asked for, under the id that is already known."""
        prepared.gpus = devices
        prepared.spec = asked.spec
        self._boxes[asked.info.id] = prepared
        prepared.tell(
            id=asked.info.id,
            owner=asked.info.owner,
            parent=asked.info.parent,
            kernel_id=asked.info.kernel_id,
            notebook=asked.info.notebook,
            gpu=asked.info.gpu,
            gpus=devices,
            created_at=asked.info.created_at,
        )
        return prepared

    async def _keep_warm(self, box: LiveSandbox) -> None:
        """Have the next start and the next sandbox of this shape be instant; imports happen one after another."""
        try:
            if box.info.template is None:
                await box.prepare()
            await box.template_settled.wait()
        except errors.WarmcellError as error:  # it has ended meanwhile; there may be another of its shape soon
            log.debug("sandbox %s was not prepared for a restart: %s", box.info.id, error)
        failed = box.info.template is not None and box.info.template.state == "failed"
        if not failed and not any(gpu.device_nodes for gpu in box.gpus):
            self._pool.want(dataclasses.replace(box.spec, gpu=None))

    async def _watch(self, box: LiveSandbox) -> None:
        """Release what a sandbox held when it ends by itself."""
        await box.ended.wait()
        if box.info.state is State.FAILED:
            log.warning("sandbox %s failed: %s", box.info.id, box.info.error and box.info.error.message)
            await self._discard(box, None)

    async def _discard(self, box: LiveSandbox, error: BaseException | None) -> None:
        """Remove what a failed sandbox left; its info stays for a while, unless nobody wanted it any more."""
        if isinstance(error, errors.WarmcellError):
            box.fail(error)
        elif isinstance(error, Exception):
            log.exception("creating sandbox %s failed", box.info.id, exc_info=error)
            box.fail(errors.SandboxStartError(f"{type(error).__name__}: {error}", hint="keeper.log says more."))
        await box.stop()
        self._gpus.release(box.info.id)
        if box.info.state is State.FAILED:
            loop = asyncio.get_running_loop()
            loop.call_later(FAILED_KEPT_S, self._boxes.pop, box.info.id, None)
        else:
            self._boxes.pop(box.info.id, None)

    async def _remove(self, box: LiveSandbox) -> None:
        await box.stop()
        self._gpus.release(box.info.id)
        self._boxes.pop(box.info.id, None)

    def _spawn(self, what: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _publish(self, box: LiveSandbox) -> None:
        change: Change = box.info
        if box.info.owner == "pool":
            if box.info.template is None:
                return
            change = TemplateInfo(
                name=box.spec.template,
                python=box.spec.python,
                preload=box.spec.preload,
                status=box.info.template,
                prepared=0,
                prepared_bytes=0,
            )
        for subscription in list(self._subscribers):
            subscription.put(change)


def _new_id() -> SandboxId:
    alphabet = string.ascii_lowercase + string.digits
    return SandboxId("".join(secrets.choice(alphabet) for _ in range(12)))
