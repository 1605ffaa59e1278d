"""Other GPUs for a kernel that lives, which keeps all its variables."""

import dataclasses
import logging
import secrets
import time
from collections.abc import Callable

from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import to_its_end
from warmcell.sandbox.gpus.parking import check_like, is_unclear
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.kernel import LeftKernel
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import GpuDevice, Parked, SandboxId, SandboxInfo, SandboxSpec
from warmcell.sandbox.showing import show
from warmcell.sandbox.suspending import Suspending

log = logging.getLogger(__name__)

GpuWish = str | tuple[str, ...] | None


class Moving(Suspending):
    """Sandboxes whose GPUs can be changed while they live."""

    async def change_gpu(
        self, sandbox_id: SandboxId, gpu: GpuWish, *, unless: Callable[[], bool] = lambda: False
    ) -> SandboxInfo:
        """Give it what is asked for instead of what it has. What it has is kept until the other is there.

        What is on its GPUs goes along to others of their kind. A kernel that has used none can have any, or none.
        Where its sandbox has no device node of the new ones it goes through the disk, into one that has.

        Args:
            sandbox_id: Which; it runs, or is parked.
            gpu: In the grammar of requests; None: no GPU.
            unless: Asked once its kernel is held; if true nothing is changed.

        Raises:
            NoGpuAvailableError: It is in use; nobody waits for that here.
            UnsupportedOperationError: What it has cannot go there, or not on this machine; it is as it was.
            WarmcellError: It is as it was; or it is suspended, and comes back with its next cell.
        """
        box = self.live(sandbox_id)
        await self._exclusively(box, self._change_gpu(box, gpu, unless))
        return box.info

    async def _change_gpu(self, box: LiveSandbox, gpu: GpuWish, unless: Callable[[], bool]) -> None:
        if box.info.state is not State.RUNNING or box.kernel is None or not box.kernel.alive:
            raise errors.ConflictError(
                f"Sandbox {box.info.id} has no kernel that runs", hint="Run a cell first, or restart the kernel."
            )
        spec = await self.check(dataclasses.replace(box.spec, gpu=gpu), owner=box.info.owner)
        began = time.perf_counter()
        if box.left is not None:
            await self._unpark(box, began=began)
        if spec.gpu is not None and self._gpus.has(box.info.id, spec.gpu) is not None:
            box.spec = spec
            box.tell(gpu=spec.gpu)
            return
        holder = new_sandbox_id()
        devices: tuple[GpuDevice, ...] = ()
        if spec.gpu is not None:
            devices = await self._gpus.lease(spec.gpu, holder=holder, owner=box.info.owner, wait_s=0.0)
        try:
            await self._check_can_go(box, devices)
            if _seen_in(box, devices):
                await self._change_in_place(box, spec, devices, holder, unless)
            else:
                await self.memory.check(box.spec)
                await self._change_through_disk(box, devices, holder, began=began)
        except BaseException:
            self._gpus.release(holder)  # Nothing, where the sandbox has taken it over.
            raise
        box.spec = spec
        box.tell(gpu=spec.gpu, gpus=devices, resumed_ms=round(1000 * (time.perf_counter() - began), 1))
        names = ", ".join(device.name for device in devices) or "none"
        log.info("sandbox %s has other GPUs: %s, after %.3f s", box.info.id, names, time.perf_counter() - began)

    async def _check_can_go(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> None:
        """Whether what is on its GPUs could go on on these; said before anything is touched."""
        self.memory.check_gpus(box.spec, (*box.gpus, *devices))
        if not box.gpus:
            return
        engine = self._parking_place().engine
        await engine.check(box.gpus, box.processes)
        bound = await engine.uses_gpus(box.gpus, box.processes)
        check_like(Parked(gpus=box.gpus, since=time.time(), bound=bound), devices)

    async def _change_in_place(
        self,
        box: LiveSandbox,
        spec: SandboxSpec,
        devices: tuple[GpuDevice, ...],
        holder: SandboxId,
        unless: Callable[[], bool],
    ) -> None:
        """Its processes stay. If they cannot go on on the new devices they do on the old ones, or it is parked."""
        kernel, frontend = box.kernel, box.frontend
        assert kernel is not None
        left = LeftKernel(token=secrets.token_hex(16))
        if frontend is not None:
            await frontend.pause(token=left.token)
            left.record = dict(frontend.record())
        try:
            if unless():
                raise errors.ConflictError("The kernel is wanted", hint="Try again when its cell has ended.")
            await to_its_end(self._go_over(box, spec, devices, holder, left))
        finally:
            if frontend is not None and box.info.parked is None:
                await frontend.go_on(kernel, left.record, token=left.token, restored=False, clone=False)

    async def _go_over(
        self,
        box: LiveSandbox,
        spec: SandboxSpec,
        devices: tuple[GpuDevice, ...],
        holder: SandboxId,
        left: LeftKernel,
    ) -> None:
        """Once its kernel is held: one piece, at whose end it is known what it has, and leases say the same."""
        if box.gpus:
            engine = self._parking_place().engine
            parked = await engine.park(box.gpus, box.processes)
            seen = box.gpus
            try:
                await show(box, devices)
                seen = devices
                await engine.unpark(parked, devices, box.processes)
            except Exception as first:
                try:
                    if seen == devices and is_unclear(first):  # It may yet be there: not to be brought to another.
                        raise
                    await show(box, box.gpus)
                except Exception as error:
                    if seen == devices:  # Which nobody else may have then.
                        self._take_over(box, holder)
                    await self.memory.stays_parked(box, parked, left, error)
                else:
                    await self.memory.take_back(box, parked, left)
                raise
        else:
            await show(box, devices)
        self._take_over(box, holder)
        box.gpus, box.spec = devices, spec
        box.tell(gpu=spec.gpu, gpus=devices)

    async def _change_through_disk(
        self, box: LiveSandbox, devices: tuple[GpuDevice, ...], holder: SandboxId, *, began: float
    ) -> None:
        """It is suspended, and goes on in a sandbox that has the new devices."""
        before = box.info.snapshot
        await self.memory.suspend(box)
        self._take_over(box, holder)
        self._spawn(self._supersede(box, before))
        try:
            await self.memory.resume(box, devices, began=began)
        except BaseException:
            self._gpus.release(box.info.id)
            raise

    def _take_over(self, box: LiveSandbox, holder: SandboxId) -> None:
        """What was leased for it becomes its own, and what it had is free."""
        self._gpus.release(box.info.id)
        self._gpus.move(holder, box.info.id)


def _seen_in(box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> bool:
    """Whether its sandbox has the device nodes of these, or can be shown them."""
    there = {node for gpu in box.gpus for node in gpu.device_nodes}
    return box.instance.shows_others or all(node in there for gpu in devices for node in gpu.device_nodes)
