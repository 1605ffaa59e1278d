"""Which devices a request gets. Pure: the same question always has the same answer.

The alternatives in their order. Of one alternative the devices with the least memory that will do, all of one kind if
that is possible; of these the ones that are nearest to each other, and whose loss leaves the fewest free neighbours
behind (so that pairs joined by NVLink stay whole for whoever needs a pair); then the lowest index. A share goes onto a
device that is shared already, if there is one.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from warmcell.sandbox.errors import InvalidRequestError, NoGpuAvailableError
from warmcell.sandbox.gpus.requests import Alternative, GpuRequest, summary, unknown_kind
from warmcell.sandbox.models import GIB, GpuDevice

FAR = 100
"""Between devices of which no path is known: farther than any that is."""

_COMBINATIONS = 2000
"""Up to so many sets of devices are all looked at; of more only those that grow from one device by the nearest."""


@dataclass(frozen=True, slots=True)
class Use:
    """What of a device is taken."""

    who: str
    """In words."""
    parts: int = 1
    """Into how many shares it is cut; 1: it is taken whole."""
    held: int = 1
    """How many of these are taken."""

    def leaves(self, parts: int) -> bool:
        """Whether a share of that size is left."""
        return parts == self.parts > self.held

    def and_one(self, who: str) -> "Use":
        """With one share more."""
        return Use(f"{self.who} and {who}", self.parts, self.held + 1)


@dataclass(frozen=True, slots=True)
class Grant:
    """Devices, and what share of each: one of `parts`."""

    devices: tuple[GpuDevice, ...]
    parts: int = 1

    def used(self, uses: Mapping[str, Use], who: str) -> dict[str, Use]:
        """What is taken after it."""
        after = dict(uses)
        for device in self.devices:
            use = after.get(device.uuid)
            after[device.uuid] = use.and_one(who) if use is not None else Use(who, self.parts)
        return after


def candidates(request: GpuRequest, devices: Sequence[GpuDevice], *, most_parts: int = 1) -> tuple[GpuDevice, ...]:
    """The devices that can serve this request at all, by index.

    Args:
        request: What is asked for.
        devices: All devices of the machine.
        most_parts: Into how many shares a device may be cut.

    Raises:
        UnknownGpuKindError: No device is of any kind that was asked for, or there is none.
        InvalidRequestError: Devices of the kind exist, but never as many, never with as much memory, or never in
            such shares.
    """
    served = [a for a in request.alternatives if a.parts <= most_parts and len(matching(a, devices)) >= a.count]
    if not served:
        raise _impossible(request, devices, most_parts)
    uuids = {device.uuid for a in served for device in matching(a, devices)}
    return tuple(device for device in devices if device.uuid in uuids)


def allocate(
    request: GpuRequest, devices: Sequence[GpuDevice], uses: Mapping[str, Use], *, most_parts: int = 1
) -> Grant:
    """The devices that this request gets now.

    Args:
        request: What is asked for.
        devices: All devices of the machine.
        uses: UUID of each device of which something is taken, to what that is.
        most_parts: Into how many shares a device may be cut.

    Raises:
        UnknownGpuKindError: No device is of any kind that was asked for, or there is none.
        InvalidRequestError: It can never be met on this machine.
        NoGpuAvailableError: It could be met if others gave back what they hold.
    """
    possible = candidates(request, devices, most_parts=most_parts)
    for alternative in request.alternatives:
        free = [device for device in matching(alternative, possible) if is_free(device, alternative.parts, uses)]
        if alternative.parts <= most_parts and len(free) >= alternative.count:
            return Grant(_best(free, alternative.count, uses), alternative.parts)
    held = [device for device in possible if device.uuid in uses]
    who = "; ".join(f"GPU {device.index} by {uses[device.uuid].who}" for device in held)
    raise NoGpuAvailableError(
        f"{request} cannot be had now: {len(held)} of {_devices(len(possible))} in use ({who})",
        hint="Stop a sandbox that holds one (`warmcell ps` lists them), wait, or ask for another kind.",
        details={
            "request": str(request),
            "held": [{"uuid": d.uuid, "index": d.index, "name": d.name, "by": uses[d.uuid].who} for d in held],
        },
    )


def is_free(device: GpuDevice, parts: int, uses: Mapping[str, Use]) -> bool:
    """Whether that much of it can be had."""
    use = uses.get(device.uuid)
    return use is None or use.leaves(parts)


def matching(alternative: Alternative, devices: Iterable[GpuDevice]) -> list[GpuDevice]:
    """The devices that are what is asked for."""
    return [device for device in devices if alternative.matches(device)]


def _devices(count: int) -> str:
    return "1 device is" if count == 1 else f"{count} devices are"


def _best(free: Sequence[GpuDevice], count: int, uses: Mapping[str, Use]) -> tuple[GpuDevice, ...]:
    ordered = sorted(free, key=_fit)
    groups: dict[tuple[int, str], list[GpuDevice]] = {}
    for device in ordered:
        groups.setdefault((device.memory_total_bytes, device.name), []).append(device)
    for group in groups.values():
        # Ranks on unlike devices wait for the slowest, so one kind is better than the least memory.
        if len(group) >= count:
            return _nearest(group, count, uses)
    return tuple(ordered[:count])


def _nearest(group: Sequence[GpuDevice], count: int, uses: Mapping[str, Use]) -> tuple[GpuDevice, ...]:
    """Of devices of one kind, in order."""

    def cost(found: Iterable[GpuDevice]) -> tuple[int, int, float, tuple[int, ...]]:
        chosen = tuple(found)
        within = sum(_distance(a, b) for a, b in itertools.combinations(chosen, 2))
        left = [other for other in group if other not in chosen and other.uuid not in uses]
        # Each path that is cut counts by how short it is.
        cut = sum(1 / (1 + _distance(a, b)) for a in chosen for b in left if b.uuid in a.near)
        whole = sum(device.uuid not in uses for device in chosen)
        return whole, within, round(cut, 6), tuple(group.index(device) for device in chosen)

    if _few(len(group), count):
        sets: Iterable[Iterable[GpuDevice]] = itertools.combinations(group, count)
    else:
        sets = (_grown(seed, group, count) for seed in group)
    return tuple(sorted(min(sets, key=cost), key=_fit))


def _few(size: int, count: int) -> bool:
    found = 1
    for n in range(count):
        found = found * (size - n) // (n + 1)
        if found > _COMBINATIONS:
            return False
    return True


def _grown(seed: GpuDevice, group: Sequence[GpuDevice], count: int) -> list[GpuDevice]:
    chosen = [seed]
    while len(chosen) < count:
        rest = (device for device in group if device not in chosen)
        chosen.append(min(rest, key=lambda device: sum(_distance(device, one) for one in chosen)))
    return chosen


def _distance(a: GpuDevice, b: GpuDevice) -> int:
    return min(a.near.get(b.uuid, FAR), b.near.get(a.uuid, FAR))


def _fit(device: GpuDevice) -> tuple[int, str, int, str]:
    return device.memory_total_bytes, device.name, device.index, device.uuid


def _impossible(request: GpuRequest, devices: Sequence[GpuDevice], most_parts: int) -> InvalidRequestError:
    details = {"request": str(request), "available": [device.name for device in devices]}
    for alternative in request.alternatives:
        found = matching(alternative, devices)
        if found and alternative.parts > most_parts:
            return InvalidRequestError(
                f"{alternative} asks for a share of a GPU, and {_shares(most_parts)} here",
                hint=f"Ask for {alternative.whole}, or have the operator raise c.Warmcell.gpu_shares.",
                details=details,
            )
        if found:
            return InvalidRequestError(
                f"{alternative} asks for {alternative.count} GPUs, and this machine has {len(found)} such",
                hint=f"Ask for at most {len(found)}; it has {summary(devices)}.",
                details=details | {"most": len(found)},
            )
    if devices and all(alternative.least_bytes for alternative in request.alternatives):
        largest = max(device.memory_total_bytes for device in devices) / GIB
        return InvalidRequestError(
            f"No GPU of this machine has the memory of {request}",
            hint=f"Ask for at most {largest:.0f}GiB; it has {summary(devices)}.",
            details=details,
        )
    return unknown_kind(request, devices)


def _shares(most_parts: int) -> str:
    return "GPUs are not shared" if most_parts == 1 else f"a GPU is cut into {most_parts} shares at most"
