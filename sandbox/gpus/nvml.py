"""The GPUs that the NVIDIA driver knows.

gpustat's form of the NVML bindings is used because it copes with older drivers; its own query is not, since it
waits 0.1 s per device and leaves out processes that it may not look into, which are the ones that matter here.
"""

import asyncio
import dataclasses
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from warmcell.sandbox.errors import BackendUnavailableError, OperationTimeoutError
from warmcell.sandbox.gpus.base import GpuProcess
from warmcell.sandbox.gpus.processes import describe
from warmcell.sandbox.models import GpuDevice

log = logging.getLogger(__name__)

T = TypeVar("T")

_FRESH_S = 1.0
_TIMEOUT_S = 15.0
"""A device that sleeps without persistence mode takes seconds to come up."""

CAPABILITIES = Path("/proc/driver/nvidia/capabilities")
"""Where the driver says which device nodes a part of a divided GPU has."""

_SAME_BOARD = 5
"""As far from each other as that: farther than by NVLink, nearer than by a switch."""


class NvmlInventory:
    """Asks NVML, in a thread. NVML stays open after the first answer, until `close`."""

    def __init__(self, *, timeout: float = _TIMEOUT_S) -> None:
        self._timeout = timeout
        self._one_at_a_time = threading.Lock()
        self._nvml: Any = None
        self._query: asyncio.Task[tuple[GpuDevice, ...]] | None = None
        self._asked_at = 0.0
        self._problem = ""
        self._paths: dict[tuple[str, str], int | None] = {}
        """How far devices are from each other: that does not change."""

    @property
    def problem(self) -> str:
        """Why a GPU of this machine may be missing from the last answer, with the cure."""
        return self._problem

    async def devices(self) -> Sequence[GpuDevice]:
        """All devices that can be leased, instances of divided ones too; none where there is no driver."""
        now = time.monotonic()
        query = self._query
        if query is None or (query.done() and now - self._asked_at >= _FRESH_S):
            # Callers that come meanwhile wait for this same answer; a driver that hangs costs one thread.
            query = self._query = asyncio.create_task(asyncio.to_thread(self._list))
            self._asked_at = now
        return await self._in_time(query)

    async def board_uuids(self) -> Sequence[str]:
        """UUIDs of all GPUs, divided ones among them; without those that do not answer."""
        return await self._in_time(asyncio.create_task(asyncio.to_thread(self._board_uuids)))

    async def processes(self, device: GpuDevice) -> Sequence[GpuProcess]:
        """Who computes on `device` now."""
        return await self._in_time(asyncio.create_task(asyncio.to_thread(self._processes, device.uuid)))

    async def free_bytes(self, device: GpuDevice) -> int | None:
        """What is free of it now."""
        return await self._in_time(asyncio.create_task(asyncio.to_thread(self._free_bytes, device.uuid)))

    def close(self) -> None:
        """Let go of the driver. The next question opens it again."""
        with self._one_at_a_time:
            self._shutdown()

    async def _in_time(self, query: "asyncio.Task[T]") -> T:
        done, _ = await asyncio.wait({query}, timeout=self._timeout)
        if not done:
            raise OperationTimeoutError(
                f"The NVIDIA driver did not answer in {self._timeout:g} s",
                hint="See whether `nvidia-smi` answers; if not, reload the driver or reboot.",
                details={"operation": "nvml", "timeout": self._timeout},
            )
        return query.result()

    def _list(self) -> tuple[GpuDevice, ...]:
        with self._one_at_a_time:
            self._problem = ""
            try:
                return self._ask(self._read) or ()
            except BackendUnavailableError as error:
                self._problem = str(error)
                return ()

    def _processes(self, uuid: str) -> tuple[GpuProcess, ...]:
        with self._one_at_a_time:
            return self._ask(lambda nvml: _processes(nvml, uuid)) or ()

    def _board_uuids(self) -> tuple[str, ...]:
        with self._one_at_a_time:
            return self._ask(_board_uuids) or ()

    def _free_bytes(self, uuid: str) -> int | None:
        with self._one_at_a_time:
            return self._ask(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid)).free))

    def _ask(self, question: Callable[[Any], T], *, again: bool = True) -> T | None:
        """Ask, and once more after a failure: the driver may have been reloaded meanwhile.

        None where there is no driver.
        """
        # Not at the top: it loads a shared library, and most processes never ask.
        try:
            from gpustat.nvml import pynvml as nvml
        except Exception as error:  # gpustat raises what it likes where its bindings are not those that it wants
            raise BackendUnavailableError(
                f"No GPU is seen, since gpustat cannot be loaded: {error}",
                hint="Install it into the environment of Warmcell: pip install gpustat.",
            ) from error

        try:
            if self._nvml is None:
                nvml.nvmlInit()
                self._nvml = nvml
            return question(nvml)
        except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
            self._shutdown()
            return None
        except nvml.NVMLError_FunctionNotFound as error:
            self._shutdown()
            raise BackendUnavailableError(
                f"The NVIDIA driver is too old: {error}", hint="Install a newer one; `nvidia-smi` says which it is."
            ) from error
        except nvml.NVMLError as error:
            self._shutdown()
            if again:
                return self._ask(question, again=False)
            raise BackendUnavailableError(
                f"The NVIDIA driver failed: {error}",
                hint="See what `nvidia-smi` says; after a driver upgrade, reboot.",
            ) from error

    def _shutdown(self) -> None:
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError as error:
                log.debug("NVML did not shut down: %s", error)

    def _read(self, nvml: Any) -> tuple[GpuDevice, ...]:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        found: list[tuple[GpuDevice, Any]] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                if not _is_divided(nvml, handle):
                    found.append((_device(nvml, handle, index, driver), handle))
                    continue
                instances = [(each, None) for each in _instances(nvml, handle, index, driver)]
                found += instances
                if not instances:
                    self._problem = (
                        f"GPU {index} is in MIG mode and has no instances, so it is not offered. "
                        "`nvidia-smi mig -cgi … -C` makes some, `nvidia-smi -mig 0` makes it whole."
                    )
            except (
                nvml.NVMLError_Uninitialized,
                nvml.NVMLError_DriverNotLoaded,
                nvml.NVMLError_FunctionNotFound,
            ):
                raise
            except nvml.NVMLError as error:
                # One device that fell off the bus, or waits to be reset, does not hide the others.
                self._problem = f"GPU {index} does not answer: {error}. Reset it or reboot."
        return self._with_paths(nvml, found)

    def _with_paths(self, nvml: Any, found: Sequence[tuple[GpuDevice, Any]]) -> tuple[GpuDevice, ...]:
        near: dict[str, dict[str, int]] = {device.uuid: {} for device, _ in found}
        for (a, one), (b, other) in itertools.combinations(found, 2):
            if one is None or other is None:
                continue
            if (a.uuid, b.uuid) not in self._paths:
                self._paths[a.uuid, b.uuid] = _distance(nvml, one, other)
            distance = self._paths[a.uuid, b.uuid]
            if distance is not None:
                near[a.uuid][b.uuid] = near[b.uuid][a.uuid] = distance
        return tuple(dataclasses.replace(device, near=near[device.uuid]) for device, _ in found)


