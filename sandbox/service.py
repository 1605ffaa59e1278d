"""`SandboxService`: the one use-case API of the engine. Everything else here is behind it.

It knows protocols only: backends by name, GPU leases, paths. It runs on one asyncio loop, in the
thread that lives as long as its sandboxes (see `SandboxBackend.create`).
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.choosing import Choice, explain
from warmcell.sandbox.coming import Coming
from warmcell.sandbox.gpus.base import GpuLeases
from warmcell.sandbox.gpus.parking import ParkingPlace
from warmcell.sandbox.kernel import Frontend, KernelProcess
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import ExecResult, SandboxId, SandboxInfo, SandboxSpec, SnapshotId, Terms
from warmcell.sandbox.moving import Moving
from warmcell.sandbox.network.egress import Egress
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.preparing import Preparing
from warmcell.sandbox.snapshots.base import SnapshotEngine
from warmcell.sandbox.snapshots.store import SnapshotStore

log = logging.getLogger(__name__)


class SandboxService(Preparing, Moving):
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
        engines: Sequence[SnapshotEngine] = (),
        store: SnapshotStore | None = None,
        prepared_per_template: int = 1,
        prepared_bytes: int = 2 * 2**30,
        gpu_wait_s: float | None = 0.0,
        egress: Egress | None = None,
        parking: ParkingPlace | None = None,
    ) -> None:
        super().__init__(
            backends=backends,
            default_backend=default_backend,
            gpus=gpus,
            paths=paths,
            bounds=bounds,
            engine=engine,
            engines=engines,
            store=store,
            prepared_per_template=prepared_per_template,
            prepared_bytes=prepared_bytes,
            gpu_wait_s=gpu_wait_s,
            egress=egress,
            parking=parking,
        )
        self._closed = False

    async def create(
        self,
        spec: SandboxSpec,
        *,
        owner: str,
        principal: str | None = None,
        terms: Terms | None = None,
        parent: SandboxId | None = None,
        kernel_id: str | None = None,
        notebook: str | None = None,
        snapshot: SnapshotId | Coming | None = None,
        frontend: Callable[[LiveSandbox], Frontend] | None = None,
        gpus_of: SandboxId | None = None,
        without_kernel: bool = False,
        hurry: bool = False,
    ) -> SandboxInfo:
        """Bring up a sandbox, a prepared one where one of that shape waits.

        A failure stays listed for ten minutes as a sandbox in state `failed`; nothing else of it is left.

        Args:
            spec: What it is to be.
            owner: Who asks for it, as in `SandboxInfo`.
            principal: Whose it is, as in `SandboxInfo`. None: that of `parent`, if there is one.
            terms: For how long it is kept, as in `SandboxInfo`; whoever asks sees to that.
            parent: The sandbox from which it is asked for.
            kernel_id: The kernel that it is for.
            notebook: The notebook that it is for.
            snapshot: It comes with a kernel that goes on from there. Its files may be there before its memory is.
            frontend: Who speaks with that kernel.
            gpus_of: It takes over the GPUs of that one, which was stopped with `keep_gpus`, where they will do.
            without_kernel: It need not come with the kernel that `start_kernel` would give it.
            hurry: It does not wait for GPUs.

        Raises:
            WarmcellError: The spec is out of bounds, no GPU is free in time, or the backend failed.
        """
        if self._closed or (parent is not None and not self._lives(parent)):
            raise errors.ConflictError("Whoever asks for this sandbox is going away", hint="Start it again later.")
        box = self._new(spec, owner=owner, principal=principal, parent=parent, kernel_id=kernel_id, notebook=notebook)
        box.info = dataclasses.replace(box.info, terms=terms)
        box.frontend = frontend(box) if frontend is not None else None
        box.idle = self._nobody_waits
        sandbox_id = box.info.id
        self._forget_failures_of(notebook)
        self._boxes[sandbox_id] = box
        if hurry:
            self._hurried.add(sandbox_id)
        if gpus_of is not None:
            self._gpus.move(gpus_of, sandbox_id)
        self._publish(box)
        work = asyncio.create_task(self._create(box, snapshot, without_kernel=without_kernel))
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
            self._hurried.discard(sandbox_id)
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
        await self.stop_children(sandbox_id)
        await self._discard(box, error)

    async def start_kernel(self, sandbox_id: SandboxId, *, env: Mapping[str, str], cwd: str) -> KernelProcess:
        """Start the next kernel in it.

        Raises:
            WarmcellError: As `LiveSandbox.start_kernel`.
        """
        box = self.live(sandbox_id)
        if box.awaited:
            self._starts.begin(sandbox_id)
        try:
            kernel = await self._kernel_from_template(box)
            if kernel is None:
                async with self._turn(box) as waited_ms:
                    box.waited(waited_ms)
                    kernel = await box.start_kernel(env=env, cwd=cwd)
            return kernel
        except BaseException:
            self._starts.end(sandbox_id)
            raise

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
        await self.shared.close()
        await self.admission.choosing.close()
        await self.memory.close()
        if self.parking is not None:
            await self.parking.engine.close()
        self._changes.close()
        for end in ends:
            if isinstance(end, BaseException):
                log.error("a sandbox was not stopped: %s", end)

    async def _create(
        self, box: LiveSandbox, snapshot: SnapshotId | Coming | None, *, without_kernel: bool
    ) -> LiveSandbox:
        """What `create` does, as a task that `stop` can cancel."""
        began = time.perf_counter()
        try:
            spec, choice = await self.admission.check(box.spec, box.info.owner, box.info.principal)
            box.spec = spec
            self._give_door(box)
            self._tell_choice(box, choice)
            self._check_room()
            devices = await self._lease(box)
            prepared = await self._take(spec, devices) if snapshot is None else None
            if snapshot is not None:
                await self.memory.clone(box, snapshot, devices)
            elif prepared is not None:
                box = self._adopt(prepared, box, devices, queue_ms=1000 * (time.perf_counter() - began))
            elif without_kernel or not await self._from_template(box, devices):
                await self._bring_up(box, devices)
        except BaseException as error:
            told = explain(error, box.info) if isinstance(error, errors.BackendUnavailableError) else error
            await self._discard(box, told)
            if told is error:
                raise
            raise told from error
        self._spawn(self._watch(box))
        return box

    def _tell_choice(self, box: LiveSandbox, choice: Choice) -> None:
        isolated = self.admission.backends[choice.backend].capabilities.isolated
        if (choice.backend, choice.why) != (box.info.backend, box.info.backend_why):
            box.tell(backend=choice.backend, isolated=isolated, backend_why=choice.why)
        if choice.why:
            log.info("sandbox %s: %s was chosen, since %s", box.info.id, choice.backend, choice.why)
