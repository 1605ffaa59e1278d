"""How a kernel comes back from what was saved: resumed, undone, as a clone, or as the next one in its sandbox.

A kernel is brought back in a twin of its sandbox; the twin takes its place when the kernel in it has answered, so
whatever fails before leaves all as it was.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import ended, to_its_end
from warmcell.sandbox.coming import Coming
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.lifecycle import Event, State, transition
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import ErrorInfo, GpuDevice, SandboxId, SandboxSpec, SnapshotId
from warmcell.sandbox.paths import FULL, no_room
from warmcell.sandbox.saved import Saved
from warmcell.sandbox.snapshots.archive import NO_MEMORY
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.twins import Twins

log = logging.getLogger(__name__)


class BringingBack(Saved):
    """Restores kernels, each in a sandbox that is there for it."""

    def __init__(self, **saved: Any) -> None:
        """As `Saved`."""
        super().__init__(**saved)
        self.twins = Twins(self._make_twin, layer_of=self.store.layer)
        """Those that wait for sandboxes that are suspended."""
        self._leaving: dict[asyncio.Task[None], SandboxId] = {}
        """What is being removed, since another has taken its place, and whose place that is."""

    async def close(self) -> None:
        """Remove what waits, and end the engine."""
        await self.twins.close()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await super().close()

    async def leave(self, sandbox_id: SandboxId) -> None:
        """Remove what waits for a sandbox that goes, and wait for the end of what it was before it last came back."""
        await self.twins.drop(sandbox_id)
        left = [task for task, whose in self._leaving.items() if whose == sandbox_id]
        if left:
            await asyncio.wait(left)

    async def resume(
        self,
        box: LiveSandbox,
        gpus: tuple[GpuDevice, ...],
        *,
        began: float,
        snapshot: SnapshotId | None = None,
        with_kernel: bool = True,
    ) -> None:
        """Bring a suspended sandbox back; its GPUs are leased for it already.

        Args:
            box: It is suspended.
            gpus: Its devices.
            began: When that was asked for, on the clock of `time.perf_counter`.
            snapshot: An earlier one, to go on from there; what it was suspended as is neither read nor removed.
            with_kernel: Otherwise it has its files only, and the next kernel is to be started.

        Raises:
            WarmcellError: It stays suspended, and its snapshot is as it was.
        """
        asleep = box.info.snapshot
        assert asleep is not None
        target = snapshot or asleep
        not_saved = self._not_saved(target)
        box.gpus = gpus
        # Its clients may have their answers before all is told.
        box.tell(state=transition(box.info.state, Event.RESUME), error=None, gpus=gpus)
        queue_ms = 1000 * (time.perf_counter() - began)
        try:
            phases = await self._bring_back(box, target, undone=target != asleep, with_kernel=with_kernel)
        except BaseException as error:
            box.gpus = ()
            why = ErrorInfo.from_json(error.to_json()) if isinstance(error, errors.WarmcellError) else None
            box.tell(state=transition(box.info.state, Event.RESUME_FAILED), error=why, phase=None, gpus=())
            if box.frontend is not None:
                await box.frontend.sleep(self._record(asleep))
            raise
        outlived, _ = await ended(self._outlive(target))  # It runs, on its GPUs, whatever comes of this.
        if (failed := outlived.exception()) is not None:
            log.error("snapshot %s, from which sandbox %s goes on, is not marked so: %s", target, box.info.id, failed)
        now = time.perf_counter()
        box.tell(
            state=transition(box.info.state, Event.RESUME_DONE),
            snapshot=target,
            not_saved=not_saved,
            resumed_ms=round(1000 * (now - began), 1),
            phases_ms={**phases, "queue": round(queue_ms + phases["queue"], 1)},
            started_from="snapshot",
            phase=None,
            gpus=gpus,
        )

    async def undo(self, box: LiveSandbox, snapshot: SnapshotId) -> None:
        """Put the kernel back to a snapshot of it, its clients connected. What it was until now is gone.

        Raises:
            WarmcellError: It runs on as it was.
        """
        began = time.perf_counter()
        not_saved = self._not_saved(snapshot)
        phases = await self._bring_back(box, snapshot, undone=True)
        box.tell(
            snapshot=snapshot,
            not_saved=not_saved,
            started_from="snapshot",
            started_ms=round(1000 * (time.perf_counter() - began), 1),
            phases_ms=phases,
            phase=None,
            error=None,
        )

    async def clone(self, box: LiveSandbox, snapshot: SnapshotId | Coming, gpus: tuple[GpuDevice, ...]) -> None:
        """Bring up a new sandbox with a kernel that goes on from a snapshot; nobody speaks with it yet.

        The sandbox of one that is still coming is made meanwhile.

        Raises:
            WarmcellError: What was made is still to be removed.
        """
        began = time.perf_counter()
        box.gpus = gpus
        early: dict[str, float] = {}
        if isinstance(snapshot, Coming):
            snapshot, early = await self._rise_before(box, snapshot)
        async with self._turn(box) as waited_ms:
            saved, phases = await self._rise(box, snapshot, later=_may_wait(box))
        before = box.info.phases_ms.get("queue", 0.0) + early.get("queue", 0.0)
        phases |= {**early, "queue": round(before + waited_ms, 1)}
        assert box.kernel is not None
        box.tell(state=transition(box.info.state, Event.CREATED))
        box.watch()
        if box.frontend is None:
            box.kernel.token = saved.guest.token
        else:
            at = time.perf_counter()
            await box.frontend.go_on(box.kernel, saved.kernel, token=saved.guest.token, restored=True, clone=True)
            phases["ready"] = round(1000 * (time.perf_counter() - at), 1)
        box.tell(
            generation=box.kernel.generation,
            started_from=box.kernel.started_from,
            started_ms=round(1000 * (time.perf_counter() - began), 1),
            snapshot=snapshot,
            not_saved=saved.info.not_saved,
            phases_ms=phases,
            phase=None,
        )

    async def restore_into(self, box: LiveSandbox, template: SnapshotId) -> KernelProcess:
        """A kernel from a template in a sandbox that has had others; it waits to be spoken with.

        Raises:
            WarmcellError: It is as it was, without a kernel.
        """
        engine = await self.check(box.spec)
        async with self.store.use(template) as held:
            _check_fits(held.manifest, box.spec)
            box.remove_sockets(held.manifest.guest.socket_prefix)
            async with self._turn(box) as waited_ms:
                began = time.perf_counter()
                restored = await engine.restore(box.instance, image=template)
        kernel = KernelProcess(
            pid=restored.pid,
            generation=box.info.generation + 1,
            socket_prefix=box.run_directory / held.manifest.guest.socket_prefix,
            started_from="template",
            token=held.manifest.guest.token,
        )
        await box.take_on(kernel)
        before = {} if box.info.generation else box.info.phases_ms
        box.tell(
            generation=kernel.generation,
            exit_code=None,
            started_from=None,
            started_ms=None,
            not_saved=(),
            phases_ms={**before, "restore": round(1000 * (time.perf_counter() - began), 1)},
        )
        box.waited(waited_ms)
        return kernel

    async def _bring_back(
        self, box: LiveSandbox, snapshot: SnapshotId, *, undone: bool, with_kernel: bool = True
    ) -> dict[str, float]:
        """Restore in a twin, and let it take the place of what is behind `box`; what each step took, in ms.

        Where it is `undone`, what its kernel was asked and has not answered is answered in its place.
        """
        runs = box.info.state is State.RUNNING
        waiting = await self.twins.take(box, snapshot)
        twin = waiting or self._twin(box)
        try:
            async with self._turn(box) as waited_ms:
                try:
                    saved, phases = await self._rise(twin, snapshot, tell=box, with_kernel=with_kernel)
                except errors.WarmcellError as error:
                    if waiting is None:
                        raise
                    log.info("sandbox %s does not come back in what waited for it: %s", box.info.id, error)
                    await waiting.discard()
                    twin = self._twin(box)
                    saved, phases = await self._rise(twin, snapshot, tell=box, with_kernel=with_kernel)
            phases["queue"] = waited_ms
        except BaseException:
            await twin.discard()
            raise
        exchanged = False
        try:
            if undone and box.frontend is not None:
                await to_its_end(box.frontend.undone())
            if box.ended.is_set():
                raise errors.SandboxDiedError(
                    f"Sandbox {box.info.id} ended meanwhile", hint="Start its kernel again, then restore it."
                )
            remains = await box.become(twin, on_trial=True)
            exchanged = True
            at = time.perf_counter()
            if box.frontend is not None and box.kernel is not None:
                token = saved.guest.token
                await box.frontend.go_on(
                    box.kernel, saved.kernel, token=token, restored=True, clone=False, undone=undone
                )
        except BaseException:
            await to_its_end(self._go_back(box, twin, exchanged=exchanged, runs=runs))
            raise
        phases["ready"] = round(1000 * (time.perf_counter() - at), 1)
        stayed, _ = await ended(self._stay(box, remains))  # Its kernel has answered: nobody can give it up any more.
        stayed.result()
        return phases

    async def _go_back(self, box: LiveSandbox, twin: LiveSandbox, *, exchanged: bool, runs: bool) -> None:
        """Have it be again what it was, remove what was to take its place, and have its clients back at its kernel."""
        if exchanged:
            await box.become(twin)
        await twin.discard()
        if runs and box.frontend is not None and box.kernel is not None:
            await box.frontend.go_on(box.kernel, {}, token="", restored=False, clone=False)

    async def _stay(self, box: LiveSandbox, remains: LiveSandbox) -> None:
        """Remove what another has taken the place of. Nobody waits for that, or finds its snapshot still in use."""
        await box.accept()
        await remains.let_go_of_layer()
        task = asyncio.create_task(remains.discard())
        self._leaving[task] = remains.info.id
        task.add_done_callback(self._gone)

    def _gone(self, task: "asyncio.Task[None]") -> None:
        del self._leaving[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a sandbox that was replaced is not removed", exc_info=error)

    async def _rise_before(self, box: LiveSandbox, coming: Coming) -> tuple[SnapshotId, dict[str, float]]:
        """Make the sandbox as soon as the snapshot's files are there; it, and what took how long, in ms."""
        began = time.perf_counter()
        layer = await coming.layer()
        saved = made_from = time.perf_counter()
        waited_ms = 0.0
        if layer is not None:
            async with self._turn(box) as waited_ms:
                made_from = time.perf_counter()
                try:
                    _make_room(box)
                    await box.rise(self._backend_of(box.spec), layer=layer, later=_may_wait(box))
                except errors.WarmcellError:
                    if not coming.stale:  # Else its files went while it was made.
                        raise
        created = time.perf_counter()
        box.phase("restore")
        snapshot = await coming.snapshot()
        there = time.perf_counter()
        if coming.stale:
            await box.discard()
            return snapshot, {}
        steps = {"files": saved - began, "create": created - made_from, "memory": there - created}
        return snapshot, {"queue": waited_ms, **{name: round(1000 * took, 1) for name, took in steps.items()}}

    def _record(self, snapshot: SnapshotId) -> Mapping[str, Any]:
        """What a suspended kernel was in the middle of; nothing if its snapshot was removed."""
        try:
            return self.store.get(snapshot).kernel
        except errors.WarmcellError:
            return {}

    def _not_saved(self, snapshot: SnapshotId) -> tuple[str, ...]:
        """What it comes back without; nothing if its snapshot was removed."""
        try:
            return self.store.get(snapshot).info.not_saved
        except errors.WarmcellError:
            return ()

    def _twin(self, box: LiveSandbox) -> LiveSandbox:
        twin = LiveSandbox(box.info, box.spec, self._paths.sandboxes / new_sandbox_id(), lambda _: None)
        twin.gpus = box.gpus
        twin.named = box.named
        return twin

    async def _make_twin(self, box: LiveSandbox, snapshot: SnapshotId | None) -> LiveSandbox:
        """What a sandbox will come back in, without its kernel, and without files where its images have those. The
        snapshot may go while it waits.
        """
        twin = self._twin(box)
        try:
            engine = await self.check(box.spec)
            maker = engine.maker(self._backend_of(box.spec), None)
            if engine.whole:
                _make_room(twin)
                await twin.rise(maker)
            elif snapshot is None:
                raise errors.UnsupportedOperationError("It would have the files of a snapshot that is not known yet")
            else:
                async with self.store.use(snapshot) as held:
                    _check_fits(held.manifest, box.spec)
                    _make_room(twin)
                    await twin.rise(maker, layer=held.layer)
        except BaseException:
            await twin.discard()
            raise
        return twin

    async def _rise(
        self,
        box: LiveSandbox,
        snapshot: SnapshotId,
        *,
        tell: LiveSandbox | None = None,
        with_kernel: bool = True,
        later: bool = False,
    ) -> tuple[Manifest, dict[str, float]]:
        engine = await self.check(box.spec)
        tell = tell or box
        use = contextlib.AsyncExitStack()
        held = await use.enter_async_context(self.store.use(snapshot))
        guest = held.manifest.guest
        try:
            if with_kernel and held.manifest.info.engine == NO_MEMORY:
                raise errors.UnsupportedOperationError(
                    f"Snapshot {snapshot} has files alone, no kernel's memory",
                    hint="It was exported with `--files-only`, or by a machine that cannot take memory out.",
                )
            _check_fits(held.manifest, box.spec)
            began = time.perf_counter()
            if not box.up:
                tell.phase("sandbox")
                _make_room(box)
                maker = engine.maker(self._backend_of(box.spec), snapshot)
                await box.rise(maker, layer=held.layer, later=later)
            created = time.perf_counter()
            if with_kernel:
                tell.phase("restore")

                def told(done: int, of: int) -> None:
                    detail = f"{100 * done // max(1, of)} % of its memory is expanded"
                    if tell.info.phase is None or tell.info.phase.detail != detail:
                        tell.phase("restore", detail)

                restored = await engine.restore(box.instance, image=snapshot, told=told)
                await box.meet()
                if held.manifest.info.image_compressed:
                    await self.remeasure()
                await box.take_on(
                    KernelProcess(
                        pid=restored.pid,
                        generation=guest.generation,
                        socket_prefix=box.run_directory / guest.socket_prefix,
                        started_from="template" if held.manifest.info.kind == "template" else "snapshot",
                    ),
                    host_pid=restored.host_pid,
                )
                if held.manifest.parked is not None and self.park_engine is not None:
                    tell.phase("unpark")
                    await self.park_engine.unpark(held.manifest.parked, box.gpus, box.processes)
            elif engine.whole:
                await engine.restore(box.instance, image=snapshot)
                await box.meet()
                await box.end_process(guest.pid)
            else:
                await engine.enroll(box.instance)
        except BaseException:
            await use.aclose()
            raise
        box.layer = use
        done = time.perf_counter()
        return held.manifest, {
            "create": round(1000 * (created - began), 1),
            "restore": round(1000 * (done - created), 1),
        }


