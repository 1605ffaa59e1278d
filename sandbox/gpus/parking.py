"""Parking: what a sandbox has in the memory of its GPUs goes to the host's, and back; its processes stay."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from warmcell.sandbox.errors import (
    BackendUnavailableError,
    OperationTimeoutError,
    TransportError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.gpus.requests import MOST_PARTS
from warmcell.sandbox.models import GpuDevice, Parked


class ParkEngine(Protocol):
    """Moves memory between GPUs and host. The caller sees to it that nothing runs on the GPUs meanwhile."""

    @property
    def name(self) -> str:
        """As it is shown to operators."""

    @property
    def kind(self) -> str:
        """What torch calls such devices."""

    async def probe(self) -> None:
        """Whether it works on this machine.

        Raises:
            WarmcellError: It does not, with the reason and the cure.
        """

    async def check_device(self, device: GpuDevice) -> None:
        """Whether kernels on this device can be parked at all, whatever they do there.

        Raises:
            WarmcellError: They cannot, or that could not be found out, with the reason and the cure.
        """

    async def check(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """Whether these processes can be parked at all; touches nothing. Those that use no GPU always can.

        Raises:
            UnsupportedOperationError: It cannot, with the reason and the cure.
            WarmcellError: That could not be found out.
        """

    async def uses_gpus(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> bool:
        """Whether any of these processes has something there, so that it is bound to that kind of device."""

    async def vram_bytes(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> int:
        """How much of the host's memory parking these processes will take."""

    async def check_offload(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """Whether torch may move what these processes have there, where `check` or `park` has refused; touches nothing.

        Raises:
            UnsupportedOperationError: It may not, with the reason and the cure.
            WarmcellError: That could not be found out.
        """

    async def offloaded(self, devices: Sequence[GpuDevice], pids: Sequence[int], moved_bytes: int) -> Parked:
        """What is told of processes whose torch has moved so much. `unpark` of that checks only whether it has room.

        Raises:
            WarmcellError: What stays there is not known.
        """

    async def park(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> Parked:
        """Empty the devices of what these processes have there. They live on, and wait as soon as they want a GPU.

        Args:
            devices: What they were given.
            pids: Host pids of all that run in the sandbox.

        Raises:
            UnsupportedOperationError: The driver refuses; all is as before.
            SnapshotError: What is on the GPU is lost.
            OperationTimeoutError: It takes too long; nothing is known of the devices, which are not free.
        """

    async def unpark(self, parked: Parked, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """Have them go on, on these devices.

        Args:
            parked: As `park` gave it.
            devices: As `comes_back_on` asked for.
            pids: Host pids of all that run in the sandbox, which may be another one by now.

        Raises:
            UnsupportedOperationError: They cannot go on there; they stay parked.
            CapacityError: There is no room on the device; they stay parked.
            SnapshotError: What is to come back is lost.
            OperationTimeoutError: It takes too long.
        """

    def comes_back_on(self, parked: Parked) -> str:
        """The GPU request, in its grammar, by which it can go on with what it has."""

    async def close(self) -> None:
        """End what the engine runs. What is parked stays parked."""


@dataclass(frozen=True, slots=True)
class ParkingPlace:
    """Where the memory of GPUs goes, and who brings it there."""

    engine: ParkEngine
    budget_bytes: int
    """Most of the host's memory that all that is parked may take together."""
    free_bytes: Callable[[], int]
    """How much memory the host has left. Blocks for a moment."""
    by_torch: bool = False
    """Where the driver refuses, torch moves what it has itself. The rest of what the process has there stays."""


class SimulatedParking:
    """For made-up devices: the lease moves, the memory is as made up as the devices are."""

    name = "simulated"
    kind = "cpu"
    """So that the whole way can be gone: torch has nothing on a device that is made up."""

    async def probe(self) -> None:
        """It does."""

    async def check_device(self, device: GpuDevice) -> None:
        """As `check`."""
        refuse_divided([device])

    async def check(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """Everything made up can be parked; a divided device cannot, as with real ones."""
        refuse_divided(devices)

    async def uses_gpus(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> bool:
        """If any memory of them is said to be taken."""
        return any(device.pretended_bytes for device in devices)

    async def vram_bytes(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> int:
        """What the configuration says that each takes."""
        return sum(device.pretended_bytes for device in devices)

    async def check_offload(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """What is made up stands in nobody's way."""
        refuse_several(devices)

    async def offloaded(self, devices: Sequence[GpuDevice], pids: Sequence[int], moved_bytes: int) -> Parked:
        """Nothing stays."""
        return Parked(gpus=tuple(devices), since=time.time(), vram_bytes=moved_bytes, by="torch")

    async def park(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> Parked:
        """Note it."""
        vram = await self.vram_bytes(devices, pids)
        return Parked(gpus=tuple(devices), since=time.time(), vram_bytes=vram, bound=vram > 0)

    async def unpark(self, parked: Parked, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """Refuse devices of another kind, as a driver does."""
        check_like(parked, devices)

    def comes_back_on(self, parked: Parked) -> str:
        """Any of its kind."""
        return of_kind(parked)

    async def close(self) -> None:
        """Nothing runs."""


def is_unclear(error: BaseException) -> bool:
    """Whether nobody knows after it what a kernel, or the driver, has done that was asked to go on."""
    unclear = (OperationTimeoutError, TransportError, BackendUnavailableError)
    return not isinstance(error, WarmcellError) or isinstance(error, unclear)


def refuse_divided(devices: Sequence[GpuDevice]) -> None:
    """Raises UnsupportedOperationError for instances of a GPU that is divided in hardware."""
    for device in devices:
        if device.mig:
            raise UnsupportedOperationError(
                f"GPU {device.index} is a MIG instance, whose memory the driver cannot take out",
                hint="Ask for a whole GPU where kernels are to be parked. This kernel keeps its instance.",
            )


def refuse_several(devices: Sequence[GpuDevice]) -> None:
    """Raises UnsupportedOperationError for more than one device."""
    if len(devices) > 1:
        raise UnsupportedOperationError(
            f"The kernel has {len(devices)} GPUs, and what passes between them does not survive parking",
            hint="It keeps them. Kernels with one GPU can be parked.",
        )


def check_like(parked: Parked, devices: Sequence[GpuDevice]) -> None:
    """Raises UnsupportedOperationError where what was parked cannot go on on these, which are of another kind."""
    had = sorted(_kind(device) for device in parked.gpus)
    if parked.bound and had != sorted(_kind(device) for device in devices):
        names = ", ".join(device.name for device in devices) or "none"
        raise UnsupportedOperationError(
            f"What was on {', '.join(device.name for device in parked.gpus)} cannot go on on {names}",
            hint="Ask for a GPU of the same kind, or restart the kernel to begin anew on another.",
        )


def of_kind(parked: Parked) -> str:
    """A request for as many devices, or a share as large, of that kind."""
    first = parked.gpus[0]
    if 1 < first.parts <= MOST_PARTS:
        return f"{first.name}/{first.parts}"
    return first.name if len(parked.gpus) == 1 else f"{first.name}:{len(parked.gpus)}"


def _kind(device: GpuDevice) -> tuple[str, int]:
    return device.name, device.memory_total_bytes
