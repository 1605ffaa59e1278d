"""One request of this keeper on its way to its devices: its owner's quota, its place in the queue, and its end."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from warmcell.sandbox.errors import InvalidRequestError, NoGpuAvailableError
from warmcell.sandbox.gpus.leases import HeldTicket, Lease
from warmcell.sandbox.gpus.requests import GpuRequest, weight
from warmcell.sandbox.models import GpuDevice, QueuePlace, SandboxId

Told = Callable[[QueuePlace | None], None]

EVERYBODY = "*"
"""The quota of owners that have none of their own."""


@dataclass(slots=True, kw_only=True, eq=False)
class Waiting:
    """Asked for, and not had yet."""

    holder: SandboxId
    owner: str
    request: GpuRequest
    told: Told
    since: float = field(default_factory=time.time)
    admitted: bool = False
    """Its owner's quota has room for it."""
    ticket: HeldTicket | None = None
    place: QueuePlace | None = None
    cancelled: bool = False

    @property
    def weight(self) -> float:
        """How many devices it may come to have."""
        return max(map(weight, self.request.alternatives))

    def stands(self, place: QueuePlace | None) -> None:
        """Tell where it stands, if that is news."""
        if place != self.place:
            self.place = place
            self.told(place)


@dataclass(slots=True, kw_only=True)
class Held:
    """What a sandbox of this keeper has."""

    owner: str
    devices: tuple[GpuDevice, ...]
    leases: tuple[Lease, ...]
    began: float = field(default_factory=time.monotonic)

    @property
    def weight(self) -> float:
        """How many devices that is; a share is a part of one."""
        return sum(1 / device.parts for device in self.devices)


class Quotas:
    """How many GPUs each owner may have at a time, within one keeper."""

    def __init__(self, most: Mapping[str, float]) -> None:
        """Args: most: Owner, or "*" for all others, to how many GPUs."""
        self._most = dict(most)

    def of(self, owner: str) -> float | None:
        """None: no quota."""
        return self._most.get(owner, self._most.get(EVERYBODY))

    def check(self, owner: str, request: GpuRequest) -> GpuRequest:
        """What of the request can be had within the quota.

        Raises:
            InvalidRequestError: Nothing of it ever.
        """
        most = self.of(owner)
        if most is None:
            return request
        fits = tuple(one for one in request.alternatives if weight(one) <= most)
        if not fits:
            raise InvalidRequestError(
                f"{request} is more than the quota of {most:g} GPUs that {owner} has here",
                hint="Ask for fewer, or have the operator raise c.Warmcell.gpu_quotas.",
            )
        return GpuRequest(alternatives=fits)

    def admit(self, one: Waiting, queue: Iterable[Waiting], held: Iterable[Held]) -> None:
        """Let it go on to the machine's own queue, in the order in which its owner asked.

        Raises:
            NoGpuAvailableError: Not yet: the owner has as many GPUs as the quota allows.
        """
        most = self.of(one.owner)
        if one.admitted or most is None:
            one.admitted = True
            return
        others = [other for other in queue if other.owner == one.owner and other is not one]
        used = sum(each.weight for each in held if each.owner == one.owner)
        used += sum(other.weight for other in others if other.admitted)
        before = any(not other.admitted and other.since < one.since for other in others)
        if before or used + one.weight > most + 1e-9:
            raise NoGpuAvailableError(
                f"{one.request} cannot be had now: {one.owner} has {used:g} of {most:g} GPUs (c.Warmcell.gpu_quotas)",
                hint="Stop one of those sandboxes (`warmcell ps` lists them), or wait.",
                details={"request": str(one.request), "held": []},
            )
        one.admitted = True
