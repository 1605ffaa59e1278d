"""GPUs for sandboxes: what the service asks for, and what the meters show."""

import asyncio
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from warmcell.sandbox.errors import (
    ConflictError,
    InvalidRequestError,
    NoGpuAvailableError,
    QueueCancelledError,
)
from warmcell.sandbox.gpus import queue
from warmcell.sandbox.gpus.base import GpuInventory
from warmcell.sandbox.gpus.granting import Granting, release, unless_cancelled
from warmcell.sandbox.gpus.leases import Lease, LeaseDirectory, Remainder
from warmcell.sandbox.gpus.notes import Sight
from warmcell.sandbox.gpus.processes import user_name
from warmcell.sandbox.gpus.queue import Holding
from warmcell.sandbox.gpus.requests import GpuRequest, parse
from warmcell.sandbox.gpus.waiting import Held, Quotas, Told, Waiting
from warmcell.sandbox.gpus.watch import Watch
from warmcell.sandbox.models import GpuDevice, QueuePlace, SandboxId

LOOK_S = 2.0
"""How often whoever waits looks without having been told of a change: of a program outside Warmcell nobody tells."""

ENDED_KEPT = 64
"""From how many leases that have ended the next wait is estimated."""


class GpuPool:
    """Grants devices to the sandboxes of one keeper; across keepers and users the lease directory decides.

    All methods are for the event loop's thread.
    """

    def __init__(
        self,
        inventory: GpuInventory,
        leases: LeaseDirectory,
        *,
        most_parts: int = 1,
        quotas: Mapping[str, float] | None = None,
    ) -> None:
        """Nothing is held, and nobody waits.

        Args:
            inventory: Knows the devices.
            leases: The machine's leases.
            most_parts: Into how many shares a device may be cut; 1: none is shared.
            quotas: Owner, or "*" for all others, to how many GPUs it may have at a time.
        """
        self._inventory = inventory
        self._directory = leases
        self.most_parts = most_parts
        self._granting = Granting(inventory, leases, most_parts=most_parts)
        self._quotas = Quotas(quotas or {})
        self._held: dict[SandboxId, Held] = {}
        self._waiting: dict[SandboxId, Waiting] = {}
        self._remainders: dict[SandboxId, list[Remainder]] = {}
        """Of those that are parked, and whose processes could not leave their devices."""
        self._ended_s: deque[float] = deque(maxlen=ENDED_KEPT)
        self._watch = Watch(leases.path, self._news)
        self._changes = 0
        self._changed = asyncio.Event()

    @property
    def problem(self) -> str:
        """Why a GPU of this machine may be missing, with the cure; else empty."""
        return self._inventory.problem

    async def lease(
        self,
        request: str | tuple[str, ...],
        *,
        holder: SandboxId,
        owner: str = "",
        wait_s: float | None = 0.0,
        told: Told = lambda place: None,
    ) -> tuple[GpuDevice, ...]:
        """Give `holder` devices of its own, or a share of one, until `release`.

        Called by `SandboxService` before a sandbox is made or brought back. A call that fails or is cancelled leaves
        nothing leased and nobody in the queue.

        Args:
            request: In the grammar of `requests`.
            holder: The sandbox.
            owner: Whose quota it counts for.
            wait_s: Seconds to wait for one where none is free; None: until there is one.
            told: Called with each place in the queue, and with None when that is over.

        Raises:
            InvalidRequestError: The request is not in the grammar, or can never be met on this machine.
            UnknownGpuKindError: No device is of the kind.
            NoGpuAvailableError: It could be met, but not in time; `details["held"]` says who has what.
            QueueCancelledError: `cancel` was called for it.
            ConflictError: `holder` has a lease.
            BackendUnavailableError: The lease directory or the driver is not usable.
            OperationTimeoutError: The driver or another keeper does not answer.
        """
        wanted = self._quotas.check(owner, parse(request))
        if holder in self._held or holder in self._waiting:
            raise ConflictError(
                f"Sandbox {holder} has its GPUs already", hint="Release them first, or ask for a new sandbox."
            )
        one = self._waiting[holder] = Waiting(holder=holder, owner=owner, request=wanted, told=told)
        try:
            devices, leases = await self._until_served(one, None if wait_s is None else time.monotonic() + wait_s)
            self._held[holder] = Held(owner=owner, devices=devices, leases=leases)
            release(self._remainders.pop(holder, ()))
            self._news()
            return devices
        finally:
            del self._waiting[holder]
            if one.ticket is not None:
                one.ticket.release()
                self._news()
            one.stands(None)

    async def check(self, request: str | tuple[str, ...], *, owner: str = "") -> None:
        """Say now what `lease` would say if the request can never be met. A busy device is no error here.

        Raises:
            InvalidRequestError: The request is not in the grammar, or can never be met on this machine.
            UnknownGpuKindError: No device is of the kind.
        """
        self._granting.candidates(self._quotas.check(owner, parse(request)), await self._inventory.devices())

    def cancel(self, holder: SandboxId) -> bool:
        """Have it wait no longer; whether it did. Its `lease` raises `QueueCancelledError`."""
        one = self._waiting.get(holder)
        if one is None or one.place is None:
            return False
        one.cancelled = True
        self._news()
        return True

    def release(self, holder: SandboxId, *, remains: bool = False) -> None:
        """Give back what `holder` has. Idempotent. Nothing of the sandbox may run on the devices any more.

        Args:
            holder: The sandbox.
            remains: What it has left behind is there still.
        """
        if not remains:
            release(self._remainders.pop(holder, ()))
        held = self._held.pop(holder, None)
        if held is not None:
            release(held.leases)
            self._ended_s.append(time.monotonic() - held.began)
            self._news()

    async def leave_behind(self, holder: SandboxId, pids: Collection[int]) -> None:
        """Give back what `holder` has, though some of its processes stay on the devices; they do nothing there.

        They keep nobody from a lease until `release`, or until it has one again itself.

        Raises:
            WarmcellError: It has its lease still.
        """
        held = self._held.get(holder)
        if held is None:
            return
        remainders: list[Remainder] = []
        try:
            for device in held.devices:
                there = {process.pid for process in await self._inventory.processes(device)}
                leave = functools.partial(self._directory.leave_behind, device.uuid, there & {*pids})
                remainders.append(await unless_cancelled(leave, lambda one: release([one])))
        except BaseException:
            release(remainders)
            raise
        self.release(holder)
        self._remainders[holder] = remainders

    def move(self, holder: SandboxId, to: SandboxId) -> None:
        """Another sandbox takes over what `holder` has: a restart into a new one. Nothing, if it has nothing.

        Raises:
            ConflictError: `to` has a lease of its own.
        """
        if holder == to or holder not in self._held:
            return
        if to in self._held or to in self._waiting:
            raise ConflictError(f"Sandbox {to} has GPUs of its own", hint="Release them first.")
        held = self._held[to] = self._held.pop(holder)
        for lease in held.leases:
            lease.move(to)

    def has(self, holder: SandboxId, request: str | tuple[str, ...]) -> tuple[GpuDevice, ...] | None:
        """What `holder` has, if that is what is asked for. None: it is not, or it has nothing."""
        held = self._held.get(holder)
        if held is None:
            return None
        for one in parse(request).alternatives:
            if len(held.devices) == one.count and all(
                device.parts == one.parts and one.matches(device) for device in held.devices
            ):
                return held.devices
        return None

    def holds(self, holder: SandboxId) -> bool:
        """Whether it has any."""
        return holder in self._held

    async def devices(self) -> tuple[GpuDevice, ...]:
        """The machine's devices, whoever has them; raises as `status`."""
        return tuple(await self._inventory.devices())

    async def status(self) -> list[dict[str, Any]]:
        """Each device in its wire form; under "leases" who has it or shares of it, and the first of them under "lease".

        `mine` is true where it is a sandbox of this keeper, and only then is `sandbox_id` one that it knows;
        `user` and `pid` are those of the keeper that holds it, as that keeper wrote them down. "lost" is true of a
        device that a sandbox of this keeper has and that the driver does not list any more.

        Raises:
            BackendUnavailableError: The lease directory is not usable.
            OperationTimeoutError: The driver or another keeper does not answer.
        """
        devices, sight = await self._look()
        mine = {(lease.holder.pid, lease.holder.sandbox_id) for held in self._held.values() for lease in held.leases}
        listed = {device.uuid for device in devices}
        lost = [one for held in self._held.values() for one in held.devices if one.uuid not in listed]
        rows = []
        for device in [*devices, *lost]:
            holders = sight.holders.get(device.uuid, ())
            leases = [one.to_json(mine=(one.pid, one.sandbox_id) in mine) for one in holders]
            more: dict[str, Any] = {"lease": leases[0] if leases else None, "leases": leases, "lost": device in lost}
            if device.simulated and device.pretended_bytes:
                more["memory_used_bytes"] = min(device.pretended_bytes * len(leases), device.memory_total_bytes)
            if device.simulated and device.pretended_pct is not None:
                more["utilization_pct"] = device.pretended_pct if leases else 0.0
            rows.append(device.to_json() | more)
        return rows

    async def queue(self) -> list[dict[str, Any]]:
        """Who waits on this machine, in the order in which they came; raises as `status`."""
        devices, sight = await self._look()
        rows = []
        for ticket in sight.tickets:
            mine = self._waiting.get(SandboxId(ticket.sandbox_id))
            if mine is not None and (mine.ticket is None or mine.ticket.ticket.number != ticket.number):
                mine = None
            try:
                place = self._place(ticket.request, sight, devices, ticket.since, number=ticket.number)
            except InvalidRequestError:  # Another keeper waits for what can never be had as things are configured here.
                place = QueuePlace(request=str(ticket.request), place=1, length=1, since=ticket.since)
            told = place.to_json() | {"sandbox_id": ticket.sandbox_id, "mine": mine is not None}
            rows.append(told | {"user": user_name(ticket.uid)})
        return rows

    async def memory_of(self, device: GpuDevice, pids: Collection[int]) -> int:
        """How much memory of a device these processes have, in bytes, as far as the driver tells.

        Raises:
            WarmcellError: As `status`.
        """
        found = await self._inventory.processes(device)
        return sum(process.memory_bytes or 0 for process in found if process.pid in pids)

    async def to_reclaim(self, idle: Sequence[SandboxId]) -> list[SandboxId]:
        """Which of these sandboxes should give back what they hold, for those who wait on this machine, of all users.

        Args:
            idle: Those that may be asked, the one that should give way first at the front.

        Raises:
            WarmcellError: As `status`.
        """
        holdings = [
            Holding(one, tuple(device.uuid for device in self._held[one].devices)) for one in idle if one in self._held
        ]
        if not holdings:
            return []
        devices, sight = await self._look()
        return queue.to_reclaim(sight.tickets, devices, sight.uses, holdings, most_parts=self.most_parts)

    async def changed(self, *, after: int, timeout: float | None = None) -> int:
        """Wait until leases or the queue may have changed since `changes` was `after`; what it is now."""
        if self._directory.path.is_dir():
            self._watch.begin()
        if self._changes == after:
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return self._changes

    @property
    def changes(self) -> int:
        """Grows with each change that was heard of."""
        return self._changes

    def cancel_all(self) -> None:
        """Have nobody wait any more."""
        for one in self._waiting.values():
            one.cancelled = True
        self._news()

    def close(self) -> None:
        """Give back everything, and have nobody wait any more."""
        self.cancel_all()
        for holder in [*self._held, *self._remainders]:
            self.release(holder)
        self._watch.end()

    async def _until_served(self, one: Waiting, until: float | None) -> tuple[tuple[GpuDevice, ...], tuple[Lease, ...]]:
        while True:
            seen = self._changes
            try:
                self._quotas.admit(one, self._waiting.values(), self._held.values())
                return await self._granting.grant(one)
            except NoGpuAvailableError as error:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise
                if one.admitted and one.ticket is None:
                    one.ticket = await self._granting.enqueue(one)
                    continue
                one.stands(await self._standing(one, error))
            await self.changed(after=seen, timeout=LOOK_S if left is None else min(LOOK_S, left))
            if one.cancelled:
                raise QueueCancelledError(
                    f"{one.request} is waited for no longer", hint="Ask again, or ask for another kind."
                )

    async def _standing(self, one: Waiting, error: NoGpuAvailableError) -> QueuePlace:
        devices, sight = await self._look()
        number = None if one.ticket is None else one.ticket.ticket.number
        place = self._place(one.request, sight, devices, one.since, number=number)
        return dataclasses.replace(place, why=error.message.partition(": ")[2])

    def _place(
        self, request: GpuRequest, sight: Sight, devices: Sequence[GpuDevice], since: float, *, number: int | None
    ) -> QueuePlace:
        rivals = queue.rivals(request, sight.tickets, devices, most_parts=self.most_parts)
        before = [ticket for ticket in rivals if number is None or ticket.number < number]
        others = [ticket for ticket in rivals if ticket.number != number]
        possible = self._granting.candidates(request, devices)
        place = len(before) + 1
        return QueuePlace(
            request=str(request),
            place=place,
            length=len(others) + 1,
            since=since,
            estimate_s=queue.estimate_s(place, len(possible), self._ended_s),
        )

    async def _look(self) -> tuple[Sequence[GpuDevice], Sight]:
        devices = await self._inventory.devices()
        uuids = {device.uuid for device in devices}
        uuids |= {device.uuid for held in self._held.values() for device in held.devices}
        if not uuids:
            return devices, Sight({})
        return devices, await asyncio.to_thread(self._directory.look, uuids)

    def _news(self) -> None:
        self._changes += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
