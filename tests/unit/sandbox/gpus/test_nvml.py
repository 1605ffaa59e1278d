"""How NVML's answers become devices. The driver is played by functions in the places of the bindings' own."""

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from gpustat.nvml import pynvml

from warmcell.sandbox.errors import BackendUnavailableError, OperationTimeoutError
from warmcell.sandbox.gpus.nvml import NvmlInventory
from warmcell.sandbox.models import GIB


class Driver:
    """What a machine's driver says, to be changed by a test."""

    def __init__(self) -> None:
        self.count = 2
        self.listed = 0
        self.opened = 0
        self.failures: dict[str, Exception] = {}
        self.mig: set[int] = set()
        self.computing: dict[int, list[int]] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def answer(name: str, tell: Callable[..., Any]) -> None:
            def call(*arguments: Any) -> Any:
                if name in self.failures:
                    raise self.failures[name]
                return tell(*arguments)

            monkeypatch.setattr(pynvml, name, call)

        answer("nvmlInit", self._open)
        answer("nvmlShutdown", lambda: None)
        answer("nvmlSystemGetDriverVersion", lambda: b"580.126.20")
        answer("nvmlDeviceGetCount", self._count)
        answer("nvmlDeviceGetHandleByIndex", lambda index: index)
        answer("nvmlDeviceGetHandleByUUID", lambda uuid: int(uuid[-1]))
        answer("nvmlDeviceGetUUID", lambda index: f"GPU-{index}")
        answer("nvmlDeviceGetName", lambda index: b"NVIDIA H100 80GB HBM3")
        answer("nvmlDeviceGetMemoryInfo", lambda index: SimpleNamespace(total=80 * GIB, used=GIB))
        answer("nvmlDeviceGetUtilizationRates", lambda index: SimpleNamespace(gpu=37))
        answer("nvmlDeviceGetMinorNumber", lambda index: 7 - index)
        answer("nvmlDeviceGetMigMode", lambda index: [int(index in self.mig)] * 2)
        answer("nvmlDeviceGetComputeRunningProcesses", self._processes)
        answer("nvmlDeviceGetMPSComputeRunningProcesses", self._processes)

    def _open(self) -> None:
        self.opened += 1

    def _count(self) -> int:
        self.listed += 1
        return self.count

    def _processes(self, index: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.computing.get(index, [])]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    driver.install(monkeypatch)
    return driver


async def test_a_device_is_told_with_its_own_node(driver: Driver) -> None:
    """Name without the vendor, sizes in bytes, and the node by minor number, which is not the index."""
    first, second = await NvmlInventory().devices()
    assert (first.uuid, first.index, first.name) == ("GPU-0", 0, "H100 80GB HBM3")
    assert (first.memory_total_bytes, first.memory_used_bytes) == (80 * GIB, GIB)
    assert (first.utilization_pct, first.driver_version) == (37.0, "580.126.20")
    assert (first.device_nodes, second.device_nodes) == (("/dev/nvidia7",), ("/dev/nvidia6",))
    assert not first.simulated


