"""`SandboxService`: the one use-case API of the engine. Everything else here is behind it.

It knows protocols only: backends by name, GPU leases, paths. It runs on one asyncio loop, in the
thread that lives as long as its sandboxes (see `SandboxBackend.create`).
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.changes import BACKLOG, Changes, Subscription
from warmcell.sandbox.guest.supervisor.template import read_at_start
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import Frontend, KernelProcess, LiveSandbox
from warmcell.sandbox.memory import Memory
from warmcell.sandbox.models import (
    BackendReport,
    ExecResult,
    GpuDevice,
    SandboxId,
    SandboxInfo,
    SandboxSpec,
    SnapshotId,
    SnapshotInfo,
    SnapshotKind,
    TemplateInfo,
)
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.pool import WarmPool, memory_bytes
from warmcell.sandbox.snapshots.base import SnapshotEngine
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.snapshots.store import SnapshotStore
from warmcell.sandbox.starts import Starts
from warmcell.sandbox.templates import Templates

log = logging.getLogger(__name__)

FAILED_KEPT_S = 600.0
"""How long a sandbox that failed stays listed, so that a page can say why."""

FAILED_KEPT = 50
"""Most of them; the oldest goes first."""

TEMPLATE_TIMEOUT_S = 600.0
"""A prepared sandbox whose imports take longer is given up."""

Result = TypeVar("Result")

SEE_LOG = "keeper.log in the state directory says more."


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
        engine: SnapshotEngine | None = None,
        store: SnapshotStore | None = None,
        prepared_per_template: int = 1,
        prepared_bytes: int = 2 * 2**30,
    ) -> None:
        self.bounds = bounds
        self._backends = backends
        self._default_backend = default_backend
        self._gpus = gpus
        self._paths = paths
        self._boxes: dict[SandboxId, LiveSandbox] = {}
        self._starts = Starts()
        self._pool = WarmPool(
            self._prepare,
            per_template=prepared_per_template,
            cap_bytes=prepared_bytes,
            changed=self._publish,
            quiet=self._starts.quiet,
        )
        self._working: dict[SandboxId, asyncio.Task[Any]] = {}
        """What is being done with a sandbox that `stop` may cut short: its start, or something with its memory."""
        self.memory = Memory(
            engine=engine, store=store or SnapshotStore(paths.snapshots), backend_of=self._backend, paths=paths
        )
        self._templates = Templates(self.memory, self._make_template)
        self.template_front: Callable[[LiveSandbox], Frontend | None] = lambda box: None
        """Makes who has a template settle before it is saved."""
        self._changes = Changes()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

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
        """Whether any sandbox runs that somebody asked for."""
        return any(info.state not in (*TERMINAL, State.SUSPENDED) for info in self.infos())

    async def gpus(self) -> list[dict[str, Any]]:
        """The GPUs of the machine with who holds each."""
        return await self._gpus.status()

    async def templates(self) -> list[TemplateInfo]:
        """The templates in use, by name and interpreter."""
        prepared = self._pool.prepared()
        found: dict[tuple[object, ...], TemplateInfo] = {}
        for box in [*self._boxes.values(), *prepared]:
            if box.info.template is not None and box.info.state not in TERMINAL:
                found[_template(box.spec)] = self._template_info(box)
        used = await asyncio.to_thread(lambda: [memory_bytes(box.processes) for box in prepared])
        for box, size in zip(prepared, used, strict=True):
            if (info := found.get(_template(box.spec))) is not None:
                found[_template(box.spec)] = dataclasses.replace(info, prepared_bytes=info.prepared_bytes + size)
        return list(found.values())

    def subscribe(self, *, backlog: int | None = BACKLOG) -> Subscription:
        """Every change from now on; close it when done.

        Args:
            backlog: Changes that the reader may be behind before it is dropped; None for one of our own.
        """
        return self._changes.subscribe(backlog=backlog)

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
        snapshot: SnapshotId | None = None,
        frontend: Callable[[LiveSandbox], Frontend] | None = None,
    ) -> SandboxInfo:
        """Bring up a sandbox, a prepared one where one of that shape waits.

        A failure stays listed for ten minutes as a sandbox in state `failed`; nothing else of it is left.

        Args:
            spec: What it is to be.
            owner: Who asks for it, as in `SandboxInfo`.
            parent: The sandbox from which it is asked for.
            kernel_id: The kernel that it is for.
            notebook: The notebook that it is for.
            snapshot: It comes with a kernel that goes on from there.
            frontend: Who speaks with that kernel.

        Raises:
            WarmcellError: The spec is out of bounds, no GPU is free, or the backend failed.
        """
        if self._closed or (parent is not None and not self._lives(parent)):
            raise errors.ConflictError("Whoever asks for this sandbox is going away", hint="Start it again later.")
        box = self._new(spec, owner=owner, parent=parent, kernel_id=kernel_id, notebook=notebook)
        box.frontend = frontend(box) if frontend is not None else None
        sandbox_id = box.info.id
        self._boxes[sandbox_id] = box
        self._publish(box)
        work = asyncio.create_task(self._create(box, snapshot))
        self._working[sandbox_id] = work
        self._starts.begin(sandbox_id)
        try:
            return (await work).info
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or not current.cancelling():  # `stop` was faster
                raise errors.ConflictError(
                    f"Sandbox {sandbox_id} was stopped while it came up", hint="Start it again if that was a mistake."
                ) from None
            await self.stop(sandbox_id)  # it may have come up in the moment in which nobody wanted it any more
            raise
        finally:
            self._working.pop(sandbox_id, None)
            self._starts.end(sandbox_id)

    async def refuse(
        self, spec: SandboxSpec, error: errors.WarmcellError, *, owner: str, kernel_id: str, notebook: str | None
    ) -> None:
        """List a sandbox that failed before it was made, so that a page can say why."""
        box = self._new(spec, owner=owner, kernel_id=kernel_id, notebook=notebook)
        self._boxes[box.info.id] = box
        await self._discard(box, error)

    async def fail(self, sandbox_id: SandboxId, error: errors.WarmcellError) -> None:
        """Give up a sandbox that is of no use, as if it had failed to come up."""
        box = self.live(sandbox_id)
        await self._stop_children(sandbox_id)
        await self._discard(box, error)

    async def start_kernel(self, sandbox_id: SandboxId, *, env: Mapping[str, str], cwd: str) -> KernelProcess:
        """Start the next kernel in it.

        Raises:
            WarmcellError: As `LiveSandbox.start_kernel`.
        """
        box = self.live(sandbox_id)
        self._starts.begin(sandbox_id)
        try:
            return await self._kernel_from_template(box) or await box.start_kernel(env=env, cwd=cwd)
        except BaseException:
            self._starts.end(sandbox_id)
            raise

    def restart_follows(self, sandbox_id: SandboxId) -> None:
        """Its kernel has ended and the next one will be asked for: have that come up meanwhile, where it can."""
        self._spawn(self._come_up(self.live(sandbox_id)))

    async def _come_up(self, box: LiveSandbox) -> None:
        with contextlib.suppress(errors.ConflictError):  # it is going away
            await self._kernel_from_template(box)

    async def _kernel_from_template(self, box: LiveSandbox) -> KernelProcess | None:
        """A kernel that waits to be spoken with, and may have waited for long; None where there is none."""
        template = await self._templates.find(box.spec)
        if template is None:
            return None
        try:
            return await self._exclusively(box, self._waiting_kernel(box, template))
        except errors.WarmcellError as error:
            log.warning("sandbox %s: no kernel from the template's snapshot: %s", box.info.id, error)
            return None

    async def _waiting_kernel(self, box: LiveSandbox, template: SnapshotId) -> KernelProcess:
        if box.kernel is not None and box.kernel.alive:
            if box.kernel.token:
                return box.kernel
            raise errors.ConflictError(f"Sandbox {box.info.id} has a kernel", hint="End it first.")
        return await self.memory.restore_into(box, template)

    def kernel_ready(self, sandbox_id: SandboxId, *, started_ms: float) -> SandboxInfo:
        """Told by whoever connected to the kernel once it has answered, `started_ms` after it was asked for.

        From now on its template is seen to, and that a prepared sandbox of its shape is there.

        Raises:
            WarmcellError: The sandbox has ended meanwhile.
        """
        self._starts.end(sandbox_id)
        box = self.live(sandbox_id)
        kernel = box.kernel
        if kernel is None or box.info.state in TERMINAL:
            raise errors.SandboxDiedError(f"Sandbox {sandbox_id} ended as its kernel started", hint="Start it again.")
        box.tell(
            started_from=kernel.started_from,
            started_ms=round(started_ms, 1),
            phase=None,
            error=None,
            previous_error=box.info.error,
        )
        log.info(
            "sandbox %s (%s): kernel %d is ready from %s after %.3f s",
            *(sandbox_id, box.info.backend, kernel.generation, kernel.started_from, started_ms / 1000),
        )
        self._spawn(self._keep_warm(box))
        return box.info

    async def exec(
        self, sandbox_id: SandboxId, argv: Sequence[str], *, env: Mapping[str, str], timeout: float = 60.0
    ) -> ExecResult:
        """Run a process in it to its end."""
        return await self.live(sandbox_id).exec(argv, env=env, timeout=timeout)

    async def give_up_prepared(self) -> bool:
        """Stop all prepared sandboxes, as the machine lacks memory; whether there were any."""
        return await self._pool.shrink()

    # What is done with its memory --------------------------------------------------------------------------------

    async def snapshot(self, sandbox_id: SandboxId, *, name: str = "", kind: SnapshotKind = "named") -> SnapshotInfo:
        """Save its memory and its files; its kernel goes on after a pause.

        Raises:
            UnsupportedOperationError: That cannot be done here; nothing was touched.
            WarmcellError: Nothing was saved, and the kernel goes on as before.
        """
        box = self.live(sandbox_id)
        await self.memory.check(box.spec)
        return await self._exclusively(box, self.memory.save(box, kind=kind, name=name))

    async def suspend(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Save it, end its processes and give its GPUs back; it is listed as before, under its id.

        Raises:
            UnsupportedOperationError: That cannot be done here; nothing was touched.
            WarmcellError: It runs on as before.
        """
        box = self.live(sandbox_id)
        await self.memory.check(box.spec)
        before = box.info.snapshot
        await self._exclusively(box, self.memory.suspend(box))
        self._gpus.release(sandbox_id)
        self._spawn(self.memory.forget_suspended(before))
        return box.info

    async def resume(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Have a suspended sandbox go on where it was. One that runs is as it is.

        Raises:
            WarmcellError: It stays suspended, with its snapshot as it was.
        """
        box = self.live(sandbox_id)
        return await self._exclusively(box, self._resume(box))

    async def reopen(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Have a suspended sandbox up again with its files, without the kernel that it had. One that runs is as it is.

        Raises:
            WarmcellError: It stays suspended.
        """
        box = self.live(sandbox_id)
        return await self._exclusively(box, self._resume(box, with_kernel=False))

    async def restore(self, sandbox_id: SandboxId, ref: str) -> SandboxInfo:
        """Put its kernel back to one of its snapshots, by name or id.

        Raises:
            SnapshotNotFoundError: It has none of that name.
            WarmcellError: Its kernel runs on as it was.
        """
        box = self.live(sandbox_id)
        manifest = self.memory.store.get(ref, kernel_id=box.info.kernel_id)
        snapshot = manifest.info
        if snapshot.kernel_id != box.info.kernel_id:  # It was brought in, and says itself what it had.
            self.bounds.check(manifest.spec)
        await self.memory.check(box.spec)
        before = box.info.snapshot
        await self._exclusively(box, self.memory.undo(box, snapshot.id))
        self._spawn(self.memory.forget_suspended(before))
        return box.info

    def revive(self, manifest: Manifest, frontend: Callable[[LiveSandbox], Frontend]) -> LiveSandbox:
        """A sandbox that was suspended when another keeper went is suspended here."""
        saved = manifest.info
        assert saved.sandbox_id is not None
        box = self._new(manifest.spec, owner="notebook", kernel_id=saved.kernel_id, notebook=saved.notebook)
        box.info = dataclasses.replace(
            box.info,
            id=saved.sandbox_id,
            state=State.SUSPENDED,
            snapshot=saved.id,
            created_at=saved.created_at,
            generation=manifest.guest.generation,
        )
        box.kernel = KernelProcess(
            pid=manifest.guest.pid,
            generation=manifest.guest.generation,
            socket_prefix=box.directory / "run" / manifest.guest.socket_prefix,
            started_from="snapshot",
        )
        box.frontend = frontend(box)
        self._boxes[box.info.id] = box
        self._publish(box)
        self._spawn(self._watch(box))
        return box

    async def _resume(self, box: LiveSandbox, *, with_kernel: bool = True) -> SandboxInfo:
        began = time.perf_counter()
        if box.info.state is not State.SUSPENDED:
            return box.info
        self.bounds.check(box.spec)
        devices: tuple[GpuDevice, ...] = ()
        if box.spec.gpu is not None:
            box.phase("lease")
            devices = await self._gpus.lease(box.spec.gpu, holder=box.info.id)
        try:
            await self.memory.resume(box, devices, began=began, with_kernel=with_kernel)
        except BaseException:
            self._gpus.release(box.info.id)
            raise
        return box.info

    async def _exclusively(self, box: LiveSandbox, what: Coroutine[Any, Any, Result]) -> Result:
        """Do something with a sandbox's memory while nothing else is done with it; `stop` cuts it short."""
        async with box.lock:
            if box.info.state in TERMINAL or box.info.id not in self._boxes:
                what.close()
                raise errors.ConflictError(f"Sandbox {box.info.id} has ended", hint="`warmcell ps` lists what runs.")
            work = asyncio.create_task(what)
            self._working[box.info.id] = work
            try:
                return await work
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is None or not current.cancelling():
                    raise errors.ConflictError(
                        f"Sandbox {box.info.id} was stopped meanwhile", hint="Start it again if that was a mistake."
                    ) from None
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                raise
            finally:
                if self._working.get(box.info.id) is work:
                    del self._working[box.info.id]

    async def stop(self, sandbox_id: SandboxId) -> None:
        """Stop it, and what was made from inside it, also while it comes up. Idempotent: an unknown id is gone.

        Raises:
            OperationTimeoutError: Processes of it do not end. It stays listed, and keeps its GPUs.
        """
        work = self._working.get(sandbox_id)
        if work is not None:
            if not work.cancelling():
                work.cancel()
            await asyncio.wait({work})
        await self._stop_children(sandbox_id)
        box = self._boxes.get(sandbox_id)
        if box is not None:
            await self._remove(box)

    async def close(self) -> None:
        """Stop everything; what is suspended stays on disk. The service is of no use afterwards."""
        self._closed = True
        for box in [box for box in self._boxes.values() if box.info.state is State.SUSPENDED]:
            del self._boxes[box.info.id]
        ends = await asyncio.gather(*(self.stop(one) for one in list(self._boxes)), return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.close()
        await self.memory.close()
        self._changes.close()
        for end in ends:
            if isinstance(end, BaseException):
                log.error("a sandbox was not stopped: %s", end)

    # Behind it -------------------------------------------------------------------------------------------------

    async def _create(self, box: LiveSandbox, snapshot: SnapshotId | None) -> LiveSandbox:
        """What `create` does, as a task that `stop` can cancel."""
        began = time.perf_counter()
        try:
            spec = box.spec = await self.check(box.spec)
            self._check_room()
            devices: tuple[GpuDevice, ...] = ()
            if spec.gpu is not None:
                box.phase("lease")
                devices = await self._gpus.lease(spec.gpu, holder=box.info.id)
            prepared = await self._take(spec, devices) if snapshot is None else None
            if snapshot is not None:
                await self.memory.clone(box, snapshot, devices)
            elif prepared is not None:
                box = self._adopt(prepared, box, devices, queue_ms=1000 * (time.perf_counter() - began))
            elif not await self._from_template(box, devices):
                await self._bring_up(box, devices)
        except BaseException as error:
            await self._discard(box, error)
            raise
        self._spawn(self._watch(box))
        return box

    async def _take(self, spec: SandboxSpec, devices: tuple[GpuDevice, ...]) -> LiveSandbox | None:
        """A prepared sandbox, unless its environment has changed since."""
        while (prepared := self._pool.take(spec.shape(devices))) is not None:
            if prepared.info.snapshot is None or prepared.info.snapshot == await self._templates.find(spec):
                return prepared
            log.info("prepared sandbox %s goes: its environment has changed", prepared.info.id)
            self._spawn(prepared.stop())
        return None

    async def _bring_up(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> None:
        """From nothing, such that its kernels can be saved where this machine can do that."""
        box.directory.mkdir(mode=0o700)
        await box.bring_up(self._backend(box.spec), devices)
        await self.memory.enroll(box)

    def _check_room(self) -> None:
        live = sum(box.info.state not in (*TERMINAL, State.SUSPENDED) for box in self._boxes.values()) - 1
        if live >= self.bounds.max_sandboxes:
            raise errors.CapacityError(
                f"There are {live} sandboxes already", hint="Stop one, or raise c.Warmcell.max_sandboxes."
            )

    def _lives(self, sandbox_id: SandboxId) -> bool:
        box = self._boxes.get(sandbox_id)
        return box is not None and box.info.state is State.RUNNING

    async def _stop_children(self, sandbox_id: SandboxId) -> None:
        children = [info.id for info in self.infos() if info.parent == sandbox_id]
        await asyncio.gather(*(self.stop(child) for child in children))

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
            id=new_sandbox_id(),
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
        try:
            if not await self._from_template(box, ()):
                await self._bring_up_prepared(box)
        except BaseException:
            await box.stop()
            raise
        return box

    async def _from_template(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> bool:
        """Bring it up with a kernel from its template's snapshot; whether that could be done."""
        template = await self._templates.find(box.spec)
        if template is None:
            return False
        try:
            await self.memory.clone(box, template, devices)
        except errors.WarmcellError as error:
            log.warning("sandbox %s does not come from its template's snapshot: %s", box.info.id, error)
            await box.discard()
            box.kernel = None
            return False
        box.tell(template=self._templates.status(template))
        return True

    async def _make_template(self, spec: SandboxSpec, identity: Mapping[str, str]) -> SnapshotId:
        """A kernel that has imported what it is to import, saved before anybody uses it."""
        box = self._new(dataclasses.replace(spec, gpu=None), owner="pool")
        await self._bring_up_prepared(box)
        try:
            await box.start_kernel(env=read_at_start(spec.env), cwd="")
            box.frontend = self.template_front(box)
            return (await self.memory.save(box, kind="template", environment=identity)).id
        finally:
            await box.stop()

    async def _bring_up_prepared(self, box: LiveSandbox) -> None:
        """With a fork server that has imported what it is to import."""
        try:
            await self._bring_up(box, ())
            await box.prepare()
            async with asyncio.timeout(TEMPLATE_TIMEOUT_S):
                await box.wait_template()
        except TimeoutError as error:
            await box.stop()
            raise errors.OperationTimeoutError(
                f"Template {box.spec.template} was not imported within {TEMPLATE_TIMEOUT_S:.0f} s",
                hint="Take the module that hangs out of the kernelspec's preload list.",
                details={"operation": "prepare", "timeout": TEMPLATE_TIMEOUT_S},
            ) from error
        except Exception as error:
            await box.stop()
            if isinstance(error, errors.WarmcellError):
                raise
            log.exception("preparing sandbox %s failed", box.info.id)
            raise errors.SandboxStartError(f"{type(error).__name__}: {error}", hint=SEE_LOG) from error
        except BaseException:
            await box.stop()
            raise

    def _adopt(
        self, prepared: LiveSandbox, asked: LiveSandbox, devices: tuple[GpuDevice, ...], *, queue_ms: float
    ) -> LiveSandbox:
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
            phases_ms={"queue": round(queue_ms, 1), "pool": 0.0},
        )
        return prepared

    async def _keep_warm(self, box: LiveSandbox) -> None:
        """Have the next start and the next sandbox of this shape be instant; imports happen one after another."""
        template: SnapshotId | None = None
        try:
            template = await self._templates.ensure(box.spec)
            if template is not None:
                box.tell(template=self._templates.status(template))
                known = {info.id for info in self.memory.store.infos(kind="template")}
                other = _template(box.spec)
                await self._pool.renew(
                    lambda one: (
                        one.info.snapshot in known or (one.info.snapshot is None and _template(one.spec) != other)
                    )
                )
            else:
                if box.info.template is None:
                    await box.prepare()
                await box.wait_template()
        except errors.WarmcellError as error:  # it has ended meanwhile; there may be another of its shape soon
            log.debug("sandbox %s was not prepared for a restart: %s", box.info.id, error)
        failed = box.info.template is not None and box.info.template.state == "failed"
        if not failed and not any(gpu.device_nodes for gpu in box.gpus):
            self._pool.want(dataclasses.replace(box.spec, gpu=None), cheap=template is not None)

    async def _watch(self, box: LiveSandbox) -> None:
        """Release what a sandbox held, and what was made from inside it, when it ends by itself."""
        await box.ended.wait()
        if box.info.state is State.FAILED and self._boxes.get(box.info.id) is box:
            log.warning("sandbox %s failed: %s", box.info.id, box.info.error and box.info.error.message)
            await self._stop_children(box.info.id)
            await self._discard(box, None)

    async def _discard(self, box: LiveSandbox, error: BaseException | None) -> None:
        """Remove what a failed sandbox left; its info stays for a while, unless nobody wanted it any more."""
        if isinstance(error, errors.WarmcellError):
            box.fail(error)
        elif isinstance(error, Exception):
            log.error("creating sandbox %s failed", box.info.id, exc_info=error)
            box.fail(errors.SandboxStartError(f"{type(error).__name__}: {error}", hint=SEE_LOG))
        try:
            await box.stop()
        except errors.WarmcellError:  # it may still use its GPUs; `stop` tries again
            log.exception("sandbox %s could not be removed", box.info.id)
            return
        self._gpus.release(box.info.id)
        if box.info.state is not State.FAILED:
            self._boxes.pop(box.info.id, None)
            return
        asyncio.get_running_loop().call_later(FAILED_KEPT_S, self._forget_failed, box)
        failed = [one for one in self._boxes.values() if one.info.state is State.FAILED]
        for oldest in sorted(failed, key=lambda one: one.info.created_at)[:-FAILED_KEPT]:
            self._forget_failed(oldest)

    def _forget_failed(self, box: LiveSandbox) -> None:
        if self._boxes.get(box.info.id) is box:
            del self._boxes[box.info.id]

    async def _remove(self, box: LiveSandbox) -> None:
        await box.stop()
        await self.memory.forget_suspended(box.info.snapshot)
        self._gpus.release(box.info.id)
        if self._boxes.get(box.info.id) is box:
            del self._boxes[box.info.id]

    def _spawn(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the service failed", exc_info=error)

    def _publish(self, box: LiveSandbox) -> None:
        if box.info.owner != "pool":
            self._changes.publish(box.info)
        elif box.info.template is not None:
            self._changes.publish(self._template_info(box))

    def _template_info(self, box: LiveSandbox) -> TemplateInfo:
        """What is told of the template of this sandbox, the memory of prepared ones apart."""
        assert box.info.template is not None
        key = _template(box.spec)
        return TemplateInfo(
            name=box.spec.template,
            python=box.spec.python,
            preload=box.spec.preload,
            status=box.info.template,
            prepared=sum(_template(one.spec) == key for one in self._pool.prepared()),
            prepared_bytes=0,
        )


def _template(spec: SandboxSpec) -> tuple[object, ...]:
    """What makes two templates the same."""
    return (spec.template, spec.python, spec.preload)