def _may_wait(box: LiveSandbox) -> bool:
    """Whether its init is needed only once its kernel goes on: the proxy of what has no network is reached by it."""
    return box.door is None


def _make_room(box: LiveSandbox) -> None:
    """Its directory. Not in a thread: one that is given up could make it after its removal.

    Raises:
        WarmcellError: There is no room for it.
    """
    try:
        box.directory.mkdir(0o700)
    except OSError as error:
        if error.errno in FULL:
            raise no_room(box.directory.parent) from error
        raise errors.SnapshotError(
            f"The directory of the sandbox cannot be made: {error.strerror} ({box.directory})",
            hint="See that WARMCELL_RUNTIME_DIR can be written; keeper.log says more.",
        ) from error


def _check_fits(saved: Manifest, wanted: SandboxSpec) -> None:
    """The interpreter and the folders are part of the kernel's memory.

    Raises:
        SnapshotIncompatibleError: They are others.
    """
    then, now = _places(saved.spec), _places(wanted)
    for name in ("interpreter", "image", "home") if saved.info.kind == "template" else then:
        if then[name] != now[name]:
            raise errors.SnapshotIncompatibleError(
                f"The snapshot was made with another {name}",
                hint="Restore it in a sandbox like the one that it is of.",
                details={"expected": str(then[name]), "found": str(now[name])},
            )


def _places(spec: SandboxSpec) -> dict[str, object]:
    workspace = spec.workspace if spec.workspace is not None and spec.workspace.mode != "none" else None
    return {
        "interpreter": spec.python,
        "image": spec.image,
        "workspace": workspace and workspace.path,
        "mounts": sorted(mount.target or mount.source for mount in spec.mounts),
        "home": spec.home,
    }
