"""What principals have, held against what they may have; GPU time is metered while it is leased."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from warmcell.extension.keeper.principals import Principals
from warmcell.sandbox.errors import QuotaExceededError, WarmcellError
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.models import GIB, SandboxId, SandboxInfo, SandboxSpec
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.wire import Wire

log = logging.getLogger(__name__)

CHARGE_EVERY_S = 30.0
"""What GPUs have cost is on disk at the latest so long after. So often, too, GPUs that could not be taken away are
tried again.
"""

USUAL_CPUS = 1.0
USUAL_MEMORY_BYTES = 2 * GIB
"""Caps of a sandbox that asks for none, where its principal has a quota of them: without a cap it would have all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Wire):
    """What a principal has now; GPU time altogether."""

    sandboxes: int
    cpus: float
    memory_bytes: int
    gpu_seconds: float
    snapshot_bytes: int


@dataclass(slots=True)
class _Held:
    """GPUs that a sandbox has leased, not charged before `since` (monotonic)."""

    principal: str
    gpus: float
    """A share counts by its part."""
    since: float
    taken_at: float = -math.inf
    """They are not to be taken away before that; infinite: that is being done."""


class PrincipalQuotas:
    """Asked by the service before it makes a sandbox; `run` meters."""

    def __init__(
        self,
        service: SandboxService,
        principals: Principals,
        *,
        exhausted: Callable[[SandboxId], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`exhausted` takes the GPUs away from a sandbox whose principal has had all its time. Until then they cost."""
        self._service = service
        self._principals = principals
        self._exhausted = exhausted
        self._clock = clock
        self._held: dict[SandboxId, _Held] = {}
        self._taking: set[asyncio.Task[None]] = set()

    def capped(self, principal: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A wish for a sandbox with a cap for each thing of which its principal has a quota."""
        quota, limits = self._principals.quota(principal), asked.get("limits") or {}
        if not isinstance(limits, Mapping):  # whoever reads it says so
            return dict(asked)
        caps = dict(limits)
        if quota.cpus is not None and caps.get("cpus") is None:
            caps["cpus"] = min(USUAL_CPUS, quota.cpus)
        if quota.memory_bytes is not None and caps.get("memory_bytes") is None:
            caps["memory_bytes"] = min(USUAL_MEMORY_BYTES, quota.memory_bytes)
        return {**asked, "limits": caps} if caps else dict(asked)

    def check(self, principal: str, spec: SandboxSpec, *, count: int = 1) -> None:
        """Whether there is room for so many more of that spec.

        Raises:
            QuotaExceededError: There is none.
        """
        quota, used = self._principals.quota(principal), self.usage(principal)
        wanted = {"sandboxes": 1, "cpus": spec.limits.cpus or 0, "memory_bytes": spec.limits.memory_bytes or 0}
        for name, each in wanted.items():
            more = count * each
            limit, has = getattr(quota, name), getattr(used, name)
            if limit is not None and has + more > limit:
                raise _exceeded(principal, name, has, limit, "End a sandbox, or ask for a larger quota.")
        if spec.gpu is not None:
            self.check_gpus(principal)

    def check_gpus(self, principal: str) -> None:
        """Raises QuotaExceededError if it has had all its GPU time."""
        limit, used = self._principals.quota(principal).gpu_seconds, self.gpu_seconds(principal)
        if limit is not None and used >= limit:
            raise _exceeded(principal, "gpu_seconds", round(used, 1), limit, "Ask for a larger quota.")

    def check_snapshots(self, principal: str) -> None:
        """Raises QuotaExceededError if what it has saved takes all the room that it may have."""
        limit, used = self._principals.quota(principal).snapshot_bytes, self.snapshot_bytes(principal)
        if limit is not None and used >= limit:
            raise _exceeded(principal, "snapshot_bytes", used, limit, "Remove a snapshot, or ask for a larger quota.")

    def snapshot_bytes(self, principal: str) -> int:
        """On disk, what its suspended sandboxes have there included."""
        infos = self._service.memory.store.infos()
        return sum(info.image_bytes + info.layer_bytes for info in infos if info.principal == principal)

    def usage(self, principal: str) -> Usage:
        """What it has now. A suspended sandbox counts: it may come back at any time."""
        infos = self._service.infos()
        mine = [info.id for info in infos if info.principal == principal and info.state not in TERMINAL]
        limits = [self._service.live(one).spec.limits for one in mine]
        return Usage(
            sandboxes=len(mine),
            cpus=sum(one.cpus or 0.0 for one in limits),
            memory_bytes=sum(one.memory_bytes or 0 for one in limits),
            gpu_seconds=round(self.gpu_seconds(principal), 3),
            snapshot_bytes=self.snapshot_bytes(principal),
        )

    def gpu_seconds(self, principal: str) -> float:
        """Of GPUs altogether, up to now."""
        now = self._clock()
        running = (one.gpus * (now - one.since) for one in self._held.values() if one.principal == principal)
        return self._principals.gpu_seconds(principal) + sum(running)

    def note(self, info: SandboxInfo) -> None:
        """A sandbox has changed: what it had of GPUs is charged, what it has now is metered from here."""
        asleep = info.state in (*TERMINAL, State.SUSPENDED)
        gpus = 0.0 if asleep else sum(1 / gpu.parts for gpu in info.gpus)
        held = self._held.get(info.id)
        if held is not None and held.gpus != gpus:
            self._charge([info.id])
            del self._held[info.id]
            held = None
        if held is None and gpus and info.principal is not None:
            self._held[info.id] = _Held(info.principal, gpus, self._clock())

    async def run(self) -> None:
        """Meter until the service is closed."""
        changes = self._service.subscribe(backlog=None)
        try:
            infos = self._service.infos()
            gone = self._held.keys() - {info.id for info in infos}
            self._charge(gone)
            for sandbox_id in gone:
                del self._held[sandbox_id]
            for info in infos:
                self.note(info)
            while not changes.ended:
                change = await changes.next(timeout=self._soonest())
                if isinstance(change, SandboxInfo):
                    self.note(change)
                else:
                    self._charge(self._held)
                self._take_from_exhausted()
                if self._principals.unsaved:  # Most changes of a sandbox charge nobody.
                    await asyncio.to_thread(self._principals.save)
        finally:
            changes.close()
            for task in self._taking:
                task.cancel()
            await asyncio.gather(*self._taking, return_exceptions=True)
            self._charge(self._held)
            await asyncio.shield(asyncio.create_task(asyncio.to_thread(self._principals.save)))

    def _charge(self, sandbox_ids: Iterable[SandboxId]) -> None:
        now, cost = self._clock(), dict[str, float]()
        for sandbox_id in sandbox_ids:
            held = self._held[sandbox_id]
            cost[held.principal] = cost.get(held.principal, 0.0) + held.gpus * (now - held.since)
            held.since = now
        self._principals.charge(cost)

    def _soonest(self) -> float | None:
        """Seconds until somebody has had all their time, or until it is to be on disk; None: nobody has any."""
        if not self._held:
            return None
        soonest, now = CHARGE_EVERY_S, self._clock()
        for name in {one.principal for one in self._held.values() if one.taken_at <= now}:
            limit = self._principals.quota(name).gpu_seconds
            if limit is not None:
                rate = sum(one.gpus for one in self._held.values() if one.principal == name)
                soonest = min(soonest, max(0.0, limit - self.gpu_seconds(name)) / rate)
        return soonest + 0.01

    def _take_from_exhausted(self) -> None:
        for sandbox_id, held in self._held.items():
            limit = self._principals.quota(held.principal).gpu_seconds
            if held.taken_at > self._clock() or limit is None or self.gpu_seconds(held.principal) < limit:
                continue
            log.warning("sandbox %s: %s has had all its GPU time", sandbox_id, held.principal)
            held.taken_at = math.inf
            task = asyncio.create_task(self._take(sandbox_id, held))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)

    async def _take(self, sandbox_id: SandboxId, held: _Held) -> None:
        try:
            await self._exhausted(sandbox_id)
        except WarmcellError as error:
            log.error("sandbox %s keeps its GPUs for now: %s", sandbox_id, error)
            held.taken_at = self._clock() + CHARGE_EVERY_S


def _exceeded(principal: str, name: str, used: float, limit: float, hint: str) -> QuotaExceededError:
    what = name.replace("_", " ")
    return QuotaExceededError(
        f"{principal} has {used:g} {what} of the {limit:g} that it may have",
        hint=hint,
        details={"quota": name, "used": used, "limit": limit},
    )
