"""The sandboxes that code has asked for: how they come, wake, sleep when their time is over, and go."""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

import zmq.asyncio

from warmcell.extension.keeper.agents import checks
from warmcell.extension.keeper.agents.agent_kernels import AgentKernels
from warmcell.extension.keeper.agents.commands import Commands
from warmcell.extension.keeper.agents.kernel_client import KernelClient
from warmcell.extension.keeper.agents.once import Once
from warmcell.extension.keeper.agents.runs import KernelRuns
from warmcell.extension.keeper.kernel import KernelRequest
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import NetworkPolicy, SandboxId, SandboxInfo, SandboxSpec, SnapshotInfo, Terms
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

SIGINT = 2
LOOK_S = 600.0
"""How often at least to look for those that have slept for too long."""

CONNECTED_MAX = 64
"""Kernels that the keeper stays connected to while no code runs there. A connection takes six descriptors."""

NOT_THEIRS = ("workspace", "mounts", "home")
"""Fields of a spec that would let a sandbox see something of the host, or leave something there."""


class AgentBox:
    """What hangs on one such sandbox."""

    def __init__(self, agents: "Agents", sandbox_id: SandboxId) -> None:
        self._agents = agents
        self.sandbox_id = sandbox_id
        self.frozen_at: float | None = None
        """Unix time since when it stands still in memory; None while it does not."""
        self.client: KernelClient | None = None
        self.commands = Commands()
        self.runs = KernelRuns(
            lambda: agents.live(sandbox_id),
            self._connected,
            lambda: agents.interrupt(sandbox_id),
            agents.kernels.of(sandbox_id).request.contexts,
            lambda contexts: agents.note_contexts(sandbox_id, contexts),
        )

    async def close(self) -> None:
        """The sandbox is gone. Idempotent."""
        await self.runs.close()
        await self.commands.close()
        self.disconnect()

    async def _connected(self) -> KernelClient:
        """A client of its kernel, which is started again if it has ended."""
        kernel = await self._agents.kernels.running(self.sandbox_id)
        if self.client is None:
            self.client = KernelClient(self._agents.context, kernel)
        await self.client.ready()
        self._agents.connected(self)
        return self.client

    def disconnect(self) -> None:
        """Let go of its kernel until the next run. Idempotent."""
        if self.client is not None:
            self.client.close()
            self.client = None