async def test_answers_are_kept_for_a_second(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many callers at once cost one look at the driver; a second later there is a fresh one."""
    now = 100.0
    monkeypatch.setattr("warmcell.sandbox.gpus.nvml.time", SimpleNamespace(monotonic=lambda: now))
    inventory = NvmlInventory()
    await asyncio.gather(*(inventory.devices() for _ in range(20)))
    now = 100.99
    await inventory.devices()
    assert driver.listed == 1
    now = 101.0
    await inventory.devices()
    assert driver.listed == 2
    assert driver.opened == 1


@pytest.mark.parametrize("missing", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
async def test_no_driver_is_a_normal_answer(driver: Driver, missing: int) -> None:
    """A machine without a driver has no devices and no problem."""
    driver.failures["nvmlInit"] = pynvml.NVMLError(missing)
    inventory = NvmlInventory()
    assert await inventory.devices() == ()
    assert inventory.problem == ""


async def test_a_driver_that_fails_is_told_with_its_cure(driver: Driver) -> None:
    """After an upgrade without a reboot there are no devices, and the reason is there to be shown."""
    driver.failures["nvmlInit"] = pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    inventory = NvmlInventory()
    assert await inventory.devices() == ()
    assert "reboot" in inventory.problem


async def test_a_reloaded_driver_is_opened_again(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that has become void is made anew within the same question."""
    inventory = NvmlInventory()
    await inventory.devices()
    void = [pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)]

    def count() -> int:
        if void:
            raise void.pop()
        return 2

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", count)
    monkeypatch.setattr("warmcell.sandbox.gpus.nvml._FRESH_S", 0.0)
    assert len(await inventory.devices()) == 2
    assert driver.opened == 2


async def test_a_lost_device_does_not_hide_the_others(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU off the bus is told as a problem; the rest can be leased."""

    def uuid(index: int) -> str:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return f"GPU-{index}"

    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", uuid)
    inventory = NvmlInventory()
    assert [d.uuid for d in await inventory.devices()] == ["GPU-1"]
    assert inventory.problem.startswith("GPU 0 does not answer")


async def test_a_divided_device_is_not_offered_whole(driver: Driver) -> None:
    """A GPU in MIG mode would fail every program that gets it, so it is left out and said to be."""
    driver.mig = {1}
    inventory = NvmlInventory()
    assert [d.uuid for d in await inventory.devices()] == ["GPU-0"]
    assert "GPU 1 is in MIG mode" in inventory.problem


@pytest.mark.parametrize(
    "untold", ["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMinorNumber", "nvmlDeviceGetMigMode"]
)
async def test_what_a_device_cannot_tell_is_left_out(driver: Driver, untold: str) -> None:
    """An older card or driver that lacks a meter is still a device."""
    driver.failures[untold] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert len(await NvmlInventory().devices()) == 2


async def test_who_computes_is_asked_each_time(driver: Driver) -> None:
    """Processes are never from a cache, and each is told once with what can be seen of it."""
    inventory = NvmlInventory()
    device = (await inventory.devices())[1]
    assert await inventory.processes(device) == ()
    driver.computing[1] = [1, 2**22 + 5]
    found = await inventory.processes(device)
    assert [process.pid for process in found] == [1, 2**22 + 5]
    assert found[0].user == "root"
    assert str(found[1]) == f"process {2**22 + 5}"


async def test_a_driver_that_cannot_say_who_computes_is_no_free_device(driver: Driver) -> None:
    """A failure is not read as an empty list."""
    inventory = NvmlInventory()
    device = (await inventory.devices())[0]
    driver.failures["nvmlDeviceGetHandleByUUID"] = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(BackendUnavailableError, match="nvidia-smi"):
        await inventory.processes(device)


async def test_a_driver_that_hangs_is_given_up_in_time(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers get a typed error at the deadline, and all of them together hold one thread."""
    go_on = threading.Event()
    asked = 0

    def hang() -> int:
        nonlocal asked
        asked += 1
        go_on.wait(20)
        return 1

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", hang)
    inventory = NvmlInventory(timeout=0.05)
    try:
        with pytest.raises(OperationTimeoutError, match="did not answer in"):
            await inventory.devices()
        with pytest.raises(OperationTimeoutError):
            await inventory.devices()
        assert asked == 1
    finally:
        go_on.set()
    assert len(await NvmlInventory(timeout=5).devices()) == 1


async def test_closing_lets_go_and_asking_opens_again(driver: Driver) -> None:
    """The driver can be unloaded while a keeper runs that was told to close."""
    inventory = NvmlInventory()
    device = (await inventory.devices())[0]
    inventory.close()
    inventory.close()
    await inventory.processes(device)
    assert driver.opened == 2
