"""How a kernel's memory and its sandbox's files are saved, and what may then be ended.

The order of things is what keeps a kernel safe. Its clients are held first, then its memory and its files are saved
from one freeze, and only when both are on disk is anything ended.
"""

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import ended, to_its_end
from warmcell.sandbox.coming import Coming
from warmcell.sandbox.gpus.parking import is_unclear
from warmcell.sandbox.ids import new_snapshot_id
from warmcell.sandbox.kernel import Frontend, KernelProcess, LeftKernel
from warmcell.sandbox.lifecycle import Event, State, transition
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import Parked, SnapshotId, SnapshotInfo, SnapshotKind
from warmcell.sandbox.pool import memory_bytes
from warmcell.sandbox.saved import Saved
from warmcell.sandbox.showing import hide, show
from warmcell.sandbox.snapshots.base import Dumped, Then
from warmcell.sandbox.snapshots.manifest import GuestIdentity, Manifest

log = logging.getLogger(__name__)


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


class Saving(Saved):
    """Saves a running kernel, which then goes on or ends."""

    async def save(
        self,
        box: LiveSandbox,
        *,
        kind: SnapshotKind,
        name: str = "",
        environment: Mapping[str, str] | None = None,
        coming: Coming | None = None,
    ) -> SnapshotInfo:
        """Save a running kernel, which goes on after a pause.

        Args:
            box: Where it is.
            kind: What the snapshot is for.
            name: As its user calls it.
            environment: Identity of what it was made from.
            coming: Told of it as soon as its files are there.

        Raises:
            WarmcellError: Nothing was saved; the kernel goes on as before.
        """
        saved = await self._save(box, kind=kind, name=name, then="go_on", environment=environment or {}, coming=coming)
        return saved.info

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
        asleep, _ = await ended(self._sleep(box, manifest))  # Its process has ended: it is suspended, or nothing.
        asleep.result()
        return manifest.info

    async def _sleep(self, box: LiveSandbox, manifest: Manifest) -> None:
        """A kernel that was saved has ended: remove its sandbox, and answer for it."""
        await box.discard()
        box.gpus, box.left = (), None
        box.tell(
            state=transition(box.info.state, Event.SUSPEND_DONE),
            snapshot=manifest.info.id,
            not_saved=manifest.info.not_saved,
            gpus=(),
            parked=None,
            phase=None,
        )
        if box.frontend is not None:
            await box.frontend.sleep(manifest.kernel)

    async def _save(
        self,
        box: LiveSandbox,
        *,
        kind: SnapshotKind,
        then: Then,
        name: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
        coming: Coming | None = None,
    ) -> Manifest:
        engine = await self.check_now(box)
        kernel, frontend = box.kernel, box.frontend
        if kernel is None or not kernel.alive:
            raise errors.ConflictError(f"Sandbox {box.info.id} has no kernel", hint="Start its kernel first.")
        if self.store.quota_bytes is not None:
            await self.store.make_room(await asyncio.to_thread(memory_bytes, box.processes))
        left = box.left
        """It is parked, or was: its clients have left it already, and go on to wait."""
        token = secrets.token_hex(16) if left is None else left.token
        if box.info.parked is None and box.gpus and self.park_engine is not None:
            await self.park_engine.check(box.gpus, box.processes)
        parked = box.info.parked
        if parked is not None and parked.by == "torch":
            raise errors.UnsupportedOperationError(
                "This kernel is parked by torch, and a part of it is on its GPU still, which cannot be saved",
                hint="Run a cell first. The driver parks kernels with one whole GPU, which can be saved.",
            )
        not_saved = () if engine.whole or kind == "template" else await self._besides(box)
        snapshot = new_snapshot_id()
        frozen = asyncio.Event()
        async with self.store.draft(snapshot) as draft:
            clock = Clock()
            if frontend is not None and left is None:
                await self._pause(frontend, kernel, token=token)
            clock.end("settle")
            record = left.record if left is not None else frontend.record() if frontend is not None else {}

            in_host: Parked | None = None
            """What was parked for the moment."""

            async def go_on() -> None:
                """What was not parked before goes on, on its GPUs; the rest waits on."""
                nonlocal in_host
                to_take, in_host = in_host, None
                if to_take is not None:
                    await self.take_back(box, to_take, left or LeftKernel(token, record))
                if frontend is not None and left is None and box.info.parked is None:
                    await frontend.go_on(kernel, record, token=token, restored=False, clone=False)

            if box.info.parked is None and box.gpus and self.park_engine is not None:
                parking, given_up = await ended(self.park_engine.park(box.gpus, box.processes))
                try:
                    in_host = parked = parking.result()
                    if given_up:
                        raise asyncio.CancelledError
                except BaseException:
                    await to_its_end(go_on())
                    raise
                clock.end("park")
            manifest = self._manifest(
                box, kernel, snapshot, record, engine=engine.name, kind=kind, name=name, token=token
            )
            manifest = dataclasses.replace(
                manifest,
                info=dataclasses.replace(manifest.info, not_saved=not_saved),
                environment=environment,
                parked=parked,
            )

            async def when_stopped() -> None:
                assert coming is not None
                coming.files_go()
                await draft.empty()
                await box.instance.save_layer(draft.layer)
                coming.files_are(draft.layer)

            async def while_frozen() -> None:
                clock.end("memory")
                if not engine.whole and (coming is None or not coming.has_files):
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

            if engine.whole:
                await box.unwatch()
            dump = asyncio.ensure_future(
                engine.dump(
                    box.instance,
                    pid=kernel.pid,
                    image=snapshot,
                    then=then,
                    while_frozen=while_frozen,
                    when_stopped=None if coming is None or engine.whole else when_stopped,
                    passing=kind == "fork",
                )
            )
            thawed = asyncio.ensure_future(frozen.wait())
            gone_on = False
            try:
                # A whole sandbox is back only when all is done.
                await asyncio.wait({dump} if engine.whole else {dump, thawed}, return_when=asyncio.FIRST_COMPLETED)
                if engine.whole and then == "go_on" and dump.exception() is None:
                    box.watch()
                if then == "go_on" or (dump.done() and dump.exception() is not None):
                    await to_its_end(go_on())
                    gone_on = True
                dumped = await dump
            except BaseException:
                dump.cancel()
                await asyncio.gather(dump, return_exceptions=True)
                if frozen.is_set():
                    try:
                        await self.store.discard(snapshot)
                    except Exception as error:  # The kernel goes on in any case.
                        log.warning("snapshot %s, which is not whole, is not removed: %s", snapshot, error)
                if engine.whole or (frozen.is_set() and then == "stop"):
                    await box.unwatch()
                    box.watch()
                if not gone_on:
                    with contextlib.suppress(errors.WarmcellError):  # What went wrong first is what the caller is told.
                        await to_its_end(go_on())
                raise
            finally:
                thawed.cancel()
        clock.end("finish")
        if coming is not None:
            coming.is_there(snapshot)
        amended, _ = await ended(
            self._amend(manifest, dumped, clock.phases_ms)
        )  # It is there, and nobody can give it up.
        return amended.result()

    async def _pause(self, frontend: Frontend, kernel: KernelProcess, *, token: str) -> None:
        """Have its clients wait. Where that is given up they go on, also if they had left already."""
        pausing = asyncio.ensure_future(frontend.pause(token=token))

        async def take_back() -> None:
            await asyncio.wait({pausing})
            if not pausing.cancelled() and pausing.exception() is None:
                await frontend.go_on(kernel, frontend.record(), token=token, restored=False, clone=False)

        try:
            await asyncio.wait({pausing})
        except asyncio.CancelledError:
            pausing.cancel()
            await to_its_end(take_back())
            raise
        pausing.result()

    async def _besides(self, box: LiveSandbox) -> tuple[str, ...]:
        """Commands that a kernel comes back without; none where its guest does not tell, which keeps nobody from it."""
        try:
            return (await box.background()).told
        except errors.WarmcellError as error:
            log.warning("what else runs in sandbox %s is not known: %s", box.info.id, error)
            return ()

    async def take_back(self, box: LiveSandbox, parked: Parked, left: LeftKernel) -> None:
        """Have a sandbox see its GPUs, and have back at once what was parked. If it cannot, it stays parked.

        To be awaited to its end: a driver cannot be stopped half-way.
        """
        assert self.park_engine is not None
        try:
            await show(box, box.gpus)
            await self.park_engine.unpark(parked, box.gpus, box.processes)
        except Exception as error:  # Whatever it is, its memory is not where the kernel could go on with it.
            await self.stays_parked(box, parked, left, error)

    async def stays_parked(self, box: LiveSandbox, parked: Parked, left: LeftKernel, error: Exception) -> None:
        """It was to have back at once what it had on its GPUs, and cannot: its next cell tries again, as of any parked.

        Its GPUs are free then, unless it may have what it had there by now.
        """
        log.warning("sandbox %s cannot go on with its GPU for now, and is parked: %s", box.info.id, error)
        box.left = left
        box.tell(parked=parked, gpus=())
        if not is_unclear(error) and await hide(box):
            self._release_gpus(box.info.id)
        if box.frontend is not None:
            await box.frontend.sleep(left.record)

    def _manifest(
        self,
        box: LiveSandbox,
        kernel: KernelProcess,
        snapshot: SnapshotId,
        record: Mapping[str, Any],
        *,
        engine: str,
        kind: SnapshotKind,
        name: str,
        token: str,
    ) -> Manifest:
        now = time.time()
        info = SnapshotInfo(
            id=snapshot,
            name=name,
            kind=kind,
            engine=engine,
            sandbox_id=box.info.id,
            principal=box.info.principal,
            kernel_id=box.info.kernel_id,
            notebook=box.info.notebook,
            parent=box.info.snapshot,
            cell=record.get("cell"),
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
                socket_prefix=kernel.socket_prefix.name,
                pid=kernel.pid,
                generation=kernel.generation,
                token=token,
                named=box.named,
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
