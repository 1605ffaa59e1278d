"""What is done with the memory of sandboxes, by their ids and one thing at a time; `memory` knows how."""

import dataclasses
import time
from collections.abc import Callable

from warmcell.sandbox.coming import Coming
from warmcell.sandbox.ids import known_sandbox_id
from warmcell.sandbox.kernel import Frontend, KernelProcess
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo, SnapshotId, SnapshotInfo, SnapshotKind
from warmcell.sandbox.parking import Parking
from warmcell.sandbox.registry import NOTEBOOK
from warmcell.sandbox.snapshots.manifest import Manifest


class Suspending(Parking):
    """Sandboxes that can be saved, suspended and brought back."""

    async def snapshot(
        self,
        sandbox_id: SandboxId,
        *,
        name: str = "",
        kind: SnapshotKind = "named",
        coming: Coming | None = None,
    ) -> SnapshotInfo:
        """Save its memory and its files; its kernel goes on after a pause.

        Raises:
            UnsupportedOperationError: That cannot be done here; nothing was touched.
            ConflictError: The name is taken; nothing was touched.
            WarmcellError: Nothing was saved, and the kernel goes on as before.
        """
        box = self.live(sandbox_id)
        engine = await self.memory.check_now(box)
        self.memory.store.check_free(name, kernel_id=box.info.kernel_id, sandbox_id=sandbox_id)
        saved = await self._exclusively(box, self.memory.save(box, kind=kind, name=name, coming=coming))
        if engine.whole and kind == "named":
            self.memory.twins.want(box)
        return saved

    async def suspend(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Save it, end its processes and give its GPUs back; it is listed as before, under its id.

        Raises:
            UnsupportedOperationError: That cannot be done here; nothing was touched.
            WarmcellError: It runs on as before.
        """
        box = self.live(sandbox_id)
        await self.memory.check_now(box)
        await self._exclusively(box, self._suspend(box))
        return box.info

    async def _suspend(self, box: LiveSandbox) -> None:
        """All that follows from it, which also who gives it up too late does not keep from it."""
        before = box.info.snapshot
        await self.memory.suspend(box)
        self._gpus.release(box.info.id)
        self._spawn(self._supersede(box, before))
        self.memory.twins.want(box)

    async def resume(self, sandbox_id: SandboxId, *, hurry: bool = False) -> SandboxInfo:
        """Have a suspended sandbox go on where it was. One that runs is as it is.

        Args:
            sandbox_id: Which.
            hurry: It does not wait for GPUs.

        Raises:
            WarmcellError: It stays suspended, with its snapshot as it was.
        """
        box = self.live(sandbox_id)
        return await self._exclusively(box, self._resume(box, hurry=hurry))

    async def reopen(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Have a suspended sandbox up again with its files, without the kernel that it had. One that runs is as it is.

        Raises:
            WarmcellError: It stays suspended.
        """
        box = self.live(sandbox_id)
        return await self._exclusively(box, self._resume(box, with_kernel=False))

    async def restore(self, sandbox_id: SandboxId, ref: str) -> SandboxInfo:
        """Put its kernel back to one of its snapshots, by name or id; what it was suspended as is not needed for it.

        Raises:
            SnapshotNotFoundError: It has none of that name.
            WarmcellError: Its kernel runs on as it was, or stays suspended.
        """
        box = self.live(sandbox_id)
        manifest = self.memory.store.get(ref, kernel_id=box.info.kernel_id)
        snapshot = manifest.info
        if snapshot.kernel_id != box.info.kernel_id:  # It was brought in, and says itself what it had.
            self.admission.bounds.check(manifest.spec)
        engine = await self.memory.check(box.spec)
        await self._exclusively(box, self._undo(box, snapshot.id))
        if engine.whole:
            self.memory.twins.want(box)
        return box.info

    async def _undo(self, box: LiveSandbox, snapshot: SnapshotId) -> None:
        before = box.info.snapshot
        if box.info.state is State.SUSPENDED:
            await self._resume(box, snapshot)
        else:
            await self.memory.undo(box, snapshot)
        if before != snapshot:
            self._spawn(self.memory.forget_suspended(before))

    async def _supersede(self, box: LiveSandbox, before: SnapshotId | None) -> None:
        if box.info.snapshot is not None:
            await self.memory.supersede(before, box.info.snapshot, box.spec)

    def revive(self, manifest: Manifest, frontend: Callable[[LiveSandbox], Frontend]) -> LiveSandbox:
        """A sandbox that was suspended when another keeper went is suspended here."""
        saved = manifest.info
        assert saved.sandbox_id is not None
        box = self._new(manifest.spec, owner=NOTEBOOK, kernel_id=saved.kernel_id, notebook=saved.notebook)
        box.info = dataclasses.replace(
            box.info,
            id=saved.sandbox_id,
            principal=saved.principal,
            state=State.SUSPENDED,
            snapshot=saved.id,
            not_saved=saved.not_saved,
            created_at=saved.created_at,
            generation=manifest.guest.generation,
        )
        box.kernel = KernelProcess(
            pid=manifest.guest.pid,
            generation=manifest.guest.generation,
            socket_prefix=box.directory / "run" / manifest.guest.socket_prefix,
            started_from="snapshot",
        )
        box.named = known_sandbox_id(manifest.guest.named) or saved.sandbox_id
        box.frontend = frontend(box)
        self._boxes[box.info.id] = box
        self._publish(box)
        self._spawn(self._watch(box))
        return box

    def forget_revived(self, sandbox_id: SandboxId) -> None:
        """Take one off the list that could not be revived whole. Its snapshot stays, for another keeper."""
        self._boxes.pop(sandbox_id, None)

    def _where_it_was(self, snapshot: SnapshotId) -> str | None:
        """The request by which what it had on GPUs can go on; None: it had nothing there."""
        parked = self.memory.store.get(snapshot).parked
        if parked is None or not parked.bound:
            return None
        return self._parking_place().engine.comes_back_on(parked)

    async def _resume(
        self, box: LiveSandbox, snapshot: SnapshotId | None = None, *, with_kernel: bool = True, hurry: bool = False
    ) -> SandboxInfo:
        began = time.perf_counter()
        if box.left is not None and box.info.state is State.RUNNING:
            if with_kernel:
                await self._unpark(box, began=began, hurry=hurry)
            else:
                await self._lease_anew(box)
            return box.info
        if box.info.state is not State.SUSPENDED:
            return box.info
        box.spec = self.admission.within_bounds(box.spec, box.info.principal)
        if box.door is None:  # It was suspended by another keeper.
            self._give_door(box)
        try:
            target = snapshot or box.info.snapshot
            assert target is not None
            devices = await self._lease(box, self._where_it_was(target) if with_kernel else None, hurry=hurry)
            await self.memory.resume(box, devices, began=began, snapshot=snapshot, with_kernel=with_kernel)
        except BaseException:
            self._gpus.release(box.info.id)
            if box.info.phase is not None:
                box.tell(phase=None)
            raise
        return box.info
