"""Suspends kernels that nobody uses: after a while, and sooner where the machine runs out of memory or of GPUs."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from warmcell.extension.keeper import pressure
from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

IDLE_LOOK_S = 5.0
"""How often to look for kernels that have been idle for long enough."""

PRESSURE_LOOK_S = 2.0

TRY_AGAIN_S = 60.0
"""A kernel that could not be suspended for somebody who waits for its GPU is left alone for so long."""

SOON_S = 0.5
"""Kernels that will have been idle for long enough are looked at no sooner."""

WORKS_FROM = 0.01
"""The part of a core from which on a program works: one that only waits and looks around uses less."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What was seen of programs that run besides an idle kernel."""

    at: float
    """When they worked last, as times of `time.monotonic`."""
    looked_at: float
    cpu_s: float


class Relief:
    """The ways by which a kernel is suspended without being asked to."""

    def __init__(
        self,
        service: SandboxService,
        kernels: Kernels,
        memory: KernelMemory,
        *,
        look: Callable[[], pressure.Room] = pressure.look,
        pressure_idle_s: float,
        parks: bool = True,
        commands_idle_s: Callable[[SandboxId], float] = lambda sandbox_id: math.inf,
    ) -> None:
        """However short memory is, a kernel that was used within `pressure_idle_s` runs on.

        Args:
            service: Has the sandboxes.
            kernels: Has their kernels.
            memory: Suspends and parks them.
            look: How much memory there is.
            pressure_idle_s: Seconds of idleness.
            parks: Whether kernels are parked at all.
            commands_idle_s: For how long no command has run in a sandbox that code has asked for.
        """
        self._service = service
        self._kernels = kernels
        self._memory = memory
        self._look = look
        self._pressure_idle_s = pressure_idle_s
        self._parks = parks
        self._commands_idle_s = commands_idle_s
        self._left_alone: dict[SandboxId, float] = {}
        """Those whose kernels could not be parked or suspended, to when that can be tried again."""
        self._works: dict[SandboxId, _Work] = {}
        """Of those that have something besides their idle kernels."""

    async def suspend_idle(self, idle_s: float) -> None:
        """Suspend each kernel that nobody has used for so long, for ever; 0: none."""
        while idle_s > 0:
            await asyncio.sleep(min(IDLE_LOOK_S, idle_s))
            candidates = self._idle(idle_s)
            self._works = {one: seen for one, seen in self._works.items() if one in {k.sandbox_id for k in candidates}}
            for kernel in candidates:
                if not await self._serves(kernel, idle_s):
                    await self._suspend(kernel, idle_s, why=f"idle for {idle_s:.0f} s")

    async def park_idle(self, idle_s: float) -> None:
        """Park each kernel with a GPU that nobody has used for so long, for ever; 0: none."""
        while idle_s > 0:
            await asyncio.sleep(min(IDLE_LOOK_S, idle_s))
            self._forget_refusals()
            for kernel in self._idle(idle_s, to_park=True):
                back_s = time.monotonic() - kernel.returned_at
                if back_s >= idle_s and self._has_gpu(kernel) and kernel.sandbox_id not in self._left_alone:
                    await self._park(kernel, idle_s, why=f"idle for {idle_s:.0f} s")

    async def heed_pressure(self, below: float) -> None:
        """Keep so much memory free, for ever: a fraction of all where it is under 1, else GiB; 0: do nothing."""
        while below > 0:
            await asyncio.sleep(PRESSURE_LOOK_S)
            await self.relieve(below)

    async def relieve(self, below: float) -> None:
        """Give up prepared sandboxes, then suspend idle kernels, the longest idle first, until it is enough."""
        if not await self._short(below):
            return
        if await self._service.give_up_prepared():
            log.warning("memory is short: no sandboxes are kept prepared")
        for kernel in self._idle(self._pressure_idle_s):
            if not await self._short(below):
                return
            await self._suspend(kernel, self._pressure_idle_s, why="memory is short")

    async def heed_queue(self, idle_s: float) -> None:
        """Park or suspend kernels with a GPU that somebody waits for, once idle for so long; 0: none. For ever."""
        seen = 0
        while idle_s > 0:
            timeout: float | None
            try:
                timeout = await self.give_way(idle_s)
            except errors.WarmcellError as error:  # Whoever waits is told so as well.
                log.debug("who waits for a GPU is not known: %s", error)
                timeout = TRY_AGAIN_S
            seen = await self._service.leases.changed(after=seen, timeout=timeout)

    async def give_way(self, idle_s: float) -> float | None:
        """Park those whose GPUs serve somebody who waits; suspend those that cannot be parked.

        Returns:
            Seconds until others may have been idle for long enough, if anybody waits and there are others.
        """
        self._forget_refusals()
        having = [one for one in self._idle(0.0, to_park=True) if self._has_gpu(one)]
        having = [one for one in having if one.sandbox_id not in self._left_alone]
        if not having or not await self._service.leases.queue():
            return None
        idle = {one.sandbox_id: one for one in having if self._idle_s(one) >= idle_s and one.sandbox_id is not None}
        for sandbox_id in await self._service.leases.to_reclaim(list(idle)):
            why = "somebody waits for its GPU"
            if self._parks and await self._park(idle[sandbox_id], idle_s, why=why):
                continue
            await self._suspend(idle[sandbox_id], idle_s, why=why)
            if self._service.info(sandbox_id).state is State.RUNNING:
                self._leave_alone(sandbox_id)
        others = [idle_s - self._idle_s(one) for one in having if one.sandbox_id not in idle]
        return max(SOON_S, min([TRY_AGAIN_S, *others]))

    async def _serves(self, kernel: Kernel, idle_s: float) -> bool:
        """Whether its kernel would come back without something that is in use: that waits for connections, or works.

        At first sight it is taken for something that works just now.
        """
        if kernel.sandbox_id is None:
            return False
        try:
            found = await self._service.live(kernel.sandbox_id).background()
        except errors.WarmcellError as error:
            log.debug("what else runs in sandbox %s is not known: %s", kernel.sandbox_id, error)
            return False
        if not found.told:
            return False
        now = time.monotonic()
        seen = self._works.get(kernel.sandbox_id)
        if seen is None or abs(found.cpu_s - seen.cpu_s) > WORKS_FROM * (now - seen.looked_at):
            seen = _Work(at=now, looked_at=now, cpu_s=found.cpu_s)
        else:
            seen = _Work(at=seen.at, looked_at=now, cpu_s=found.cpu_s)
        self._works[kernel.sandbox_id] = seen
        return found.listens or now - seen.at < idle_s

    def _forget_refusals(self) -> None:
        now = time.monotonic()
        self._left_alone = {name: until for name, until in self._left_alone.items() if until > now}

    def _leave_alone(self, sandbox_id: SandboxId) -> None:
        self._left_alone[sandbox_id] = time.monotonic() + TRY_AGAIN_S

    def _has_gpu(self, kernel: Kernel) -> bool:
        return kernel.sandbox_id is not None and bool(self._service.info(kernel.sandbox_id).gpus)

    async def _short(self, below: float) -> bool:
        return (await asyncio.to_thread(self._look)).short(below)

    def _idle(self, idle_s: float, *, to_park: bool = False) -> Sequence[Kernel]:
        """Running kernels that have been idle for so long, the longest idle first."""
        found = [kernel for kernel in self._kernels.all() if self._is_idle(kernel, idle_s, to_park=to_park)]
        return sorted(found, key=lambda kernel: -self._idle_s(kernel))

    def _idle_s(self, kernel: Kernel) -> float:
        if kernel.request.terms is None or kernel.sandbox_id is None:
            return kernel.proxy.idle_s
        return min(kernel.proxy.idle_s, self._commands_idle_s(kernel.sandbox_id))

    def _is_idle(self, kernel: Kernel, idle_s: float, *, to_park: bool = False) -> bool:
        """Sandboxes that code has asked for are never suspended for it: they say themselves when their time is over."""
        if kernel.request.terms is not None and not to_park:
            return False
        if kernel.sandbox_id is None or not kernel.started or not kernel.alive or self._idle_s(kernel) < idle_s:
            return False
        try:
            info = self._service.info(kernel.sandbox_id)
        except errors.SandboxNotFoundError:
            return False
        return info.state is State.RUNNING and (info.terms is None or not info.terms.frozen)

    async def _park(self, kernel: Kernel, idle_s: float, *, why: str) -> bool:
        """Whether it has given its GPU back."""
        if kernel.sandbox_id is None or not self._is_idle(kernel, idle_s, to_park=True):  # It was used since.
            return False
        try:
            await self._memory.park(kernel.sandbox_id, by_hand=False)
        except errors.UnsupportedOperationError as error:
            log.debug("kernel %s cannot be parked: %s", kernel.request.kernel_id, error)
            self._leave_alone(kernel.sandbox_id)
        except errors.ConflictError as error:  # It was used since, or its GPU works.
            log.debug("kernel %s is not parked now: %s", kernel.request.kernel_id, error)
        except errors.WarmcellError as error:
            log.info("idle kernel %s was not parked: %s", kernel.request.kernel_id, error)
            self._leave_alone(kernel.sandbox_id)
        else:
            log.info("kernel %s was parked: %s", kernel.request.kernel_id, why)
            return True
        return False

    async def _suspend(self, kernel: Kernel, idle_s: float, *, why: str) -> None:
        if kernel.sandbox_id is None or not self._is_idle(kernel, idle_s):  # It was used since.
            return
        try:
            await self._memory.suspend(kernel.sandbox_id)
            log.info("kernel %s was suspended: %s", kernel.request.kernel_id, why)
        except (errors.UnsupportedOperationError, errors.ConflictError) as error:
            log.debug("kernel %s cannot be suspended: %s", kernel.request.kernel_id, error)
        except errors.WarmcellError as error:
            log.warning("idle kernel %s was not suspended: %s", kernel.request.kernel_id, error)
