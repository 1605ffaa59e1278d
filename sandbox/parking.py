"""Sandboxes whose GPUs are given back while they live on, and that take some again before they go on."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import ended, to_its_end
from warmcell.sandbox.gpus.parking import ParkEngine, ParkingPlace, is_unclear
from warmcell.sandbox.kernel import Frontend, LeftKernel
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import GIB, GpuDevice, Parked, ParkedBy, SandboxId, SandboxInfo
from warmcell.sandbox.pool import memory_bytes
from warmcell.sandbox.registry import Registry
from warmcell.sandbox.showing import hide, show

log = logging.getLogger(__name__)

REMOTE = "remote"
"""Who owns what `%%remote` keeps for its next cell."""

WORKING_PCT = 5.0
"""A GPU that is busier than this works, whatever the kernel's messages say: a thread of it may be training."""


def moves_within(box: LiveSandbox, had: tuple[GpuDevice, ...]) -> bool:
    """Whether a sandbox sees other devices than those that it had, or is shown them."""
    return box.instance.shows_others or not any(gpu.device_nodes for gpu in had)


class Parking(Registry):
    """Sandboxes that can be parked. What is told of one is `SandboxInfo.parked`; its state stays `running`."""

    async def park(self, sandbox_id: SandboxId, *, unless: Callable[[], bool] = lambda: False) -> SandboxInfo:
        """Take what it has on its GPUs to the host's memory, and give the GPUs back. One that is parked stays so.

        Args:
            sandbox_id: Which.
            unless: Asked once its kernel is held; if true it goes on, for somebody wants something of it.

        Raises:
            UnsupportedOperationError: That cannot be done here, or with what it has there; nothing was touched.
            CapacityError: The host has no room for it; nothing was touched.
            ConflictError: It does not run, has no GPU, is wanted, or its GPU works.
            WarmcellError: It runs on as before, or its `parked` says that it does not.
        """
        box = self.live(sandbox_id)
        await self._exclusively(box, self._park(box, unless))
        return box.info

    def parked_bytes(self, *, owner: str | None = None) -> int:
        """What of the host's memory all that is parked takes, or what this owner has parked."""
        alive = [box.info for box in self._boxes.values() if box.info.state not in TERMINAL]
        mine = [info for info in alive if owner in (None, info.owner)]
        return sum(info.parked.vram_bytes for info in mine if info.parked is not None)

    async def _park(self, box: LiveSandbox, unless: Callable[[], bool]) -> None:
        if box.info.parked is not None:
            return
        place = self._parking_place()
        kernel, frontend = box.kernel, box.frontend
        if box.info.state is not State.RUNNING or kernel is None or not kernel.alive:
            raise errors.ConflictError(f"Sandbox {box.info.id} has no kernel that runs", hint="Start its kernel.")
        if not box.info.gpus:
            raise errors.ConflictError(f"Sandbox {box.info.id} has no GPU", hint="Suspend it to free its memory.")
        if frontend is None:
            raise errors.UnsupportedOperationError(
                "Nobody would notice when this sandbox is wanted again", hint="Suspend it, or stop it."
            )
        self.memory.check_gpus(box.spec, box.gpus)
        by = await self._who_moves(box, place)
        await self._check_idle(box)
        await self._check_host(box, place, await place.engine.vram_bytes(box.gpus, box.processes))
        began = time.perf_counter()
        try:
            left, parked = await self._leave(box, frontend, place, by, unless)
        except errors.UnsupportedOperationError:
            if by == "torch" or not place.by_torch or box.info.parked is not None:
                raise
            await place.engine.check_offload(box.gpus, box.processes)
            by = "torch"
            left, parked = await self._leave(box, frontend, place, by, unless)
        box.left = left
        box.tell(parked=parked, gpus=())
        if by == "driver":
            self._gpus.release(box.info.id)
        took = time.perf_counter() - began
        log.info(
            "sandbox %s is parked by %s with %.2f GiB after %.3f s, %.2f GiB stay on the GPU",
            box.info.id,
            parked.by,
            parked.vram_bytes / GIB,
            took,
            parked.stays_bytes / GIB,
        )
        await frontend.sleep(left.record)

    async def _who_moves(self, box: LiveSandbox, place: ParkingPlace) -> ParkedBy:
        """The driver, or torch where the driver cannot and the operator lets it.

        Raises:
            UnsupportedOperationError: Nobody can.
        """
        try:
            await place.engine.check(box.gpus, box.processes)
        except errors.UnsupportedOperationError:
            if not place.by_torch:
                raise
            await place.engine.check_offload(box.gpus, box.processes)
            return "torch"
        return "driver"

    async def _leave(
        self, box: LiveSandbox, frontend: Frontend, place: ParkingPlace, by: ParkedBy, unless: Callable[[], bool]
    ) -> tuple[LeftKernel, Parked]:
        """Hold its kernel and empty its GPUs. Whatever fails, it goes on, or is parked if it cannot.

        What torch leaves is leased no more.
        """
        kernel, left = box.kernel, LeftKernel(token=secrets.token_hex(16))
        assert kernel is not None
        moved = await frontend.pause(token=left.token, offload=place.engine.kind if by == "torch" else "")
        left.record = frontend.record()
        try:
            if unless():
                raise errors.ConflictError("The kernel is wanted again", hint="Park it when it is idle.")
            if by == "torch":
                most = sum(gpu.memory_total_bytes for gpu in box.gpus)
                parked = await place.engine.offloaded(box.gpus, box.processes, min(moved, most))
                await self._gpus.leave_behind(box.info.id, box.processes)
                return left, parked
            emptied, given_up = await ended(self._empty(box, place.engine, left))
            parked = emptied.result()
            if given_up:
                await to_its_end(self.memory.take_back(box, parked, left))
                raise asyncio.CancelledError
            return left, parked
        except BaseException:
            if box.info.parked is None:
                await frontend.go_on(kernel, left.record, token=left.token, restored=False, clone=False)
            raise

    async def _empty(self, box: LiveSandbox, engine: ParkEngine, left: LeftKernel) -> Parked:
        """All goes to the host, and it sees no device; if that is refused it has all back, or is parked."""
        parked = await engine.park(box.gpus, box.processes)
        try:
            await show(box, ())
        except Exception:
            await self.memory.take_back(box, parked, left)
            raise
        return parked

    async def _unpark(self, box: LiveSandbox, *, began: float, hurry: bool = False) -> None:
        """Have a sandbox go on that was parked, on a GPU that it gets now.

        Raises:
            WarmcellError: It stays parked, and has no GPU; or it has one, and its clients cannot go on with it yet.
        """
        parked = box.info.parked
        leased = time.perf_counter()
        if parked is not None:
            try:
                devices = await self._lease_again(box, parked, self._comes_back_on(box, parked), hurry=hurry)
            except BaseException:
                box.tell(phase=None)
                raise
            leased = time.perf_counter()
            if parked.by == "driver":
                await self._show(box, devices)
            try:
                back, given_up = await ended(self._parking_place().engine.unpark(parked, devices, box.processes))
                back.result()
                if given_up and parked.by == "torch":  # Whose turn has not come yet.
                    raise asyncio.CancelledError
                if parked.by == "torch":
                    await self._go_on(box)
            except BaseException as error:
                box.tell(phase=None)
                await self._stays_parked(box, parked, error)
                raise
            box.gpus = devices
            box.tell(parked=None, gpus=devices, phase=None)
            if given_up:
                raise asyncio.CancelledError
        unparked = time.perf_counter()
        if parked is None or parked.by != "torch":
            await self._go_on(box)
        box.left = None
        now = time.perf_counter()
        phases = {"queue": leased - began, "unpark": unparked - leased, "ready": now - unparked}
        box.tell(
            resumed_ms=round(1000 * (now - began), 1),
            phases_ms={name: round(1000 * took, 1) for name, took in phases.items()},
        )

    async def _go_on(self, box: LiveSandbox) -> None:
        kernel, frontend, left = box.kernel, box.frontend, box.left
        if frontend is not None and kernel is not None and left is not None:
            await frontend.go_on(kernel, left.record, token=left.token, restored=False, clone=False)

    async def _stays_parked(self, box: LiveSandbox, parked: Parked, error: BaseException) -> None:
        """It could not go on. Its lease goes, unless it may have what it had there by now."""
        if is_unclear(error):
            log.warning("parked sandbox %s keeps its GPU: it may be in use: %s", box.info.id, error)
        elif parked.by == "torch":
            await self._gpus.leave_behind(box.info.id, box.processes)
        elif await hide(box):
            self._gpus.release(box.info.id)

    async def _lease_anew(self, box: LiveSandbox) -> None:
        """A parked sandbox whose kernel is gone gets GPUs for the next one; raises as `_unpark`."""
        parked, asked = box.info.parked, box.spec.gpu
        if parked is None:
            box.left = None
            return
        stays = not moves_within(box, parked.gpus)
        devices = await self._lease_again(box, parked, _those(parked) if stays and asked is not None else asked)
        await self._show(box, devices)
        box.gpus, box.left = devices, None
        box.tell(parked=None, gpus=devices, phase=None)

    async def _lease_again(
        self, box: LiveSandbox, parked: Parked, asked: str | tuple[str, ...] | None, *, hurry: bool = False
    ) -> tuple[GpuDevice, ...]:
        """As `_lease`. What it could not be parted from is given back for another only once it does not see it."""
        fits = asked is not None and self._gpus.has(box.info.id, asked) is not None
        if parked.by == "driver" and self._gpus.holds(box.info.id) and not fits:
            await show(box, ())
        return await self._lease(box, asked, hurry=hurry)

    async def _show(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> None:
        """As `show`; whatever fails, what was leased for it is free, unless it may see that."""
        shown, given_up = await ended(show(box, devices))
        try:
            shown.result()
            if given_up:
                raise asyncio.CancelledError
        except BaseException as error:
            box.tell(phase=None)
            hidden = isinstance(error, errors.WarmcellError) or (await ended(hide(box)))[0].result()
            if hidden:
                self._gpus.release(box.info.id)
            raise

    def _parking_place(self) -> ParkingPlace:
        if self.parking is None:
            raise errors.UnsupportedOperationError("Kernels are not parked here", hint="Suspend it instead.")
        return self.parking

    def _comes_back_on(self, box: LiveSandbox, parked: Parked) -> str:
        if parked.by == "driver" and moves_within(box, parked.gpus):
            return self._parking_place().engine.comes_back_on(parked)
        return _those(parked)

    async def _check_idle(self, box: LiveSandbox) -> None:
        mine = {gpu.uuid: gpu for gpu in box.gpus if gpu.parts == 1 and not gpu.simulated}
        for row in await self._gpus.status() if mine else ():
            if row["uuid"] in mine and (row["utilization_pct"] or 0.0) >= WORKING_PCT:
                raise errors.ConflictError(
                    f"GPU {row['index']} works at {row['utilization_pct']:.0f} %", hint="Park it when that has ended."
                )

    async def _check_host(self, box: LiveSandbox, place: ParkingPlace, vram_bytes: int) -> None:
        """Whether the host has room for what comes from the GPU, within the budget and the sandbox's own cap."""
        taken, free = self.parked_bytes(), await asyncio.to_thread(place.free_bytes)
        left = min(place.budget_bytes - taken, free)
        if box.info.owner == REMOTE:
            # They cannot be suspended for others, so that without a bound they would leave nothing to notebooks.
            left = min(left, place.budget_bytes // 2 - self.parked_bytes(owner=REMOTE))
        if vram_bytes > left:
            raise errors.CapacityError(
                f"The kernel has {vram_bytes / GIB:.1f} GiB on the GPU, and {max(0, left) / GIB:.1f} GiB of the host's "
                "memory may still be used for parked kernels",
                hint="Raise c.Warmcell.park_memory, suspend kernels that are parked, close remote ones that are "
                "(%remote close), or free memory of the machine.",
                details={"vram_bytes": vram_bytes, "parked_bytes": taken, "free_bytes": free},
            )
        cap = box.info.limits.get("memory")
        if cap is None or not cap.enforced or cap.value is None or not vram_bytes:
            return
        used = await asyncio.to_thread(memory_bytes, box.processes)
        if used + vram_bytes > cap.value:
            raise errors.CapacityError(
                f"What the kernel has on the GPU ({vram_bytes / GIB:.1f} GiB) does not fit below its memory cap",
                hint=f"Give the notebook {(used + vram_bytes) / GIB:.0f} GiB of memory or more. It keeps its GPU.",
            )


def _those(parked: Parked) -> str:
    """A request for the very devices; there is one, for several cannot be parked."""
    first = parked.gpus[0]
    return first.uuid if first.parts == 1 else f"{first.uuid}/{first.parts}"
