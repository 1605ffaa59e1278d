"""The ports of the GPUs of a machine: what knows them, and what leases them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from warmcell.sandbox.models import GpuDevice, QueuePlace, SandboxId


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that computes on a GPU, as far as this user may see it."""

    pid: int
    """Host pid; of another pid namespace it may name nothing here."""
    user: str = ""
    command: str = ""
    memory_bytes: int | None = None
    """What it has of the device's memory. None: the driver does not tell."""

    def __str__(self) -> str:
        seen = ", ".join(part for part in (self.command, f"user {self.user}" if self.user else "") if part)
        return f"process {self.pid} ({seen})" if seen else f"process {self.pid}"


class GpuInventory(Protocol):
    """Lists the GPUs of the machine. No GPU and no driver are normal answers, not errors."""

    @property
    def problem(self) -> str:
        """Why a GPU of this machine may be missing from the last answer, with the cure; else empty."""

    async def devices(self) -> Sequence[GpuDevice]:
        """All devices by index, at most about a second old.

        Called by `GpuPool` for each request and for each look at the meters.

        Raises:
            OperationTimeoutError: The driver did not answer; the last answer is not given instead.
        """

    async def board_uuids(self) -> Sequence[str]:
        """UUIDs of all GPUs that the driver has: of a divided one its own, not those of its instances.

        Called by the engine that parks, before something goes on on another device.

        Raises:
            OperationTimeoutError: The driver did not answer.
            BackendUnavailableError: It answered with an error.
        """

    async def processes(self, device: GpuDevice) -> Sequence[GpuProcess]:
        """Who computes on `device` at this very moment; never cached.

        Called by `GpuPool` before each grant, when nobody of ours can be on it. Processes that only draw
        (a desktop) are not counted.

        Raises:
            OperationTimeoutError: The driver did not answer.
            BackendUnavailableError: It answered with an error; whether the device is free is not known.
        """

    async def free_bytes(self, device: GpuDevice) -> int | None:
        """How much of the device's memory nobody has at this very moment; never cached. None: it does not tell.

        Called by the engine that parks, before anything comes back. What was there a second ago may be what was just
        parked.

        Raises:
            OperationTimeoutError: The driver did not answer.
            BackendUnavailableError: It answered with an error.
        """


class GpuLeases(Protocol):
    """Who has which GPU; `sandbox.gpus.pool.GpuPool` is the real one."""

    @property
    def problem(self) -> str: ...
    @property
    def most_parts(self) -> int: ...
    async def lease(
        self,
        request: str | tuple[str, ...],
        *,
        holder: SandboxId,
        owner: str = "",
        wait_s: float | None = 0.0,
        told: Callable[[QueuePlace | None], None] = ...,
    ) -> tuple[GpuDevice, ...]: ...
    async def check(self, request: str | tuple[str, ...], *, owner: str = "") -> None: ...
    def has(self, holder: SandboxId, request: str | tuple[str, ...]) -> tuple[GpuDevice, ...] | None: ...
    def holds(self, holder: SandboxId) -> bool: ...
    async def leave_behind(self, holder: SandboxId, pids: Collection[int]) -> None: ...
    def move(self, holder: SandboxId, to: SandboxId) -> None: ...
    def cancel(self, holder: SandboxId) -> bool: ...
    def cancel_all(self) -> None: ...
    def release(self, holder: SandboxId, *, remains: bool = False) -> None: ...
    async def status(self) -> list[dict[str, Any]]: ...
    async def queue(self) -> list[dict[str, Any]]: ...
    async def memory_of(self, device: GpuDevice, pids: Collection[int]) -> int: ...
    async def to_reclaim(self, idle: Sequence[SandboxId]) -> list[SandboxId]: ...
    async def changed(self, *, after: int, timeout: float | None = None) -> int: ...
