"""Which sandboxes there are: how one comes onto the list, is watched, and goes from it with all that it held."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from warmcell.sandbox import errors
from warmcell.sandbox.admission import Admission
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.changes import BACKLOG, Changes, Subscription
from warmcell.sandbox.gpus.base import GpuLeases
from warmcell.sandbox.gpus.parking import ParkingPlace
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.memory import Memory
from warmcell.sandbox.models import GpuDevice, NetworkPolicy, SandboxId, SandboxInfo, SandboxSpec
from warmcell.sandbox.network.egress import Egress
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport
from warmcell.sandbox.snapshots.base import SnapshotEngine
from warmcell.sandbox.snapshots.store import SnapshotStore
from warmcell.sandbox.turns import Turns

log = logging.getLogger(__name__)

NOTEBOOK, POOL = "notebook", "pool"
"""Owners of sandboxes: somebody at a notebook; nobody yet."""

FAILED_KEPT_S = 600.0
"""How long a sandbox that failed stays listed, so that a page can say why."""

FAILED_KEPT = 50
"""Most of them; the oldest goes first."""

Result = TypeVar("Result")

SEE_LOG = "keeper.log in the state directory says more."


class Registry:
    """The sandboxes of one keeper, and what each holds of the machine."""

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
        gpu_wait_s: float | None = 0.0,
        egress: Egress | None = None,
        parking: ParkingPlace | None = None,
    ) -> None:
        self.egress = egress or Egress()
        self.admission = Admission(
            backends, default_backend=default_backend, bounds=bounds, egress=self.egress, gpus=gpus
        )
        self.parking = parking
        """Where the memory of GPUs may go. None: nothing is parked."""
        self._gpu_wait_s = gpu_wait_s
        self._hurried: set[SandboxId] = set()
        """Those that do not wait for GPUs."""
        self._gpus = gpus
        self._paths = paths
        self._boxes: dict[SandboxId, LiveSandbox] = {}
        self._working: dict[SandboxId, asyncio.Task[Any]] = {}
        """What is being done with a sandbox that `stop` may cut short: its start, or something with its memory."""
        self.memory = Memory(
            engine=engine,
            others=engines,
            store=store or SnapshotStore(paths.snapshots),
            backend_of=self.admission.backend,
            paths=paths,
            park_engine=None if parking is None else parking.engine,
            release_gpus=gpus.release,
            turn=self._turn,
        )
        self._turns = Turns()
        self._notebooks_turns = Turns()
        """No start of a notebook waits for those that programs ask for, be they a thousand, or ones that hang."""
        self._changes = Changes()
        self._tasks: set[asyncio.Task[None]] = set()

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
        return any(box.info.state not in (*TERMINAL, State.SUSPENDED) for box in self._boxes.values())

    async def gpus(self) -> list[dict[str, Any]]:
        """The GPUs of the machine with who holds each."""
        return await self._gpus.status()

    @property
    def leases(self) -> GpuLeases:
        """Who has which GPU, and who waits for one."""
        return self._gpus

    def leave_queue(self, sandbox_id: SandboxId) -> None:
        """Have it wait for a GPU no longer: its start fails, or it stays suspended.

        Raises:
            SandboxNotFoundError: There is none of that id.
            ConflictError: It does not wait.
        """
        if not self._gpus.cancel(self.info(sandbox_id).id):
            raise errors.ConflictError(
                f"Sandbox {sandbox_id} waits for no GPU", hint="`warmcell gpus` lists those that wait."
            )

    def release_gpus(self, sandbox_id: SandboxId) -> None:
        """Give back the GPUs of one that was stopped with `keep_gpus`, unless another has them now. Idempotent."""
        self._gpus.release(sandbox_id)

    def subscribe(self, *, backlog: int | None = BACKLOG) -> Subscription:
        """Every change from now on; close it when done.

        Args:
            backlog: Changes that the reader may be behind before it is dropped; None for one of our own.
        """
        return self._changes.subscribe(backlog=backlog)

    async def probe(self) -> Sequence[BackendReport]:
        """What each backend can do here, tried for real."""
        return await asyncio.gather(*(backend.probe() for backend in self.admission.backends.values()))

    async def check(self, spec: SandboxSpec, *, owner: str = "notebook", principal: str | None = None) -> SandboxSpec:
        """The spec as it would be made for somebody, its backend named; makes nothing.

        Raises:
            WarmcellError: The one that `create` would give, busy GPUs apart.
        """
        return (await self.admission.check(spec, owner, principal))[0]

    async def set_network(self, sandbox_id: SandboxId, policy: NetworkPolicy | None) -> SandboxInfo:
        """Have it reach what that says, from now on; connections of until now end. None: nothing.

        Programs that run already were not told of a proxy if there was none when they began.

        Raises:
            InvalidRequestError: It is more than the operator allows, or the sandbox has a network.
        """
        box = self.live(sandbox_id)
        if policy is not None and box.spec.egress is not None:  # What runs trusts the authority that it knows.
            policy = dataclasses.replace(policy, authority=box.spec.egress.authority)
        if policy != box.spec.egress:
            box.spec = self.admission.reaching(dataclasses.replace(box.spec, egress=policy), box.info.principal)
            self._give_door(box)
            box.tell(egress=box.spec.egress)
            await box.use_door(box.door)
        return box.info

    async def stop(self, sandbox_id: SandboxId, *, keep_gpus: bool = False) -> None:
        """Stop it, and what was made from it and does not stay, also while it comes up. Idempotent.

        Args:
            sandbox_id: Which.
            keep_gpus: Its GPUs stay leased in its name, for the one that is made in its place, until `release_gpus`.

        Raises:
            OperationTimeoutError: Processes of it do not end. It stays listed, and keeps its GPUs.
        """
        work = self._working.get(sandbox_id)
        if work is not None:
            if not work.cancelling():
                work.cancel()
            await asyncio.wait({work})
        await self.stop_children(sandbox_id)
        box = self._boxes.get(sandbox_id)
        if box is not None:
            await self._remove(box, keep_gpus=keep_gpus)

    # For those who build on it

    async def _exclusively(self, box: LiveSandbox, what: Coroutine[Any, Any, Result]) -> Result:
        """Do something with a sandbox's memory while nothing else is done with it; `stop` cuts it short."""
        async with box.lock:
            if box.info.state in TERMINAL or box.info.id not in self._boxes:
                what.close()
                raise errors.ConflictError(f"Sandbox {box.info.id} has ended", hint="`warmcell ps` lists what runs.")
            current = asyncio.current_task()
            before = 0 if current is None else current.cancelling()
            work = asyncio.create_task(what)
            self._working[box.info.id] = work
            try:
                done = await work
                if current is not None and current.cancelling() > before:
                    raise asyncio.CancelledError  # Too late for the work, which has taken it for itself.
                return done
            except asyncio.CancelledError:
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

    def _check_room(self) -> None:
        """Raise if the one that comes up is one too many."""
        live = sum(box.info.state not in (*TERMINAL, State.SUSPENDED) for box in self._boxes.values())
        self.admission.check_room(live - 1)

    def _lives(self, sandbox_id: SandboxId) -> bool:
        box = self._boxes.get(sandbox_id)
        return box is not None and box.info.state is State.RUNNING

    async def stop_children(self, sandbox_id: SandboxId, *, owner: str | None = None) -> None:
        """Stop what was made from it and does not stay: all, or what has this owner."""
        children = [
            box.info.id
            for box in self._boxes.values()
            if box.info.parent == sandbox_id and not box.stays and owner in (None, box.info.owner)
        ]
        await asyncio.gather(*(self.stop(child) for child in children))

    def images_in_use(self) -> set[str]:
        """What images somebody's sandbox or snapshot names. Templates and prepared sandboxes can do without theirs."""
        specs = [box.spec for box in self._boxes.values() if box.info.state not in TERMINAL]
        store = self.memory.store
        specs += [store.get(info.id).spec for info in store.infos() if info.kind != "template"]
        return {spec.image for spec in specs if spec.image is not None}

    def _give_door(self, box: LiveSandbox) -> None:
        policy = box.spec.egress
        box.door = None if policy is None else self.egress.door(box.info.id, policy, box.tally)

    def _new(
        self,
        spec: SandboxSpec,
        *,
        owner: str,
        principal: str | None = None,
        parent: SandboxId | None = None,
        kernel_id: str | None = None,
        notebook: str | None = None,
    ) -> LiveSandbox:
        if parent is not None and principal is None:  # What is made from a sandbox is of whom that is.
            principal = self._boxes[parent].info.principal
        self.admission.check_quota(spec, principal)
        choice = self.admission.choosing.for_notebook(spec)
        backend = self.admission.backends.get(choice.backend)
        info = SandboxInfo(
            id=new_sandbox_id(),
            state=State.CREATING,
            backend=choice.backend,
            isolated=backend.capabilities.isolated if backend is not None else True,
            backend_why=choice.why,
            owner=owner,
            principal=principal,
            parent=parent,
            kernel_id=kernel_id,
            notebook=notebook,
            python=spec.python,
            image=spec.image,
            workspace=spec.workspace,
            network=spec.network,
            egress=spec.egress,
            gpu=spec.gpu,
            created_at=time.time(),
        )
        box = LiveSandbox(info, spec, self._paths.sandboxes / info.id, self._publish)
        box.awaited = owner != POOL
        return box

    @contextlib.asynccontextmanager
    async def _turn(self, box: LiveSandbox) -> AsyncIterator[float]:
        """Wait until it may use the machine's processors for a start, its place told as its phase; for how many ms.

        Whatever is held by others who wait for a turn must not be waited for meanwhile.
        """
        began, place = time.perf_counter(), None

        def told(before: int) -> None:
            nonlocal place
            place = before
            box.phase("queue", f"{before} before it")

        turns = self._notebooks_turns if box.info.owner == NOTEBOOK else self._turns
        async with turns.turn(box.info.principal or box.info.owner, urgent=lambda: box.awaited, told=told):
            if place is None:
                yield 0.0
            else:
                box.tell(phase=None)
                yield round(1000 * (time.perf_counter() - began), 1)

    async def _bring_up(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> None:
        """From nothing, such that its kernels can be saved where this machine can do that."""
        async with self._turn(box) as waited_ms:
            began = time.perf_counter()
            box.directory.mkdir(mode=0o700)
            await box.bring_up(await self._maker(box, devices), devices)
            await self.memory.enroll(box)
        box.waited(waited_ms)
        box.took(create=1000 * (time.perf_counter() - began))

    async def _lease(
        self, box: LiveSandbox, asked: str | tuple[str, ...] | None = None, *, hurry: bool = False
    ) -> tuple[GpuDevice, ...]:
        """Its GPUs. It may wait for them, and tells where it stands then; what it has and does not need is given back.

        Args:
            box: Which.
            asked: In the grammar of requests. None: what its spec says.
            hurry: It does not wait.

        Raises:
            WarmcellError: As `GpuLeases.lease`.
        """
        asked, sandbox_id = asked or box.spec.gpu, box.info.id
        had = self._gpus.has(sandbox_id, asked) if asked is not None else None
        if had is not None:
            return had
        self._gpus.release(sandbox_id, remains=box.info.parked is not None)
        if asked is None:
            return ()
        began = time.perf_counter()
        box.phase("lease")
        wait_s = 0.0 if hurry or sandbox_id in self._hurried else self._gpu_wait_s
        devices = await self._gpus.lease(asked, holder=sandbox_id, owner=box.info.owner, wait_s=wait_s, told=box.stands)
        box.took(queue=1000 * (time.perf_counter() - began))
        return devices

    async def _maker(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> SandboxBackend:
        """What makes that sandbox."""
        return self.admission.backend(box.spec)

    async def _watch(self, box: LiveSandbox) -> None:
        """Release what a sandbox held, and what was made from inside it, when it ends by itself."""
        await box.ended.wait()
        if box.info.state is State.FAILED and self._boxes.get(box.info.id) is box:
            log.warning("sandbox %s failed: %s", box.info.id, box.info.error and box.info.error.message)
            await self.stop_children(box.info.id)
            await self._discard(box, None)

    async def _discard(self, box: LiveSandbox, error: BaseException | None) -> None:
        """Remove what a failed sandbox left; its info stays for a while, unless nobody wanted it any more."""
        if isinstance(error, errors.WarmcellError):
            box.fail(error)
        elif isinstance(error, Exception):
            log.error("creating sandbox %s failed", box.info.id, exc_info=error)
            box.fail(errors.SandboxStartError(f"{type(error).__name__}: {error}", hint=SEE_LOG))
        await self.memory.leave(box.info.id)
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
            # That has no state after it, but whoever lists it is to hear.
            box.info = dataclasses.replace(box.info, state=State.STOPPED)
            self._publish(box)

    def _forget_failures_of(self, notebook: str | None) -> None:
        """It is started again: why it failed before is of no interest any more."""
        if notebook is not None:
            for box in [one for one in self._boxes.values() if one.info.notebook == notebook]:
                if box.info.state is State.FAILED:
                    self._forget_failed(box)

    async def _remove(self, box: LiveSandbox, *, keep_gpus: bool = False) -> None:
        await self.memory.leave(box.info.id)
        await box.stop()
        await self.memory.forget_suspended(box.info.snapshot)
        await self.memory.forget_kernel(box.info.id)
        if not keep_gpus:
            self._gpus.release(box.info.id)
        if box.info.state is State.FAILED:
            self._forget_failed(box)
        elif self._boxes.get(box.info.id) is box:
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
        self._changes.publish(box.info)
