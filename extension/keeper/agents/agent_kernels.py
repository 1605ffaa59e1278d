"""When the kernels come up of sandboxes that code has asked for: behind, in nobody's way, or with the first code.

Commands and files need no kernel, so nobody who has just made a sandbox is kept waiting for one.
"""

import asyncio
import contextlib
import logging

from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)


class AgentKernels:
    """Of all such sandboxes of one keeper."""

    def __init__(self, service: SandboxService, kernels: Kernels, memory: KernelMemory) -> None:
        self._service = service
        self._kernels = kernels
        self._memory = memory
        self._coming: dict[SandboxId, asyncio.Task[None]] = {}
        """What waits for the time in which a sandbox's first kernel can come up."""
        self._starting: dict[SandboxId, asyncio.Task[SandboxInfo]] = {}

    def of(self, sandbox_id: SandboxId) -> Kernel:
        """Its kernel, whether it has come up or not.

        Raises:
            NotFoundError: It has none, so it is about to go.
        """
        return self._kernels.get(self._service.info(sandbox_id).kernel_id or "")

    def want(self, sandbox_id: SandboxId) -> None:
        """Have its first kernel come up soon, if it has none yet; returns at once."""
        if not self.of(sandbox_id).alive:
            self._coming[sandbox_id] = asyncio.create_task(self._come_up(sandbox_id))

    async def running(self, sandbox_id: SandboxId) -> Kernel:
        """Its kernel: the first one, if that has not come up yet, or the next one, if it has ended by itself.

        Raises:
            WarmcellError: It could not be started.
        """
        kernel = self.of(sandbox_id)
        self._service.live(sandbox_id).awaited = True
        if not kernel.alive:
            await self._start(kernel, sandbox_id)
        return kernel

    async def complete(self) -> None:
        """Have those that can be saved have the kernel without which they are not; the keeper is about to go."""
        await asyncio.gather(*(self._complete(sandbox_id) for sandbox_id in list(self._coming)))

    def forget(self, sandbox_id: SandboxId) -> None:
        """The sandbox has ended. Idempotent."""
        coming = self._coming.get(sandbox_id)
        if coming is not None:
            coming.cancel()

    async def close(self) -> None:
        """None comes up any more."""
        coming = list(self._coming.values())
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)

    async def _complete(self, sandbox_id: SandboxId) -> None:
        with contextlib.suppress(errors.WarmcellError):
            await self._memory.check(sandbox_id)
            await self.running(sandbox_id)

    async def _start(self, kernel: Kernel, sandbox_id: SandboxId) -> None:
        """Once for all that want it; whoever gives up leaves it to the others."""
        starting = self._starting.get(sandbox_id)
        if starting is None:
            starting = asyncio.create_task(self._kernels.start(kernel.request, owner_pid=0))
            self._starting[sandbox_id] = starting
            starting.add_done_callback(lambda done: self._started(sandbox_id, done))
        await asyncio.shield(starting)

    def _started(self, sandbox_id: SandboxId, done: "asyncio.Task[SandboxInfo]") -> None:
        del self._starting[sandbox_id]
        if not done.cancelled() and (error := done.exception()) is not None:  # Perhaps nobody waits any more.
            log.info("sandbox %s: its kernel did not start: %s", sandbox_id, error)

    async def _come_up(self, sandbox_id: SandboxId) -> None:
        try:
            await self._service.until_quiet(sandbox_id)
            kernel, box = self.of(sandbox_id), self._service.live(sandbox_id)
            frozen = box.info.terms is not None and box.info.terms.frozen
            if kernel.alive or sandbox_id in self._starting or frozen or box.info.state is not State.RUNNING:
                return
            box.awaited = False
            try:
                await self._start(kernel, sandbox_id)
            finally:
                box.awaited = True
        except errors.WarmcellError as error:  # Whoever wants to run code is told.
            log.debug("sandbox %s: its kernel has not come up by itself: %s", sandbox_id, error)
        finally:
            self._coming.pop(sandbox_id, None)
