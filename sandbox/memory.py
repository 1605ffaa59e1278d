"""What can be done with a sandbox's memory: save it, suspend and resume it, bring it back, clone it.

The order of things is what keeps a kernel safe. Its clients are held first, then its memory and its files are saved
from one freeze, and only when both are on disk is anything ended. A kernel is always brought back in a twin of its
sandbox; the twin takes its place when the kernel in it has answered, so whatever fails before leaves all as it was.
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.ids import new_sandbox_id, new_snapshot_id
from warmcell.sandbox.lifecycle import Event, State, transition
from warmcell.sandbox.live import KernelProcess, LiveSandbox
from warmcell.sandbox.models import (
    EngineReport,
    ErrorInfo,
    GpuDevice,
    SandboxSpec,
    SnapshotId,
    SnapshotInfo,
    SnapshotKind,
)
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.pool import memory_bytes
from warmcell.sandbox.snapshots.archive import NO_MEMORY
from warmcell.sandbox.snapshots.base import Dumped, SnapshotEngine, Then
from warmcell.sandbox.snapshots.manifest import GuestIdentity, Manifest
from warmcell.sandbox.snapshots.store import SnapshotStore

log = logging.getLogger(__name__)

NO_ENGINE = EngineReport(
    name="none",
    ready=False,
    why_not="the configuration says so",
    hint='Set c.Warmcell.snapshots, and for ordinary users c.Warmcell.helper, to "auto".',
)

TRY_AGAIN_S = 30.0
"""An engine that was not ready may have been installed, or repaired, since."""


class Clock:
    """What each step of a work took."""

    def __init__(self) -> None:
        self.phases_ms: dict[str, float] = {}
        self._at = time.perf_counter()

    def end(self, phase: str) -> None:
        """The step that began with the end of the one before is over."""
        now = time.perf_counter()
        self.phases_ms[phase] = round(1000 * (now - self._at), 1)
        self._at = now


class Memory:
    """Knows engine and store; of sandboxes it knows what `LiveSandbox` offers. Operations on one exclude each other."""

    def __init__(
        self,
        *,
        engine: SnapshotEngine | None,
        store: SnapshotStore,
        backend_of: Callable[[SandboxSpec], SandboxBackend],
        paths: Paths,
    ) -> None:
        self.store = store
        self._engine = engine
        self._backend_of = backend_of
        self._paths = paths
        self._trying: asyncio.Task[EngineReport] | None = None
        self._tried_at = 0.0
        store.on_removed = self.image_dropped

    async def open(self) -> None:
        """Read what the store has, and begin to try the engine."""
        await self.store.open()
        self._trying, self._tried_at = asyncio.create_task(self._try()), time.monotonic()

    async def close(self) -> None:
        """End the engine."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()

    async def report(self) -> EngineReport:
        """Whether memory can be saved on this machine, tried for real."""
        if self._trying is None:
            return NO_ENGINE
        report = await asyncio.shield(self._trying)
        if not report.ready and time.monotonic() - self._tried_at > TRY_AGAIN_S:
            self._trying, self._tried_at = asyncio.create_task(self._try()), time.monotonic()
        return report

    async def check(self, spec: SandboxSpec) -> SnapshotEngine:
        """The engine that saves sandboxes of this kind.

        Raises:
            UnsupportedOperationError: There is none; said before anything is done.
        """
        report = await self.report()
        if self._engine is None or not report.ready:
            raise errors.UnsupportedOperationError(
                f"Memory cannot be saved on this machine: {report.why_not}", hint=report.hint
            )
        backend = self._backend_of(spec)
        if self._engine.name not in backend.capabilities.snapshot_engines:
            raise errors.UnsupportedOperationError(
                f"The {backend.name} backend cannot save memory", hint="Use the bubblewrap backend."
            )
        return self._engine

    async def enroll(self, box: LiveSandbox, *, template: bool = False) -> None:
        """A fresh sandbox becomes one whose kernels can be saved, for a template, where that is possible at all."""
        try:
            engine = await self.check(box.spec)
        except errors.UnsupportedOperationError:
            return
        try:
            await engine.enroll(box.instance, template=template)
        except errors.WarmcellError as error:  # It is as good as any, only that its memory cannot be saved.
            log.warning("sandbox %s cannot be saved: %s", box.info.id, error)

    async def _try(self) -> EngineReport:
        """Probe the engine, and remove the images that no snapshot has."""
        if self._engine is None:
            return NO_ENGINE
        report = await self._engine.probe()
        if report.ready:
            try:
                for image in await self._engine.images():
                    if image.id not in self.store.ids:
                        log.warning("removed image %s, which belongs to no snapshot", image.id)
                        await self._engine.drop(image.id)
            except errors.WarmcellError as error:
                log.error("images cannot be looked through: %s", error)
        return report

    async def remeasure(self) -> None:
        """Take note of images that have become smaller or larger since they were made."""
        if self._engine is None or not (await self.report()).ready:
            return
        known = {info.id: info.image_bytes for info in self.store.infos()}
        for image in await self._engine.images():
            if known.get(image.id, image.image_bytes) != image.image_bytes:
                await self.store.amend(image.id, image_bytes=image.image_bytes)

    async def image_dropped(self, snapshot: SnapshotId) -> None:
        """Told by the store of a snapshot that is gone."""
        if self._engine is not None:
            with contextlib.suppress(errors.WarmcellError):
                await self._engine.drop(snapshot)

    # Saving ----------------------------------------------------------------------------------------------------

    async def save(
        self, box: LiveSandbox, *, kind: SnapshotKind, name: str = "", environment: Mapping[str, str] | None = None
    ) -> SnapshotInfo:
        """Save a running kernel, which goes on after a pause.

        Args:
            box: Where it is.
            kind: What the snapshot is for.
            name: As its user calls it.
            environment: Identity of what it was made from.

        Raises:
            WarmcellError: Nothing was saved; the kernel goes on as before.
        """
        return (await self._save(box, kind=kind, name=name, then="go_on", environment=environment or {})).info

    async def suspend(self, box: LiveSandbox) -> SnapshotInfo:
        """Save a running kernel and end its sandbox; `box` is suspended afterwards, and its GPUs are the caller's.

        What it was suspended as before is no longer needed; `forget_suspended` removes it.

        Raises:
            WarmcellError: Nothing was saved; the kernel goes on as before.
        """
        box.tell(state=transition(box.info.state, Event.SUSPEND))
        try:
            manifest = await self._save(box, kind="suspended", then="stop")
        except BaseException:
            if box.info.state is State.SUSPENDING:  # Else it has ended meanwhile.
                box.tell(state=transition(box.info.state, Event.SUSPEND_FAILED))
            raise
        await box.discard()
        box.gpus = ()
        box.tell(
            state=transition(box.info.state, Event.SUSPEND_DONE),
            snapshot=manifest.info.id,
            gpus=(),
            phase=None,
        )
        if box.frontend is not None:
            await box.frontend.sleep(manifest.kernel)
        return manifest.info

    async def _save(
        self,
        box: LiveSandbox,
        *,
        kind: SnapshotKind,
        then: Then,
        name: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Manifest:
        engine = await self.check(box.spec)
        kernel, frontend = box.kernel, box.frontend
        if kernel is None or not kernel.alive:
            raise errors.ConflictError(f"Sandbox {box.info.id} has no kernel", hint="Start its kernel first.")
        if self.store.quota_bytes is not None:
            await self.store.make_room(await asyncio.to_thread(memory_bytes, box.processes))
        token = secrets.token_hex(16)
        snapshot = new_snapshot_id()
        frozen = asyncio.Event()
        async with self.store.draft(snapshot) as draft:
            clock = Clock()
            if frontend is not None:
                await frontend.pause(token=token)
            clock.end("settle")
            record = frontend.record() if frontend is not None else {}
            manifest = dataclasses.replace(
                self._manifest(box, kernel, snapshot, record, kind=kind, name=name, token=token),
                environment=environment,
            )

            async def while_frozen() -> None:
                clock.end("memory")
                await box.instance.save_layer(draft.layer)
                await draft.commit(manifest, durable=False)
                clock.end("layer")
                if then == "stop":
                    await box.unwatch()
                    if box.ended.is_set():
                        raise errors.SandboxDiedError(
                            f"Sandbox {box.info.id} ended while it was saved", hint="Start its kernel again."
                        )
                frozen.set()

            dump = asyncio.ensure_future(
                engine.dump(box.instance, pid=kernel.pid, image=snapshot, then=then, while_frozen=while_frozen)
            )
            thawed = asyncio.ensure_future(frozen.wait())
            gone_on = frontend is None
            try:
                await asyncio.wait({dump, thawed}, return_when=asyncio.FIRST_COMPLETED)
                if frontend is not None and (then == "go_on" or (dump.done() and dump.exception() is not None)):
                    await frontend.go_on(kernel, record, token=token, restored=False, clone=False)
                    gone_on = True
                dumped = await dump
            except BaseException:
                dump.cancel()
                await asyncio.gather(dump, return_exceptions=True)
                if frozen.is_set():
                    await self.store.discard(snapshot)
                    if then == "stop":
                        box.watch()
                if frontend is not None and not gone_on:
                    with contextlib.suppress(errors.WarmcellError):  # What went wrong first is what the caller is told.
                        await frontend.go_on(kernel, record, token=token, restored=False, clone=False)
                raise
            finally:
                thawed.cancel()
        clock.end("finish")
        return await self._amend(manifest, dumped, clock.phases_ms)

    def _manifest(
        self,
        box: LiveSandbox,
        kernel: KernelProcess,
        snapshot: SnapshotId,
        record: Mapping[str, Any],
        *,
        kind: SnapshotKind,
        name: str,
        token: str,
    ) -> Manifest:
        now = time.time()
        info = SnapshotInfo(
            id=snapshot,
            name=name,
            kind=kind,
            engine=self._engine.name if self._engine is not None else "",
            sandbox_id=box.info.id,
            kernel_id=box.info.kernel_id,
            notebook=box.info.notebook,
            parent=box.info.snapshot,
            created_at=now,
            last_used_at=now,
        )
        return Manifest(
            info=info,
            spec=box.spec,
            mounts=box.spec.mounts,
            gpus=tuple(gpu.uuid for gpu in box.gpus),
            gpu_driver=next((gpu.driver_version or "" for gpu in box.gpus), ""),
            kernel=record,
            guest=GuestIdentity(
                socket_prefix=kernel.socket_prefix.name, pid=kernel.pid, generation=kernel.generation, token=token
            ),
        )

    async def _amend(self, manifest: Manifest, dumped: Dumped, phases_ms: Mapping[str, float]) -> Manifest:
        return await self.store.amend(
            manifest.info.id,
            image_bytes=dumped.image_bytes,
            memory_bytes=dumped.memory_bytes,
            versions=dumped.versions,
            phases_ms={**phases_ms, **{f"engine_{name}": ms for name, ms in dumped.ms.items()}},
        )

    async def _outlive(self, snapshot: SnapshotId) -> None:
        """Its kernel goes on from it, so it is not what a keeper would take up again."""
        if self.store.get(snapshot).info.kind == "suspended":
            await self.store.amend(snapshot, kind="outlived")

    async def forget_suspended(self, snapshot: SnapshotId | None) -> None:
        """A suspended kernel's snapshot that the kernel has outlived; a named one stays."""
        if snapshot is None:
            return
        with contextlib.suppress(errors.SnapshotNotFoundError):
            if self.store.get(snapshot).info.kind in ("suspended", "outlived"):
                await self.store.discard(snapshot)

    # Bringing back ---------------------------------------------------------------------------------------------

    async def resume(
        self, box: LiveSandbox, gpus: tuple[GpuDevice, ...], *, began: float, with_kernel: bool = True
    ) -> None:
        """Bring a suspended sandbox back; its GPUs are leased for it already.

        Args:
            box: It is suspended.
            gpus: Its devices.
            began: When that was asked for, on the clock of `time.perf_counter`.
            with_kernel: Otherwise it has its files only, and the next kernel is to be started.

        Raises:
            WarmcellError: It stays suspended, and its snapshot is as it was.
        """
        assert box.info.snapshot is not None
        box.gpus = gpus
        box.tell(state=transition(box.info.state, Event.RESUME), error=None)
        queued = time.perf_counter()
        try:
            phases = await self._bring_back(box, box.info.snapshot, with_kernel=with_kernel)
        except BaseException as error:
            box.gpus = ()
            why = ErrorInfo.from_json(error.to_json()) if isinstance(error, errors.WarmcellError) else None
            box.tell(state=transition(box.info.state, Event.RESUME_FAILED), error=why, phase=None, gpus=())
            if box.frontend is not None:
                await box.frontend.sleep(self.store.get(box.info.snapshot).kernel)
            raise
        await self._outlive(box.info.snapshot)
        now = time.perf_counter()
        box.tell(
            state=transition(box.info.state, Event.RESUME_DONE),
            resumed_ms=round(1000 * (now - began), 1),
            phases_ms={"queue": round(1000 * (queued - began), 1), **phases},
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
        phases = await self._bring_back(box, snapshot)
        box.tell(
            snapshot=snapshot,
            started_from="snapshot",
            started_ms=round(1000 * (time.perf_counter() - began), 1),
            phases_ms=phases,
            phase=None,
            error=None,
        )

    async def clone(self, box: LiveSandbox, snapshot: SnapshotId, gpus: tuple[GpuDevice, ...]) -> None:
        """Bring up a new sandbox with a kernel that goes on from a snapshot; nobody speaks with it yet.

        Raises:
            WarmcellError: What was made is still to be removed.
        """
        began = time.perf_counter()
        box.gpus = gpus
        saved, phases = await self._rise(box, snapshot)
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
            phases_ms=phases,
            phase=None,
        )

    async def restore_into(self, box: LiveSandbox, template: SnapshotId) -> KernelProcess:
        """A kernel from a template in a sandbox that has had others; it waits to be spoken with.

        Raises:
            WarmcellError: It is as it was, without a kernel.
        """
        began = time.perf_counter()
        engine = await self.check(box.spec)
        async with self.store.use(template) as held:
            _check_fits(held.manifest, box.spec)
            box.remove_sockets(held.manifest.guest.socket_prefix)
            restored = await engine.restore(box.instance, image=template)
        kernel = KernelProcess(
            pid=restored.pid,
            generation=box.info.generation + 1,
            socket_prefix=box.run_directory / held.manifest.guest.socket_prefix,
            started_from="template",
            token=held.manifest.guest.token,
        )
        await box.take_on(kernel)
        box.tell(
            generation=kernel.generation,
            exit_code=None,
            started_from=None,
            started_ms=None,
            phases_ms={"restore": round(1000 * (time.perf_counter() - began), 1)},
        )
        return kernel

    async def _bring_back(
        self, box: LiveSandbox, snapshot: SnapshotId, *, with_kernel: bool = True
    ) -> dict[str, float]:
        """Restore in a twin, and let it take the place of what is behind `box`; what each step took, in ms."""
        twin = LiveSandbox(box.info, box.spec, self._paths.sandboxes / new_sandbox_id(), lambda _: None)
        twin.gpus = box.gpus
        try:
            saved, phases = await self._rise(twin, snapshot, tell=box, with_kernel=with_kernel)
            undone = box.frontend is not None and box.info.state is State.RUNNING
            if undone and box.frontend is not None:
                await box.frontend.undone()
            if box.ended.is_set():
                raise errors.SandboxDiedError(
                    f"Sandbox {box.info.id} ended meanwhile", hint="Start its kernel again, then restore it."
                )
        except BaseException:
            await twin.discard()
            raise
        remains = await box.become(twin, on_trial=True)
        at = time.perf_counter()
        try:
            if box.frontend is not None and box.kernel is not None:
                await box.frontend.go_on(box.kernel, saved.kernel, token=saved.guest.token, restored=True, clone=False)
        except BaseException:
            await (await box.become(remains)).discard()
            if undone and box.frontend is not None and box.kernel is not None:
                await box.frontend.go_on(box.kernel, {}, token="", restored=False, clone=False)
            raise
        phases["ready"] = round(1000 * (time.perf_counter() - at), 1)
        await box.accept()
        await remains.discard()
        return phases

    async def _rise(
        self, box: LiveSandbox, snapshot: SnapshotId, *, tell: LiveSandbox | None = None, with_kernel: bool = True
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
            tell.phase("sandbox")
            began = time.perf_counter()
            box.directory.mkdir(0o700)  # Not in a thread: one that is given up could make it after its removal.
            await box.rise(self._backend_of(box.spec), layer=held.layer)
            created = time.perf_counter()
            if with_kernel:
                tell.phase("restore")
                restored = await engine.restore(box.instance, image=snapshot)
                await box.take_on(
                    KernelProcess(
                        pid=restored.pid,
                        generation=guest.generation,
                        socket_prefix=box.run_directory / guest.socket_prefix,
                        started_from="template" if held.manifest.info.kind == "template" else "snapshot",
                    )
                )
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


def _check_fits(saved: Manifest, wanted: SandboxSpec) -> None:
    """The interpreter and the folders are part of the kernel's memory.

    Raises:
        SnapshotIncompatibleError: They are others.
    """
    then, now = _places(saved.spec), _places(wanted)
    for name in ("interpreter", "home") if saved.info.kind == "template" else then:
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
        "workspace": workspace and workspace.path,
        "mounts": sorted(mount.target or mount.source for mount in spec.mounts),
        "home": spec.home,
    }