def _board_uuids(nvml: Any) -> tuple[str, ...]:
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            found.append(_text(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index))))
        except nvml.NVMLError_GpuIsLost:
            log.debug("GPU %d is lost, and has no UUID", index)
    return tuple(found)


def _distance(nvml: Any, one: Any, other: Any) -> int | None:
    """0: joined by NVLink; else what the driver counts along PCIe; None: it does not tell."""
    try:
        if nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
            return 0
    except nvml.NVMLError:  # An older driver, or a virtual machine. It may know the other thing.
        pass
    try:
        return max(_SAME_BOARD, int(nvml.nvmlDeviceGetTopologyCommonAncestor(one, other)))
    except nvml.NVMLError:
        return None


def _instances(nvml: Any, handle: Any, index: int, driver: str) -> Iterator[GpuDevice]:
    """The MIG instances of a device, each with its own nodes."""
    minor = _optional(nvml, lambda: nvml.nvmlDeviceGetMinorNumber(handle))
    for n in range(_optional(nvml, lambda: int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle))) or 0):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, n)
        except nvml.NVMLError_NotFound:
            continue
        device = _device(nvml, instance, index, driver)
        groups = (nvml.nvmlDeviceGetGpuInstanceId(instance), nvml.nvmlDeviceGetComputeInstanceId(instance))
        nodes = () if minor is None else (f"/dev/nvidia{minor}", *_capability_nodes(minor, *groups))
        yield dataclasses.replace(device, mig=True, device_nodes=nodes)


def _capability_nodes(minor: int, gpu_instance: int, compute_instance: int) -> Iterator[str]:
    """The nodes without which a program may not use this instance."""
    here = CAPABILITIES / f"gpu{minor}" / "mig" / f"gi{gpu_instance}"
    for file in (here / "access", here / f"ci{compute_instance}" / "access"):
        try:
            found = re.search(r"DeviceFileMinor:\s*(\d+)", file.read_text())
        except OSError:
            continue
        if found:
            yield f"/dev/nvidia-caps/nvidia-cap{found[1]}"


def _is_divided(nvml: Any, handle: Any) -> bool:
    """Whether it is in MIG mode: then its UUID is no device that a program could use."""
    mode = _optional(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle))
    return mode is not None and bool(mode[0] == nvml.NVML_DEVICE_MIG_ENABLE)


def _device(nvml: Any, handle: Any, index: int, driver: str) -> GpuDevice:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    usage = _optional(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    minor = _optional(nvml, lambda: nvml.nvmlDeviceGetMinorNumber(handle))
    return GpuDevice(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)).removeprefix("NVIDIA "),
        memory_total_bytes=int(memory.total),
        memory_used_bytes=int(memory.used),
        utilization_pct=None if usage is None else float(usage.gpu),
        driver_version=driver,
        device_nodes=() if minor is None else (f"/dev/nvidia{minor}",),
    )


def _processes(nvml: Any, uuid: str) -> tuple[GpuProcess, ...]:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    # Programs below an MPS server are in the second list alone.
    computing = _optional(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or []
    served = _optional(nvml, lambda: nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle)) or []
    memory = {int(process.pid): _memory(nvml, process) for process in (*served, *computing)}
    return tuple(describe(pid, memory_bytes=used) for pid, used in sorted(memory.items()))


def _memory(nvml: Any, process: Any) -> int | None:
    used = getattr(process, "usedGpuMemory", None)
    return None if used is None or used == nvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value else int(used)


def _optional(nvml: Any, ask: Callable[[], T]) -> T | None:
    """What not every device or driver can tell."""
    try:
        return ask()
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
        return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
