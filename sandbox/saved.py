"""Engine and store: whether memory can be saved on this machine, and what has been saved of it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.gpus.parking import ParkEngine
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import GpuDevice, SandboxId, SandboxSpec, SnapshotId
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import EngineReport
from warmcell.sandbox.snapshots.base import SnapshotEngine
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


Turn = Callable[[LiveSandbox], contextlib.AbstractAsyncContextManager[float]]
"""Had by a sandbox while it is being brought up; gives the milliseconds that it waited for that."""


class Saved:
    """Knows engine and store; of sandboxes it knows what `LiveSandbox` offers."""

    def __init__(
        self,
        *,
        engine: SnapshotEngine | None,
        others: Sequence[SnapshotEngine] = (),
        store: SnapshotStore,
        backend_of: Callable[[SandboxSpec], SandboxBackend],
        paths: Paths,
        park_engine: ParkEngine | None = None,
        release_gpus: Callable[[SandboxId], None],
        turn: Turn,
    ) -> None:
        self.store = store
        self.park_engine = park_engine
        self._release_gpus = release_gpus
        self._engine = engine
        self._others = tuple(others)
        """For backends that the first does not serve."""
        self._reports: dict[int, asyncio.Task[EngineReport]] = {}
        """Of the others, by their place among them."""
        self._backend_of = backend_of
        self._paths = paths
        self._turn = turn
        self._trying: asyncio.Task[EngineReport] | None = None
        self._tried_at = 0.0
        store.on_removed = self.image_dropped
        store.remeasure = self.remeasure

    async def open(self) -> None:
        """Read what the store has, and begin to try the engine."""
        await self.store.open()
        self._trying, self._tried_at = asyncio.create_task(self._try()), time.monotonic()

    async def close(self) -> None:
        """End the engine, once it has dropped what was removed."""
        await self.store.all_gone()
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        for report in self._reports.values():
            report.cancel()
        await asyncio.gather(*self._reports.values(), return_exceptions=True)
        for engine in self._engines():
            await engine.close()

    async def report(self) -> EngineReport:
        """Whether memory can be saved on this machine, tried for real."""
        if self._trying is None:
            return NO_ENGINE
        report = await asyncio.shield(self._trying)
        if not report.ready and time.monotonic() - self._tried_at > TRY_AGAIN_S:
            self._trying, self._tried_at = asyncio.create_task(self._try()), time.monotonic()
        return report

    async def reports(self) -> list[EngineReport]:
        """The same of each engine, the one that serves most backends first."""
        return list(await asyncio.gather(self.report(), *map(self._report_of, range(len(self._others)))))

    async def check(self, spec: SandboxSpec) -> SnapshotEngine:
        """The engine that saves sandboxes of this kind.

        Raises:
            UnsupportedOperationError: There is none; said before anything is done.
        """
        backend = self._backend_of(spec)
        for number, other in enumerate(self._others):
            if _serves(other, backend):
                return await self._other(number)
        report = await self.report()
        if self._engine is None or not report.ready:
            raise errors.UnsupportedOperationError(
                f"Memory cannot be saved on this machine: {report.why_not}", hint=report.hint
            )
        if not _serves(self._engine, backend):
            raise errors.UnsupportedOperationError(
                f"The {backend.name} backend cannot save memory", hint="Use the bubblewrap backend."
            )
        return self._engine

    async def check_now(self, box: LiveSandbox) -> SnapshotEngine:
        """The engine that saves this sandbox, with what it has by now; raises as `check` and `check_gpus`."""
        self.check_gpus(box.spec, box.gpus)
        return await self.check(box.spec)

    def check_gpus(self, spec: SandboxSpec, gpus: Sequence[GpuDevice]) -> None:
        """See that what such a sandbox has on these devices could be taken off them, or brought to them.

        Raises:
            UnsupportedOperationError: It has a kernel of its own, whose processes the machine's driver does not know.
        """
        backend = self._backend_of(spec)
        if backend.capabilities.own_kernel and any(not gpu.simulated for gpu in gpus):
            raise errors.UnsupportedOperationError(
                f"A {backend.name} sandbox keeps the GPU that it was made with: it can be neither parked nor saved",
                hint="Stop it, or use the bubblewrap backend.",
            )

    async def _other(self, number: int) -> SnapshotEngine:
        """One of those, tried once.

        Raises:
            UnsupportedOperationError: It does not work here.
        """
        report = await self._report_of(number)
        if not report.ready:
            raise errors.UnsupportedOperationError(
                f"Memory of such a sandbox cannot be saved on this machine: {report.why_not}", hint=report.hint
            )
        return self._others[number]

    async def _report_of(self, number: int) -> EngineReport:
        if number not in self._reports:
            self._reports[number] = asyncio.create_task(self._tried(self._others[number]))
        trying = self._reports[number]
        report = await asyncio.shield(trying)
        if not report.ready and self._reports.get(number) is trying:
            del self._reports[number]
        return report

    def _engines(self) -> list[SnapshotEngine]:
        return [*([] if self._engine is None else [self._engine]), *self._others]

    def fingerprint(self, spec: SandboxSpec) -> str:
        """What the environment of such sandboxes is known by, see `SandboxBackend`. Blocks."""
        return self._backend_of(spec).fingerprint(spec)

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
        return NO_ENGINE if self._engine is None else await self._tried(self._engine)

    async def _tried(self, engine: SnapshotEngine) -> EngineReport:
        try:
            report = await engine.probe()
        except Exception as error:  # One that is broken serves nobody, and is tried again like one that is not there.
            log.exception("the engine %s cannot be tried", engine.name)
            why = f"{engine.name} cannot be tried ({type(error).__name__}: {error})"
            return EngineReport(name=engine.name, ready=False, why_not=why, hint="The keeper's log says more.")
        if report.ready:
            try:
                for image in await engine.images():
                    if image.id not in self.store.ids:
                        log.warning("removed image %s, which belongs to no snapshot", image.id)
                        await engine.drop(image.id)
            except (errors.WarmcellError, OSError) as error:
                log.error("images cannot be looked through: %s", error)
        return report

    async def remeasure(self) -> None:
        """Take note of images that have become smaller or larger since they were made, or have been compressed."""
        engine = await self._that_shares()
        if engine is None:
            return
        known = {info.id: (info.image_bytes, info.image_compressed) for info in self.store.infos()}
        images = await engine.images()
        self.store.shared = {image.id: image.shared_bytes for image in images}
        for image in images:
            now = image.image_bytes, image.compressed
            if known.get(image.id, now) != now:
                await self.store.amend(image.id, image_bytes=image.image_bytes, image_compressed=image.compressed)

    async def _that_shares(self) -> SnapshotEngine | None:
        """An engine that was tried and works, whose images have memory in common. They are all of one kind."""
        if self._engine is not None and (await self.report()).ready:
            return self._engine
        for number, trying in self._reports.items():
            other = self._others[number]
            if not other.whole and trying.done() and not trying.cancelled() and trying.result().ready:
                return other
        return None

    async def image_dropped(self, snapshot: SnapshotId) -> None:
        """Told by the store of a snapshot that is gone."""
        for engine in self._engines():
            with contextlib.suppress(errors.WarmcellError):
                await engine.drop(snapshot)

    async def _outlive(self, snapshot: SnapshotId) -> None:
        """Its kernel goes on from it, so it is not what a keeper would take up again."""
        if self.store.get(snapshot).info.kind == "suspended":
            await self.store.amend(snapshot, kind="outlived")

    async def supersede(self, before: SnapshotId | None, by: SnapshotId, spec: SandboxSpec) -> None:
        """Forget what a kernel was suspended as before, once what it is suspended as now outlives a loss of power.

        Where that cannot be known the one before stays, until a later one is known to do so.

        Raises:
            SnapshotCorruptError: The machine stopped before that: the one before is all that there is.
            SnapshotNotFoundError: Likewise.
        """
        if before is None or before == by or not self._is_suspended(before):
            return
        try:
            await (await self.check(spec)).settle(by)
            await self.store.written(by)
        except (errors.SnapshotCorruptError, errors.SnapshotNotFoundError):
            if by in self.store.ids:  # Else its kernel is gone as well, by now.
                raise
        except errors.WarmcellError as error:
            log.warning("snapshot %s stays, since it is not known whether %s is on the disk: %s", before, by, error)
            return
        now = self.store.get(by).info if by in self.store.ids else None
        await self.forget_suspended(before)
        if now is not None and now.sandbox_id is not None:
            for info in self.store.infos(sandbox_id=now.sandbox_id):
                if info.created_at < now.created_at:
                    await self.forget_suspended(info.id)

    async def forget_kernel(self, sandbox_id: SandboxId) -> None:
        """All that its kernel was suspended as, or went on from; what has a name stays."""
        for info in self.store.infos(sandbox_id=sandbox_id):
            await self.forget_suspended(info.id)

    async def forget_suspended(self, snapshot: SnapshotId | None) -> None:
        """A suspended kernel's snapshot that the kernel has outlived; a named one stays."""
        if snapshot is not None and self._is_suspended(snapshot):
            await self.store.discard(snapshot)

    def _is_suspended(self, snapshot: SnapshotId) -> bool:
        with contextlib.suppress(errors.SnapshotNotFoundError):
            return self.store.get(snapshot).info.kind in ("suspended", "outlived")
        return False


def _serves(engine: SnapshotEngine, backend: SandboxBackend) -> bool:
    declared = engine.name in backend.capabilities.snapshot_engines
    return declared and (not engine.backends or backend.name in engine.backends)
