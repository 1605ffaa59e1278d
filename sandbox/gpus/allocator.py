"""Which devices a request gets. Pure: the same question always has the same answer.

Best fit: the alternatives in their order; of one alternative the devices with the least memory that will do,
all of one kind if that is possible, lowest index first.
"""

from collections.abc import Iterable, Mapping, Sequence

from warmcell.sandbox.errors import InvalidRequestError, NoGpuAvailableError
from warmcell.sandbox.gpus.requests import Alternative, GpuRequest, summary, unknown_kind
from warmcell.sandbox.models import GIB, GpuDevice


def candidates(request: GpuRequest, devices: Sequence[GpuDevice]) -> tuple[GpuDevice, ...]:
    """The devices that can serve this request at all, by index.

    Raises:
        UnknownGpuKindError: No device is of any kind that was asked for, or there is none.
        InvalidRequestError: Devices of the kind exist, but never as many, or never with as much memory.
    """
    served = [a for a in request.alternatives if len(_matching(a, devices)) >= a.count]
    if not served:
        raise _impossible(request, devices)
    uuids = {device.uuid for a in served for device in _matching(a, devices)}
    return tuple(device for device in devices if device.uuid in uuids)


def allocate(request: GpuRequest, devices: Sequence[GpuDevice], taken: Mapping[str, str]) -> tuple[GpuDevice, ...]:
    """The devices that this request gets now.

    Args:
        devices: All devices of the machine.
        taken: UUID of each device that cannot be had now, to who has it, in words.

    Raises:
        UnknownGpuKindError: No device is of any kind that was asked for, or there is none.
        InvalidRequestError: It can never be met on this machine.
        NoGpuAvailableError: It could be met if others gave back what they hold.
    """
    possible = candidates(request, devices)
    for alternative in request.alternatives:
        free = [device for device in _matching(alternative, possible) if device.uuid not in taken]
        if len(free) >= alternative.count:
            return _best(free, alternative.count)
    held = [device for device in possible if device.uuid in taken]
    who = "; ".join(f"GPU {device.index} by {taken[device.uuid]}" for device in held)
    raise NoGpuAvailableError(
        f"{request} cannot be had now: {len(held)} of {_devices(len(possible))} in use ({who})",
        hint="Stop a sandbox that holds one (`warmcell ps` lists them), wait, or ask for another kind.",
        details={
            "request": str(request),
            "held": [{"uuid": d.uuid, "index": d.index, "name": d.name, "by": taken[d.uuid]} for d in held],
        },
    )


def _devices(count: int) -> str:
    return "1 device is" if count == 1 else f"{count} devices are"


def _matching(alternative: Alternative, devices: Iterable[GpuDevice]) -> list[GpuDevice]:
    return [device for device in devices if alternative.matches(device)]


def _best(free: Sequence[GpuDevice], count: int) -> tuple[GpuDevice, ...]:
    ordered = sorted(free, key=_fit)
    groups: dict[tuple[int, str], list[GpuDevice]] = {}
    for device in ordered:
        groups.setdefault((device.memory_total_bytes, device.name), []).append(device)
    for group in groups.values():
        # Ranks on unlike devices wait for the slowest, so one kind is better than the least memory.
        if len(group) >= count:
            return tuple(group[:count])
    return tuple(ordered[:count])


def _fit(device: GpuDevice) -> tuple[int, str, int, str]:
    return device.memory_total_bytes, device.name, device.index, device.uuid


def _impossible(request: GpuRequest, devices: Sequence[GpuDevice]) -> InvalidRequestError:
    details = {"request": str(request), "available": [device.name for device in devices]}
    for alternative in request.alternatives:
        matching = _matching(alternative, devices)
        if matching:
            return InvalidRequestError(
                f"{alternative} asks for {alternative.count} GPUs, and this machine has {len(matching)} such",
                hint=f"Ask for at most {len(matching)}; it has {summary(devices)}.",
                details=details | {"most": len(matching)},
            )
    if devices and all(alternative.least_bytes for alternative in request.alternatives):
        largest = max(device.memory_total_bytes for device in devices) / GIB
        return InvalidRequestError(
            f"No GPU of this machine has the memory of {request}",
            hint=f"Ask for at most {largest:.0f}GiB; it has {summary(devices)}.",
            details=details,
        )
    return unknown_kind(request, devices)
