"""What knows the GPUs of a machine: the port that every inventory implements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from warmcell.sandbox.models import GpuDevice


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

    async def processes(self, device: GpuDevice) -> Sequence[GpuProcess]:
        """Who computes on `device` at this very moment; never cached.

        Called by `GpuPool` before each grant, when nobody of ours can be on it. Processes that only draw
        (a desktop) are not counted.

        Raises:
            OperationTimeoutError: The driver did not answer.
            BackendUnavailableError: It answered with an error; whether the device is free is not known.
        """
