"""Who is served next, and who should make room. Pure: no clock, no file, no process.

Those who wait are served in the order in which they came. Whoever came later is served before them only with devices
that they leave: each of those before takes in thought what it could have now; if that is not enough, it keeps what is
free of what it waits for. So nobody starves who waits for several devices while others take them one by one, and
nobody waits for devices that those before cannot use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from warmcell.sandbox.errors import InvalidRequestError, NoGpuAvailableError
from warmcell.sandbox.gpus.allocator import Grant, Use, allocate, candidates, is_free, matching
from warmcell.sandbox.gpus.requests import GpuRequest
from warmcell.sandbox.models import GpuDevice, SandboxId

LEASTS = 3
"""From fewer leases that have ended no time is estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Somebody waits. `number` says who came first, across all keepers of the machine."""

    number: int
    request: GpuRequest
    sandbox_id: str
    pid: int
    uid: int
    since: float
    """Unix time, in seconds."""


@dataclass(frozen=True, slots=True)
class Holding:
    """A sandbox, and what it would give back."""

    sandbox_id: SandboxId
    uuids: tuple[str, ...]
    parts: int = 1


def left_by(
    tickets: Sequence[Ticket], devices: Sequence[GpuDevice], uses: Mapping[str, Use], *, most_parts: int = 1
) -> dict[str, Use]:
    """What is taken once these, who came before, have in thought what they wait for."""
    left = dict(uses)
    for ticket in sorted(tickets, key=lambda each: each.number):
        try:
            left = allocate(ticket.request, devices, left, most_parts=most_parts).used(left, str(ticket.number))
        except InvalidRequestError:  # Its devices are gone, or its keeper is of another version. It is told so itself.
            continue
        except NoGpuAvailableError:
            left = _kept(ticket, devices, left, most_parts)
    return left


def serve(
    request: GpuRequest,
    before: Sequence[Ticket],
    devices: Sequence[GpuDevice],
    uses: Mapping[str, Use],
    *,
    most_parts: int = 1,
) -> Grant:
    """What a request gets now, given those who came before it.

    Raises:
        UnknownGpuKindError: As `allocate`.
        InvalidRequestError: As `allocate`.
        NoGpuAvailableError: It has to wait; the words name who has what, and those before it only where nobody has.
    """
    ahead = rivals(request, before, devices, most_parts=most_parts)
    try:
        grant = allocate(request, devices, left_by(ahead, devices, uses, most_parts=most_parts), most_parts=most_parts)
    except NoGpuAvailableError:
        allocate(request, devices, uses, most_parts=most_parts)  # Raises with the names of those who hold, if they do.
        many = f"{len(ahead)} who came before" if len(ahead) > 1 else "somebody who came before"
        raise NoGpuAvailableError(
            f"{request} cannot be had now: what is free is kept for {many}",
            hint="Wait, or ask for another kind.",
            details={"request": str(request), "held": []},
        ) from None
    return grant


def rivals(
    request: GpuRequest, tickets: Sequence[Ticket], devices: Sequence[GpuDevice], *, most_parts: int = 1
) -> list[Ticket]:
    """Those of them who could take what this request could have, directly or through others."""
    wanted = {device.uuid for device in candidates(request, devices, most_parts=most_parts)}
    rest = {ticket: _wanted(ticket, devices, most_parts) for ticket in tickets}
    found: list[Ticket] = []
    while more := [ticket for ticket, uuids in rest.items() if uuids & wanted]:
        for ticket in more:
            wanted |= rest.pop(ticket)
            found.append(ticket)
    return sorted(found, key=lambda ticket: ticket.number)


def to_reclaim(
    tickets: Sequence[Ticket],
    devices: Sequence[GpuDevice],
    uses: Mapping[str, Use],
    idle: Sequence[Holding],
    *,
    most_parts: int = 1,
) -> list[SandboxId]:
    """Which idle sandboxes should give back what they hold, so that those who wait are served; the fewest first.

    Args:
        tickets: All who wait.
        devices: All devices of the machine.
        uses: What is taken, by these idle ones too.
        idle: Those that may be asked, the one that should give way first at the front.
        most_parts: Into how many shares a device may be cut.
    """
    left, rest, found = dict(uses), list(idle), list[Holding]()
    for ticket in sorted(tickets, key=lambda each: each.number):
        after, gone = left, list[Holding]()
        for holding in [None, *rest]:
            if holding is not None:
                after = _without(after, holding)
                gone.append(holding)
            try:
                grant = allocate(ticket.request, devices, after, most_parts=most_parts)
            except InvalidRequestError:
                break
            except NoGpuAvailableError:
                continue
            given = {device.uuid for device in grant.devices}
            needed = [one for one in gone if given & set(one.uuids)]
            for one in needed:
                left = _without(left, one)
                rest.remove(one)
            found += needed
            left = grant.used(left, str(ticket.number))
            break
        else:
            left = _kept(ticket, devices, left, most_parts)
    return [holding.sandbox_id for holding in found]


def estimate_s(place: int, devices: int, ended_s: Sequence[float]) -> float | None:
    """About how long somebody at this place waits: one device comes back each mean lease divided by the devices."""
    if len(ended_s) < LEASTS or devices < 1:
        return None
    return round(place * (sum(ended_s) / len(ended_s)) / devices, 1)


def _wanted(ticket: Ticket, devices: Sequence[GpuDevice], most_parts: int) -> set[str]:
    try:
        return {device.uuid for device in candidates(ticket.request, devices, most_parts=most_parts)}
    except InvalidRequestError:
        return set()


def _kept(ticket: Ticket, devices: Sequence[GpuDevice], uses: Mapping[str, Use], most_parts: int) -> dict[str, Use]:
    """With what is free of the first alternative that can ever be met kept for this one: also what is shared, so that
    it runs dry.
    """
    left = dict(uses)
    for alternative in ticket.request.alternatives:
        found = matching(alternative, devices)
        if alternative.parts > most_parts or len(found) < alternative.count:
            continue
        drained = [one for one in found if one.uuid not in uses or uses[one.uuid].held < uses[one.uuid].parts]
        # What can be had whole comes first, then what fewest share.
        drained.sort(key=lambda one: (not is_free(one, alternative.parts, uses), _held(uses, one), one.index))
        for device in drained[: alternative.count]:
            use = left.get(device.uuid)
            left[device.uuid] = Use(use.who if use is not None else f"ticket {ticket.number}")
        return left
    return left


def _held(uses: Mapping[str, Use], device: GpuDevice) -> float:
    use = uses.get(device.uuid)
    return 0.0 if use is None else use.held / use.parts


def _without(uses: Mapping[str, Use], holding: Holding) -> dict[str, Use]:
    left = dict(uses)
    for uuid in holding.uuids:
        use = left.pop(uuid, None)
        if use is not None and use.held > 1:
            left[uuid] = Use(use.who, use.parts, use.held - 1)
    return left
