"""The GPUs that the NVIDIA driver knows.

gpustat's form of the NVML bindings is used because it copes with older drivers; its own query is not, since it
waits 0.1 s per device and leaves out processes that it may not look into, which are the ones that matter here.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
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


class NvmlInventory:
    """Asks NVML, in a thread. NVML stays open after the first answer, until `close`."""

    def __init__(self, *, timeout: float = _TIMEOUT_S) -> None:
        self._timeout = timeout
        self._one_at_a_time = threading.Lock()
        self._nvml: Any = None
        self._query: asyncio.Task[tuple[GpuDevice, ...]] | None = None
        self._asked_at = 0.0
        self._problem = ""

    @property
    def problem(self) -> str:
        """Why a GPU of this machine may be missing from the last answer, with the cure."""
        return self._problem

    async def devices(self) -> Sequence[GpuDevice]:
        """All devices that can be leased as a whole; none where there is no driver."""
        now = time.monotonic()
        query = self._query
        if query is None or (query.done() and now - self._asked_at >= _FRESH_S):
            # Callers that come meanwhile wait for this same answer; a driver that hangs costs one thread.
            query = self._query = asyncio.create_task(asyncio.to_thread(self._list))
            self._asked_at = now
        return await self._in_time(query)

    async def processes(self, device: GpuDevice) -> Sequence[GpuProcess]:
        """Who computes on `device` now."""
        return await self._in_time(asyncio.create_task(asyncio.to_thread(self._processes, device.uuid)))

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

    def _ask(self, question: Callable[[Any], T], *, again: bool = True) -> T | None:
        """Ask, and once more after a failure: the driver may have been reloaded meanwhile.

        None where there is no driver.
        """
        # Not at the top: it loads a shared library, and most processes never ask.
        from gpustat.nvml import pynvml as nvml

        try:
            if self._nvml is None:
                nvml.nvmlInit()
                self._nvml = nvml
            return question(nvml)
        except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
            self._shutdown()
            return None
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
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                if _is_divided(nvml, handle):
                    self._problem = (
                        f"GPU {index} is in MIG mode, so it is not offered. `nvidia-smi -mig 0` makes it whole."
                    )
                else:
                    found.append(_device(nvml, handle, index, driver))
            except (nvml.NVMLError_GpuIsLost, nvml.NVMLError_Unknown, nvml.NVMLError_NoPermission) as error:
                # One device that fell off the bus does not hide the others.
                self._problem = f"GPU {index} does not answer: {error}. Reset it or reboot."
        return tuple(found)


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
    return tuple(describe(pid) for pid in sorted({int(process.pid) for process in (*computing, *served)}))


def _optional(nvml: Any, ask: Callable[[], T]) -> T | None:
    """What not every device or driver can tell."""
    try:
        return ask()
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
        return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
