"""GPUs for sandboxes: what the service asks for, and what the meters show."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from warmcell.sandbox.errors import ConflictError, InvalidRequestError
from warmcell.sandbox.gpus.allocator import allocate, candidates
from warmcell.sandbox.gpus.base import GpuInventory
from warmcell.sandbox.gpus.leases import Holder, Lease, LeaseDirectory
from warmcell.sandbox.gpus.requests import GpuRequest, parse
from warmcell.sandbox.models import GpuDevice, SandboxId


class GpuPool:
    """Grants devices to the sandboxes of one keeper; across keepers and users the lease directory decides.

    All methods are for the event loop's thread.
    """

    def __init__(self, inventory: GpuInventory, leases: LeaseDirectory) -> None:
        self._inventory = inventory
        self._directory = leases
        self._held: dict[SandboxId, tuple[Lease, ...]] = {}
        self._asking: set[SandboxId] = set()

    @property
    def problem(self) -> str:
        """Why a GPU of this machine may be missing, with the cure; else empty."""
        return self._inventory.problem

    async def lease(self, request: str | tuple[str, ...], *, holder: SandboxId) -> tuple[GpuDevice, ...]:
        """Give `holder` devices of its own, until `release`.

        Called by `SandboxService` before a sandbox is made. A call that fails or is cancelled leaves nothing
        leased.

        Raises:
            InvalidRequestError: The request is not in the grammar, or can never be met on this machine.
            UnknownGpuKindError: No device is of the kind.
            NoGpuAvailableError: It could be met, but not now; `details["held"]` says who has what.
            ConflictError: `holder` has a lease.
            BackendUnavailableError: The lease directory or the driver is not usable.
            OperationTimeoutError: The driver or another keeper does not answer.
        """
        wanted = parse(request)
        if holder in self._held or holder in self._asking:
            raise ConflictError(
                f"Sandbox {holder} has its GPUs already", hint="Release them first, or ask for a new sandbox."
            )
        self._asking.add(holder)
        try:
            devices, leases = await self._grant(wanted, holder)
            self._held[holder] = leases
            return devices
        finally:
            self._asking.discard(holder)

    async def check(self, request: str | tuple[str, ...]) -> None:
        """Say now what `lease` would say if the request can never be met. A busy device is no error here.

        Raises:
            InvalidRequestError: The request is not in the grammar, or can never be met on this machine.
            UnknownGpuKindError: No device is of the kind.
        """
        self._candidates(parse(request), await self._inventory.devices())

    def release(self, holder: SandboxId) -> None:
        """Give back what `holder` has. Idempotent. Nothing of the sandbox may run on the devices any more."""
        for lease in self._held.pop(holder, ()):
            lease.release()

    def move(self, holder: SandboxId, to: SandboxId) -> None:
        """Another sandbox takes over what `holder` has: a restart into a new one. Nothing, if it has nothing.

        Raises:
            ConflictError: `to` has a lease of its own.
        """
        if holder == to or holder not in self._held:
            return
        if to in self._held or to in self._asking:
            raise ConflictError(f"Sandbox {to} has GPUs of its own", hint="Release them first.")
        leases = self._held[to] = self._held.pop(holder)
        for lease in leases:
            lease.move(to)

    async def status(self) -> list[dict[str, Any]]:
        """Each device in its wire form, and under "lease" who has it or None.

        `mine` is true where it is a sandbox of this keeper, and only then is `sandbox_id` one that it knows;
        `user` and `pid` are those of the keeper that holds it, as that keeper wrote them down.

        Raises:
            BackendUnavailableError: The lease directory is not usable.
            OperationTimeoutError: The driver or another keeper does not answer.
        """
        devices = await self._inventory.devices()
        holders: Mapping[str, Holder] = {}
        if devices:
            holders = await asyncio.to_thread(self._directory.holders, [device.uuid for device in devices])
        mine = {lease.uuid: lease.holder for leases in self._held.values() for lease in leases}
        rows = []
        for device in devices:
            held_by = mine.get(device.uuid) or holders.get(device.uuid)
            lease = None if held_by is None else held_by.to_json(mine=device.uuid in mine)
            rows.append(device.to_json() | {"lease": lease})
        return rows

    def close(self) -> None:
        """Give back everything."""
        for holder in list(self._held):
            self.release(holder)

    async def _grant(self, wanted: GpuRequest, holder: SandboxId) -> tuple[tuple[GpuDevice, ...], tuple[Lease, ...]]:
        devices = await self._inventory.devices()
        possible = self._candidates(wanted, devices)
        occupied: dict[str, str] = {}
        while True:
            leases = await self._acquire(wanted, devices, possible, occupied, holder)
            try:
                uuids = [lease.uuid for lease in leases]
                chosen = tuple(device for uuid in uuids for device in devices if device.uuid == uuid)
                found = await self._strangers(chosen)
            except BaseException:
                _release(leases)
                raise
            if not found:
                return chosen, leases
            # Somebody computes there without a lease. Each round rules out one device more, so it ends.
            _release(leases)
            occupied |= found

    async def _acquire(
        self,
        wanted: GpuRequest,
        devices: Sequence[GpuDevice],
        possible: Sequence[GpuDevice],
        occupied: Mapping[str, str],
        holder: SandboxId,
    ) -> tuple[Lease, ...]:
        def choose(taken: Mapping[str, Holder]) -> list[str]:
            held = {uuid: str(held_by) for uuid, held_by in taken.items()}
            return [device.uuid for device in allocate(wanted, devices, {**occupied, **held})]

        task = asyncio.create_task(
            asyncio.to_thread(self._directory.acquire, [device.uuid for device in possible], choose, holder=holder)
        )
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # The thread goes on; whatever it has locked by then is given back.
            task.add_done_callback(_release_result)
            raise

    async def _strangers(self, devices: Sequence[GpuDevice]) -> dict[str, str]:
        """The first process on each device on which one computes that has no lease of ours."""
        found: dict[str, str] = {}
        for device in devices:
            processes = await self._inventory.processes(device)
            if processes:
                more = f" and {len(processes) - 1} more" if len(processes) > 1 else ""
                found[device.uuid] = f"{processes[0]}{more}, outside Warmcell"
        return found

    def _candidates(self, wanted: GpuRequest, devices: Sequence[GpuDevice]) -> tuple[GpuDevice, ...]:
        try:
            return candidates(wanted, devices)
        except InvalidRequestError as error:
            error.hint = f"{self._inventory.problem} {error.hint}".strip()
            raise


def _release(leases: Sequence[Lease]) -> None:
    for lease in leases:
        lease.release()


def _release_result(task: "asyncio.Task[tuple[Lease, ...]]") -> None:
    if not task.cancelled() and task.exception() is None:
        _release(task.result())