class Agents:
    """All of them, of one keeper."""

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
        self._asleep_s = asleep_s
        self._frozen_s = frozen_s
        self.context = zmq.asyncio.Context()
        self.once = Once()
        self._service = service
        self._kernels = kernels
        self._memory = memory
        self.kernels = AgentKernels(service, kernels, memory)
        self._boxes: dict[SandboxId, AgentBox] = {}
        self._coming: set[str] = set()
        """Kernels whose sandboxes nobody has been given yet: their time has not begun."""
        self._connected: dict[SandboxId, AgentBox] = {}
        """To whose kernels there are connections, those that were used last at the end."""
        self._changed = asyncio.Event()
        self._ending: set[asyncio.Task[None]] = set()
        self._thawing = asyncio.Lock()

    async def create(
        self,
        asked: Mapping[str, Any],
        terms: Terms,
        *,
        snapshot: str | None = None,
        principal: str | None = None,
        with_kernel: bool = False,
    ) -> SandboxInfo:
        """A new sandbox; it outlives whoever has asked for it.

        Commands and files need no kernel. It comes up a moment later, or when the first code is to be run.

        Args:
            asked: Of a spec, what is to be other than usual.
            terms: For how long.
            snapshot: Id or name of one that it goes on from; then nothing is `asked`.
            principal: Whose it is.
            with_kernel: It is there once its kernel answers. One from a snapshot always is.

        Raises:
            WarmcellError: There is none; nothing is left of it.
        """
        kernel_id = str(uuid.uuid4())
        self._coming.add(kernel_id)
        try:
            info = await self._start(kernel_id, asked, terms, snapshot, principal, with_kernel=with_kernel)
            self._boxes[info.id] = AgentBox(self, info.id)
        finally:
            self._coming.discard(kernel_id)
        self.kernels.want(info.id)
        self.changed(info)
        return self._service.info(info.id)

    async def _start(
        self,
        kernel_id: str,
        asked: Mapping[str, Any],
        terms: Terms,
        snapshot: str | None,
        principal: str | None,
        *,
        with_kernel: bool,
    ) -> SandboxInfo:
        terms = dataclasses.replace(terms, ends_at=None, frozen=False, cold=False)
        if snapshot is not None:
            info = await self._from_snapshot(snapshot, asked, kernel_id, terms, principal)
        else:
            request = KernelRequest(
                kernel_id=kernel_id,
                spec=_spec(asked),
                connection=self._memory.connection(kernel_id),
                persistent=True,
                terms=terms,
                principal=principal,
            )
            info = await self._kernels.start(request, owner_pid=0, sandbox_only=not with_kernel)
            kernel = self._kernels.get(kernel_id)  # What was chosen for it stays so, for its copies too.
            kernel.request = dataclasses.replace(kernel.request, spec=self.live(info.id).spec)
        return info

    async def fork(self, sandbox_id: SandboxId, count: int) -> list[SandboxInfo]:
        """Clones with terms of the same kind, whose time begins now; all of them, or none.

        Raises:
            QuotaExceededError: Not all of them have room in its principal's quota; nothing was begun.
            WarmcellError: As `KernelMemory.fork`.
        """
        await self._memory.check(sandbox_id)
        live = self.live(sandbox_id)
        self._service.admission.check_quota(live.spec, live.info.principal, count=count)
        await self.awake(sandbox_id)
        await self.kernels.running(sandbox_id)
        clones = await self._memory.fork(sandbox_id, count)
        for info in clones:
            self.of(info.id)
            self.changed(info)
        return [self._service.info(info.id) for info in clones]

    def owns(self, sandbox_id: SandboxId) -> bool:
        """Whether code has asked for it; False where there is no such sandbox."""
        try:
            return self._service.info(sandbox_id).terms is not None
        except errors.SandboxNotFoundError:
            return False

    def of(self, sandbox_id: SandboxId) -> AgentBox:
        """What hangs on one, whatever its state.

        Raises:
            SandboxNotFoundError: There is no such sandbox.
            UnsupportedOperationError: Nobody has asked for it in that way.
        """
        info = self._service.info(sandbox_id)
        if info.terms is None:
            raise errors.UnsupportedOperationError(
                f"Sandbox {sandbox_id} is a notebook's, or another sandbox's", hint="Make one with warmcell.Sandbox()."
            )
        if sandbox_id not in self._boxes:
            self._boxes[sandbox_id] = AgentBox(self, sandbox_id)
        return self._boxes[sandbox_id]

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
        info = self._service.info(sandbox_id)
        if info.error is not None and info.state is State.FAILED:
            raise errors.from_json(info.error.to_json())
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

    def idle_s(self, sandbox_id: SandboxId) -> float:
        """Seconds since a command has ended there; 0 while one runs. What its kernel does is not looked at."""
        box = self._boxes.get(sandbox_id)
        return math.inf if box is None else box.commands.idle_s

    async def wake(self, sandbox_id: SandboxId, *, memory: bool = True) -> SandboxInfo:
        """Have it run, whatever its terms say; raises as `KernelMemory.resume`.

        Args:
            sandbox_id: Which.
            memory: False: if it sleeps, its kernel begins anew, with the files.
        """
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

    def busy(self, sandbox_id: SandboxId) -> bool:
        """Whether code or a command runs in it that was sent from here."""
        box = self._boxes.get(sandbox_id)
        return box is not None and (box.runs.busy or box.commands.running > 0)

    async def set_network(self, sandbox_id: SandboxId, policy: NetworkPolicy | None) -> SandboxInfo:
        """Have it reach what that says, and its kernel know; raises as `of` and `SandboxService.set_network`."""
        box = self.of(sandbox_id)
        info = await self._service.set_network(sandbox_id, policy)
        live, kernel = self.live(sandbox_id), self.kernels.of(sandbox_id)
        kernel.request = dataclasses.replace(
            kernel.request, spec=dataclasses.replace(kernel.request.spec, egress=live.spec.egress)
        )
        if info.state is State.RUNNING:  # Else it is told as it comes back.
            box.runs.tell(await live.network_environment())
        return info

    def connected(self, box: AgentBox) -> None:
        """Its kernel is about to be used. Of those that were used longest ago too many are let go of."""
        self._connected.pop(box.sandbox_id, None)
        self._connected[box.sandbox_id] = box
        idle = [one for one in self._connected.values() if not one.runs.in_use]
        for one in idle[: max(0, len(self._connected) - CONNECTED_MAX)]:
            one.disconnect()
            del self._connected[one.sandbox_id]

    async def interrupt(self, sandbox_id: SandboxId) -> None:
        """Interrupt what its kernel does, if anything."""
        await self._kernels.signal(self.kernels.of(sandbox_id).request.kernel_id, SIGINT)

    def live(self, sandbox_id: SandboxId) -> LiveSandbox:
        """The sandbox as it is now; raises SandboxNotFoundError."""
        return self._service.live(sandbox_id)

    def note_contexts(self, sandbox_id: SandboxId, contexts: Mapping[str, str]) -> None:
        """For snapshots of it."""
        kernel = self.kernels.of(sandbox_id)
        kernel.request = dataclasses.replace(kernel.request, contexts=dict(contexts))

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

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Let go of what hangs on a sandbox that has ended. Idempotent."""
        self.kernels.forget(sandbox_id)
        self._connected.pop(sandbox_id, None)
        box = self._boxes.pop(sandbox_id, None)
        if box is not None:
            await box.close()

    async def end_in_time(self) -> None:
        """Do for ever with each what its terms say when its time is over."""
        while True:
            self._changed.clear()
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
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min([*left, LOOK_S])):
                    await self._changed.wait()

    async def close(self) -> None:
        """End all work on them; they themselves are the service's."""
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self.kernels.close()
        for info in self._service.infos():
            if info.terms is not None and info.terms.frozen:  # What is saved now has to get ready for it.
                with contextlib.suppress(errors.WarmcellError):
                    await self.live(info.id).thaw()
        await self.once.close()
        await asyncio.gather(*(self.forget(sandbox_id) for sandbox_id in list(self._boxes)))
        self.context.destroy(linger=0)

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
        self._changed.set()

    async def _from_snapshot(
        self, ref: str, asked: Mapping[str, Any], kernel_id: str, terms: Terms, principal: str | None
    ) -> SandboxInfo:
        if set(asked) - {"env"}:
            raise errors.InvalidRequestError(
                "A sandbox that goes on from a snapshot is as that was", hint="Leave out everything but env and terms."
            )
        manifest = self._service.memory.store.get(ref)
        saved = manifest.kernel.get("request")
        if manifest.info.kind != "named" or not isinstance(saved, Mapping) or not saved.get("terms"):
            raise errors.UnsupportedOperationError(
                "It is no snapshot of a sandbox that code has asked for", hint="Take one with Sandbox.snapshot()."
            )
        await self._service.memory.check(manifest.spec)
        request = dataclasses.replace(
            KernelRequest.from_json(saved),
            kernel_id=kernel_id,
            spec=dataclasses.replace(manifest.spec, env={**manifest.spec.env, **checks.strings(asked, "env")}),
            connection=self._memory.connection(kernel_id),
            terms=terms,
            principal=principal,
        )
        info = await self._memory.bring_up(request, manifest.info.id)
        if saved["terms"].get("cold"):
            try:
                await self._begin_anew(info.id)
            except BaseException:
                await self._kill(info.id)
                raise
        return info


def _spec(asked: Mapping[str, Any]) -> SandboxSpec:
    """What is asked for, nothing of the host in it.

    Raises:
        InvalidRequestError: It asks for what such a sandbox does not get.
    """
    for name in NOT_THEIRS:
        if name in asked:
            raise errors.InvalidRequestError(
                f"{name!r} is not for sandboxes of this kind", hint="Upload what it is to have: box.files."
            )
    if asked.get("network") == "host":
        raise errors.InvalidRequestError(
            "Sandboxes of this kind do not have the machine's network", hint='Name hosts: {"allow": ["pypi.org"]}.'
        )
    usual = {"python": "" if asked.get("image") else os.path.abspath(sys.executable)}
    return SandboxSpec.from_json({**usual, **asked})
