"""How sandboxes that code has asked for wake by use, sleep when their time is over, and go."""

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from typing import Any

from warmcell.extension.keeper.agents.boxes import AgentBox, Boxes
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo, SnapshotInfo
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

LOOK_S = 600.0
"""How often at least to look for those that have slept for too long."""


class Lifetimes(Boxes):
    """What becomes of them, by use and in time."""

    def __init__(
        self,
        service: SandboxService,
        kernels: Kernels,
        memory: KernelMemory,
        *,
        asleep_s: float | None = None,
        frozen_s: float | None = None,
    ) -> None:
        """There are none yet.

        Args:
            service: Has the sandboxes.
            kernels: Has their kernels.
            memory: Saves them.
            asleep_s: Seconds after which one that sleeps on disk is removed. None: never.
            frozen_s: The same of one that is frozen in memory.
        """
        super().__init__(service, kernels, memory)
        self._asleep_s = asleep_s
        self._frozen_s = frozen_s
        self._coming: set[str] = set()
        """Kernels whose sandboxes nobody has been given yet: their time has not begun."""
        self._changed = asyncio.Event()
        self._looks_at = 0.0
        """Unix time, at the latest, at which it is looked again whose time is over."""
        self._ending: set[asyncio.Task[None]] = set()
        self._thawing = asyncio.Lock()

    async def awake(self, sandbox_id: SandboxId, *, gpu: bool = False) -> AgentBox:
        """One that runs: it is woken if it sleeps.

        Args:
            sandbox_id: Which.
            gpu: Its GPU may be used, so it has to have one again. Code in its kernel sees to that itself.

        Raises:
            ConflictError: It sleeps, and its terms are against that.
            WarmcellError: It has ended, or cannot go on.
        """
        box = self.of(sandbox_id)
        info = self._alive(sandbox_id)
        asleep = info.state in (State.SUSPENDED, State.SUSPENDING, State.RESUMING)
        if info.terms is not None and (asleep or info.terms.frozen):
            if not info.terms.auto_resume and info.state is not State.RESUMING:
                state = "frozen" if info.terms.frozen else info.state.value
                raise errors.ConflictError(
                    f"Sandbox {sandbox_id} is {state}",
                    hint="Resume it first: its auto_resume is off.",
                    details={"state": state},
                )
            await self.wake(sandbox_id)
        if gpu and (info.parked is not None or sandbox_id in self._memory.parking):
            await self._memory.resume(sandbox_id)
        return box

    async def park(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Give its GPU back and keep it alive: the next code or command takes one again.

        Raises:
            ConflictError: Something runs in it, or it does not.
            WarmcellError: As `KernelMemory.park`.
        """
        await self.awake(sandbox_id)
        if self.busy(sandbox_id):
            raise errors.ConflictError("Code or a command runs in it", hint="Park it when that has ended.")
        await self.kernels.running(sandbox_id)
        return await self._memory.park(sandbox_id)

    async def wake(self, sandbox_id: SandboxId, *, memory: bool = True) -> SandboxInfo:
        """Have it run, whatever its terms say; raises as `KernelMemory.resume`.

        Args:
            sandbox_id: Which.
            memory: False: if it sleeps, its kernel begins anew, with the files.
        """
        self._alive(sandbox_id)
        box = self.live(sandbox_id)
        slept = box.info.state is not State.RUNNING or (box.info.terms is not None and box.info.terms.frozen)
        async with self._thawing:
            if box.info.terms is not None and box.info.terms.frozen:
                await box.thaw()
                self.of(sandbox_id).frozen_at = None
                self._tell(box, frozen=False)
        if box.info.state is not State.RUNNING:
            await self._memory.resume(sandbox_id)
        if slept and not memory:
            await self._begin_anew(sandbox_id)
        self.changed(self.live(sandbox_id).info)
        return self._service.info(sandbox_id)

    def _alive(self, sandbox_id: SandboxId) -> SandboxInfo:
        """What is told of one; raises what it has failed with, if it has."""
        info = self._service.info(sandbox_id)
        if info.error is not None and info.state is State.FAILED:
            raise errors.from_json(info.error.to_json())
        return info

    async def suspend(self, sandbox_id: SandboxId, *, memory: bool = True) -> SandboxInfo:
        """Save and end its processes, commands included; raises as `KernelMemory.suspend`.

        Args:
            sandbox_id: Which.
            memory: False: its files alone. Its kernel ends; the one that it wakes with is saved in its place.
        """
        await self._memory.check(sandbox_id)
        box = self.live(sandbox_id)
        if box.info.terms is not None and box.info.terms.frozen:  # What does not run cannot get ready.
            await self.wake(sandbox_id)
        if box.info.state is State.RUNNING:
            await self.kernels.running(sandbox_id)
            if not memory:
                await self._begin_anew(sandbox_id)
        info = await self._memory.suspend(sandbox_id, even_busy=True)
        if not memory:
            self._tell(self.live(sandbox_id), cold=True)
        self.changed(info)
        return self._service.info(sandbox_id)

    async def snapshot(self, sandbox_id: SandboxId, *, name: str, memory: bool = True) -> SnapshotInfo:
        """Save it, running on; without `memory` for sandboxes that begin with its files alone.

        Raises:
            WarmcellError: As `KernelMemory.snapshot`.
        """
        await self._memory.check(sandbox_id)
        await self.awake(sandbox_id)
        await self.kernels.running(sandbox_id)
        self._mark(sandbox_id, cold=not memory)
        try:
            return await self._memory.snapshot(sandbox_id, name=name)
        finally:
            with contextlib.suppress(errors.WarmcellError):  # It has ended meanwhile.
                self._mark(sandbox_id, cold=False)

    def _mark(self, sandbox_id: SandboxId, *, cold: bool) -> None:
        """What a snapshot says of itself that is taken now."""
        kernel = self.kernels.of(sandbox_id)
        assert kernel.request.terms is not None
        terms = dataclasses.replace(kernel.request.terms, cold=cold)
        kernel.request = dataclasses.replace(kernel.request, terms=terms)

    async def _begin_anew(self, sandbox_id: SandboxId) -> None:
        """Another kernel in place of the one that runs; its files stay."""
        kernel = self.kernels.of(sandbox_id)
        await self._kernels.end(kernel.request.kernel_id, grace=0, restart=True)
        await self._kernels.start(kernel.request, owner_pid=0)

    def set_terms(self, sandbox_id: SandboxId, **changes: Any) -> SandboxInfo:
        """Change its terms; its time begins anew if `timeout_s` is among them.

        Raises:
            WarmcellError: As `of`.
        """
        self.of(sandbox_id)
        if "timeout_s" in changes:
            changes["ends_at"] = None
        self._tell(self.live(sandbox_id), **changes)
        self.changed(self._service.info(sandbox_id))
        return self._service.info(sandbox_id)

    def changed(self, info: SandboxInfo) -> None:
        """Told of every change of a sandbox: its time begins when it runs, and stands still while it sleeps."""
        with contextlib.suppress(errors.SandboxNotFoundError):
            self._heed(self._service.info(info.id))  # As it is by now.

    def _heed(self, info: SandboxInfo) -> None:
        terms = info.terms
        if terms is None or info.state in TERMINAL or info.kernel_id in self._coming:
            return
        if info.id in self._boxes and info.state is State.SUSPENDED:
            self._boxes[info.id].runs.abandon(
                errors.ConflictError(
                    "The sandbox was suspended before the code had ended",
                    hint="Give the sandbox more time (set_timeout); what had begun goes on when it is used again.",
                )
            )
        if terms.cold and info.state is State.RUNNING:
            self._tell(self.live(info.id), cold=False)
        counts = info.state is State.RUNNING and terms.timeout_s is not None and not terms.frozen
        if counts and terms.ends_at is None:
            assert terms.timeout_s is not None
            self._tell(self.live(info.id), ends_at=time.time() + terms.timeout_s)
        elif not counts and terms.ends_at is not None and info.state not in (State.SUSPENDING, State.RESUMING):
            self._tell(self.live(info.id), ends_at=None)

    async def end_in_time(self) -> None:
        """Do for ever with each what its terms say when its time is over."""
        while True:
            self._changed.clear()
            self._looks_at = math.inf  # Whatever changes until that is known has to be looked at again.
            known = [(info.terms.ends_at, info.id) for info in self._service.infos() if info.terms is not None]
            due = [(at, sandbox_id) for at, sandbox_id in known if at is not None]
            now = time.time()
            for at, sandbox_id in due:
                if at <= now:
                    self._tell(self.live(sandbox_id), ends_at=None, quiet=True)
                    task = asyncio.create_task(self._time_is_over(sandbox_id))
                    self._ending.add(task)
                    task.add_done_callback(self._ending.discard)
            left = await self._remove_forgotten(now)
            left += [at - now for at, _ in due if at > now]
            self._looks_at = now + min([*left, LOOK_S])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._looks_at - time.time()):
                    await self._changed.wait()

    async def _remove_forgotten(self, now: float) -> list[float]:
        """Those that have slept for too long go, with what they had on disk. In how many seconds others will have."""
        left: list[float] = []
        for sandbox_id in [info.id for info in self._service.infos() if info.terms is not None]:
            with contextlib.suppress(errors.WarmcellError, OSError):  # It is tried again.
                info = self._service.info(sandbox_id)  # It may have been woken while another one was removed.
                bound_s = self._asleep_s if info.state is State.SUSPENDED else self._frozen_s
                since = None if bound_s is None else self._asleep_since(info)
                if bound_s is None or since is None:
                    continue
                if since + bound_s <= now:
                    log.info("sandbox %s is removed: it has slept for %.0f s", info.id, now - since)
                    await self._kill(info.id)
                else:
                    left.append(since + bound_s - now)
        return left

    def _asleep_since(self, info: SandboxInfo) -> float | None:
        """Unix time; None of one that does not sleep."""
        if info.state is State.SUSPENDED:
            return self._service.memory.store.get(info.snapshot or "").info.created_at
        return self.of(info.id).frozen_at if info.state is State.RUNNING else None

    async def _time_is_over(self, sandbox_id: SandboxId) -> None:
        with contextlib.suppress(errors.SandboxNotFoundError):
            box = self.live(sandbox_id)
            terms = box.info.terms
            if terms is None or box.info.state is not State.RUNNING:
                return
            log.info("sandbox %s: its time is over (%s)", sandbox_id, terms.on_timeout)
            if terms.on_timeout == "kill":
                await self._kill(sandbox_id)
                return
            try:
                await self.suspend(sandbox_id, memory=terms.keeps_memory)
            except errors.WarmcellError as error:
                kernels = [one for one in self._kernels.all() if one.sandbox_id == sandbox_id and not one.ending]
                if kernels and box.info.state is State.RUNNING:  # Else it is being ended.
                    log.warning("sandbox %s is frozen in memory, since it cannot be saved: %s", sandbox_id, error)
                    await self._freeze(box)

    async def _freeze(self, box: LiveSandbox) -> None:
        async with self._thawing:
            try:
                await box.freeze()
            except errors.WarmcellError as error:
                log.warning("sandbox %s runs on: %s", box.info.id, error)
                self._tell(box, ends_at=None, timeout_s=None)
            else:
                self.of(box.info.id).frozen_at = time.time()
                self._tell(box, frozen=True, ends_at=None)

    async def _kill(self, sandbox_id: SandboxId) -> None:
        await self._kernels.forget_sandbox(sandbox_id)
        await self._service.stop(sandbox_id)

    def _tell(self, box: LiveSandbox, *, quiet: bool = False, **changes: Any) -> None:
        """Other terms from now on, here and in what snapshots say."""
        assert box.info.terms is not None
        terms = dataclasses.replace(box.info.terms, **changes)
        if quiet:  # As if it had none, until it is clear what becomes of it.
            box.info = dataclasses.replace(box.info, terms=terms)
        else:
            box.tell(terms=terms)
        with contextlib.suppress(errors.NotFoundError):
            kernel = self.kernels.of(box.info.id)
            kernel.request = dataclasses.replace(
                kernel.request, terms=dataclasses.replace(terms, ends_at=None, frozen=False, cold=False)
            )
        if terms.ends_at is None or terms.ends_at < self._looks_at:
            self._changed.set()
