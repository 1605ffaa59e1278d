"""One try to get devices: what there is, who has what, who computes where, and then the locks."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from warmcell.sandbox.errors import BackendUnavailableError, InvalidRequestError, NoGpuAvailableError
from warmcell.sandbox.gpus import queue
from warmcell.sandbox.gpus.allocator import Grant, Use, candidates
from warmcell.sandbox.gpus.base import GpuInventory
from warmcell.sandbox.gpus.leases import HeldTicket, Lease, LeaseDirectory, Remainder
from warmcell.sandbox.gpus.notes import Sight
from warmcell.sandbox.gpus.queue import Ticket
from warmcell.sandbox.gpus.requests import GpuRequest
from warmcell.sandbox.gpus.waiting import Waiting
from warmcell.sandbox.models import GpuDevice

Result = TypeVar("Result")


class Granting:
    """Asks the driver and the lease directory; remembers nothing."""

    def __init__(self, inventory: GpuInventory, leases: LeaseDirectory, *, most_parts: int) -> None:
        """As `GpuPool`."""
        self._inventory = inventory
        self._directory = leases
        self._most_parts = most_parts

    async def grant(self, one: Waiting) -> tuple[tuple[GpuDevice, ...], tuple[Lease, ...]]:
        """Devices for it, and their leases.

        Raises:
            NoGpuAvailableError: None can be had now.
            WarmcellError: As `GpuPool.lease`.
        """
        devices = await self._inventory.devices()
        possible = self.candidates(one.request, devices)
        examined: dict[str, str] = {}
        """What computes on each device that was free when we looked; empty: nothing."""
        while True:
            sight = await asyncio.to_thread(self._directory.look, [device.uuid for device in devices])
            free = [each for each in possible if each.uuid not in sight.holders and each.uuid not in examined]
            examined |= await self._strangers(free, sight.staying)
            choice = _Choice(one, possible, devices, examined, self._most_parts)
            try:
                leases = await self._acquire(one, devices, choice)
            except NoGpuAvailableError:
                if not choice.unknown:
                    raise
                continue  # One has become free since we asked the driver. Each round asks about more, so it ends.
            parts = leases[0].holder.parts
            chosen = [device for lease in leases for device in devices if device.uuid == lease.uuid]
            return tuple(dataclasses.replace(device, parts=parts) for device in chosen), leases

    async def _acquire(
        self, one: Waiting, devices: Sequence[GpuDevice], choose: Callable[[Sight], Grant]
    ) -> tuple[Lease, ...]:
        uuids = [device.uuid for device in devices]
        return await unless_cancelled(lambda: self._directory.acquire(uuids, choose, holder=one.holder), release)

    async def enqueue(self, one: Waiting) -> HeldTicket:
        """A place in the machine's queue; raises as `LeaseDirectory.enqueue`."""
        return await unless_cancelled(
            lambda: self._directory.enqueue(one.request, holder=one.holder), lambda ticket: ticket.release()
        )

    async def _strangers(self, devices: Sequence[GpuDevice], staying: Mapping[str, frozenset[int]]) -> dict[str, str]:
        """The first process on each device on which one computes that has no lease of ours; empty where none does.

        Those that are parked and only could not leave the device altogether do not count.
        """
        found: dict[str, str] = {}
        for device in devices:
            try:
                found_there = await self._inventory.processes(device)
            except BackendUnavailableError as error:  # It may have fallen off the bus; the others serve.
                found[device.uuid] = f"nobody knows whom: {error.message}"
                continue
            parked = staying.get(device.uuid, frozenset())
            processes = [process for process in found_there if process.pid not in parked]
            more = f" and {len(processes) - 1} more" if len(processes) > 1 else ""
            found[device.uuid] = f"{processes[0]}{more}, outside Warmcell" if processes else ""
        return found

    def candidates(self, wanted: GpuRequest, devices: Sequence[GpuDevice]) -> tuple[GpuDevice, ...]:
        """As `allocator.candidates`; the error says why a device may be missing."""
        try:
            return candidates(wanted, devices, most_parts=self._most_parts)
        except InvalidRequestError as error:
            error.hint = f"{self._inventory.problem} {error.hint}".strip()
            raise


class _Choice:
    """What is to be locked, once it is known for sure who holds what."""

    def __init__(
        self,
        one: Waiting,
        possible: Sequence[GpuDevice],
        devices: Sequence[GpuDevice],
        examined: Mapping[str, str],
        most_parts: int,
    ) -> None:
        self._one, self._possible, self._devices, self._most_parts = one, possible, devices, most_parts
        self._examined = examined
        self.unknown: frozenset[str] = frozenset()
        """Free now, and not when the driver was asked who computes there."""

    def __call__(self, sight: Sight) -> Grant:
        free = {device.uuid for device in self._possible} - sight.holders.keys()
        self.unknown = frozenset(free - self._examined.keys())
        uses = {uuid: Use(who) for uuid, who in self._examined.items() if who}
        uses |= {uuid: Use("somebody who has just left") for uuid in self.unknown}
        return queue.serve(
            self._one.request,
            _before(self._one, sight),
            self._devices,
            uses | sight.uses,
            most_parts=self._most_parts,
        )


def _before(one: Waiting, sight: Sight) -> Sequence[Ticket]:
    if one.ticket is None:
        return sight.tickets
    return [ticket for ticket in sight.tickets if ticket.number < one.ticket.ticket.number]


async def unless_cancelled(work: Callable[[], Result], undo: Callable[[Result], None]) -> Result:
    """Do it in a thread. That goes on if the caller is cancelled; whatever comes of it then is undone."""

    def done(task: "asyncio.Task[Result]") -> None:
        if not task.cancelled() and task.exception() is None:
            undo(task.result())

    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(done)
        raise


def release(leases: Sequence[Lease | Remainder]) -> None:
    """Give them back."""
    for lease in leases:
        lease.release()
