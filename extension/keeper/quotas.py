"""What principals have, held against what they may have; GPU time is metered while it is leased."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from warmcell.extension.keeper.principals import Principals
from warmcell.sandbox.errors import QuotaExceededError, WarmcellError
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.models import GIB, SandboxId, SandboxInfo, SandboxSpec, Wire
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

CHARGE_EVERY_S = 30.0
"""What GPUs have cost is on disk at the latest so long after."""

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


@dataclass(slots=True)
class _Held:
    """GPUs that a sandbox has leased, not charged before `since` (monotonic)."""

    principal: str
    count: int
    since: float


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
        """`exhausted` takes the GPUs away from a sandbox whose principal has had all its time."""
        self._service = service
        self._principals = principals
        self._exhausted = exhausted
        self._clock = clock
        self._held: dict[SandboxId, _Held] = {}

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

    def check(self, principal: str, spec: SandboxSpec) -> None:
        """Whether there is room for one more of that spec.

        Raises:
            QuotaExceededError: There is none.
        """
        quota, used = self._principals.quota(principal), self.usage(principal)
        wanted = {"sandboxes": 1, "cpus": spec.limits.cpus or 0, "memory_bytes": spec.limits.memory_bytes or 0}
        for name, more in wanted.items():
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
        )

    def gpu_seconds(self, principal: str) -> float:
        """Of GPUs altogether, up to now."""
        now = self._clock()
        running = (one.count * (now - one.since) for one in self._held.values() if one.principal == principal)
        return self._principals.gpu_seconds(principal) + sum(running)

    def note(self, info: SandboxInfo) -> None:
        """A sandbox has changed: what it had of GPUs is charged, what it has now is metered from here."""
        count = 0 if info.state in (*TERMINAL, State.SUSPENDED) else len(info.gpus)
        held = self._held.get(info.id)
        if held is not None and held.count != count:
            self._charge(info.id)
            del self._held[info.id]
            held = None
        if held is None and count and info.principal is not None:
            self._held[info.id] = _Held(info.principal, count, self._clock())

    async def run(self) -> None:
        """Meter until the service is closed."""
        changes = self._service.subscribe(backlog=None)
        try:
            while not changes.ended:
                change = await changes.next(timeout=self._soonest())
                if isinstance(change, SandboxInfo):
                    self.note(change)
                else:
                    for sandbox_id in list(self._held):
                        self._charge(sandbox_id)
                await self._end_exhausted()
        finally:
            changes.close()
            for sandbox_id in list(self._held):
                self._charge(sandbox_id)

    def _charge(self, sandbox_id: SandboxId) -> None:
        held, now = self._held[sandbox_id], self._clock()
        self._principals.charge(held.principal, held.count * (now - held.since))
        held.since = now

    def _soonest(self) -> float | None:
        """Seconds until somebody has had all their time, or until it is to be on disk; None: nobody has any."""
        if not self._held:
            return None
        soonest = CHARGE_EVERY_S
        for name in {one.principal for one in self._held.values()}:
            limit = self._principals.quota(name).gpu_seconds
            if limit is not None:
                rate = sum(one.count for one in self._held.values() if one.principal == name)
                soonest = min(soonest, max(0.0, limit - self.gpu_seconds(name)) / rate)
        return soonest + 0.01

    async def _end_exhausted(self) -> None:
        for sandbox_id, held in list(self._held.items()):
            limit = self._principals.quota(held.principal).gpu_seconds
            if limit is None or self.gpu_seconds(held.principal) < limit:
                continue
            log.warning("sandbox %s: %s has had all its GPU time", sandbox_id, held.principal)
            self._charge(sandbox_id)
            del self._held[sandbox_id]
            try:
                await self._exhausted(sandbox_id)
            except WarmcellError as error:
                log.error("sandbox %s keeps its GPUs: %s", sandbox_id, error)


def _exceeded(principal: str, name: str, used: float, limit: float, hint: str) -> QuotaExceededError:
    what = name.replace("_", " ")
    return QuotaExceededError(
        f"{principal} has {used:g} {what} of the {limit:g} that it may have",
        hint=hint,
        details={"quota": name, "used": used, "limit": limit},
    )
