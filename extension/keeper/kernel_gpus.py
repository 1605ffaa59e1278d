"""The GPUs of kernels that live: given back while they are idle, and exchanged for others."""

import abc
import dataclasses
import logging
from collections.abc import Callable

from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox import errors
from warmcell.sandbox.models import SandboxId, SandboxInfo
from warmcell.sandbox.moving import GpuWish
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)


class KernelGpus(abc.ABC):
    """What can be done with the GPUs of kernels while their clients stay connected."""

    def __init__(self, service: SandboxService, kernels: Kernels) -> None:
        self._service = service
        self._kernels = kernels
        self.parking: set[SandboxId] = set()
        """Those that are being parked."""
        self.wakes_early = True
        """Whether a parked kernel goes on before its next cell is there, at a sign that it will be."""
        self.in_use: Callable[[SandboxId], bool] = lambda sandbox_id: False
        """Whether something runs in one that its kernel knows nothing of."""

    @abc.abstractmethod
    async def suspend(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Save it to disk and end its processes."""

    async def park(self, sandbox_id: SandboxId, *, by_hand: bool = True) -> SandboxInfo:
        """Give its GPUs back and keep it alive; its first cell takes some again. Others make room for it on the host.

        Args:
            sandbox_id: Which.
            by_hand: Somebody wants just that, and has not merely left it idle.

        Raises:
            ConflictError: It is busy, or its GPU works.
            WarmcellError: As `SandboxService.park`.
        """
        kernel = self._of(sandbox_id)
        if kernel is None:
            return await self._service.park(sandbox_id)
        async with kernel.lock:
            if kernel.proxy.busy:
                raise errors.ConflictError("The kernel is busy", hint="Park it when its cell has ended.")
            self.parking.add(sandbox_id)
            try:
                info = await self._park(sandbox_id, lambda: kernel.proxy.busy or self.in_use(sandbox_id))
            finally:
                self.parking.discard(sandbox_id)
            kernel.kept_parked = by_hand
            return info

    async def wake(self, sandbox_id: SandboxId, *, returned: bool = False) -> SandboxInfo:
        """A cell is likely to come: have its parked kernel go on, if that takes a GPU from nobody.

        Once between two cells, so that whoever writes for hours and runs nothing gets the GPU once; and whenever
        somebody comes back. From then on the kernel is as idle as after a cell, and is parked again after as long.
        Whatever stands in the way, the cell will do what a cell does.

        Args:
            sandbox_id: Which.
            returned: Somebody has come back to its notebook.

        Raises:
            NotFoundError: There is no such sandbox.
            UnsupportedOperationError: It has no kernel.
        """
        kernel = self._of(sandbox_id)
        if kernel is None:
            raise errors.UnsupportedOperationError("It has no kernel", hint="Nothing is parked there.")
        info, ran = self._service.info(sandbox_id), kernel.proxy.cell or 0
        if info.parked is None or not self._may_wake(kernel, None if returned else ran):
            return info
        async with kernel.lock:
            try:
                info = await self._service.resume(sandbox_id, hurry=True)
            except errors.WarmcellError as error:
                log.debug("kernel %s does not go on before its cell: %s", kernel.request.kernel_id, error)
                return self._service.info(sandbox_id)
        if not returned:
            kernel.woken_after = ran
        log.info("kernel %s goes on before its cell", kernel.request.kernel_id)
        return info

    def _may_wake(self, kernel: Kernel, ran: int | None) -> bool:
        if kernel.kept_parked or kernel.lock.locked():
            return False
        return self.wakes_early and (ran is None or kernel.woken_after != ran)

    async def _park(self, sandbox_id: SandboxId, unless: Callable[[], bool]) -> SandboxInfo:
        while True:
            try:
                return await self._service.park(sandbox_id, unless=unless)
            except errors.CapacityError:
                if not await self._suspend_longest_parked():
                    raise

    async def change_gpu(self, sandbox_id: SandboxId, gpu: GpuWish, *, even_busy: bool = False) -> SandboxInfo:
        """Give it other GPUs, its variables kept, until its next restart with another wish.

        Raises:
            ConflictError: It is busy, and that was not asked for.
            WarmcellError: As `SandboxService.change_gpu`.
        """
        kernel = self._of(sandbox_id)
        if kernel is None:
            raise errors.UnsupportedOperationError("It has no kernel", hint="Make a new sandbox with that GPU.")
        async with kernel.lock:
            if kernel.proxy.busy and not even_busy:
                raise errors.ConflictError("The kernel is busy", hint="Change its GPU when its cell has ended.")
            await self._service.resume(sandbox_id)
            info = await self._service.change_gpu(sandbox_id, gpu, unless=lambda: kernel.proxy.busy and not even_busy)
            spec = dataclasses.replace(kernel.request.spec, gpu=info.gpu)
            kernel.request = dataclasses.replace(kernel.request, spec=spec)
            return info

    async def _suspend_longest_parked(self) -> bool:
        """Whether host memory was freed that way."""
        parked = [info for info in self._service.infos() if info.parked is not None and info.parked.vram_bytes]
        for info in sorted(parked, key=lambda each: each.parked.since if each.parked else 0.0):
            kernel = self._of(info.id)
            if kernel is None or kernel.lock.locked() or kernel.proxy.busy:
                continue
            try:
                await self.suspend(info.id)
            except errors.WarmcellError as error:
                log.debug("parked kernel %s cannot be suspended: %s", info.kernel_id, error)
                continue
            log.info("kernel %s was suspended: others are to be parked", info.kernel_id)
            return True
        return False

    def _of(self, sandbox_id: SandboxId) -> Kernel | None:
        return self._kernels.of(sandbox_id)
