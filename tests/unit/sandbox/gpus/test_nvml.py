"""How NVML's answers become devices. The driver is played by functions in the places of the bindings' own."""

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpustat.nvml import pynvml

from warmcell.sandbox.errors import BackendUnavailableError, OperationTimeoutError
from warmcell.sandbox.gpus.nvml import NvmlInventory
from warmcell.sandbox.gpus.requests import parse
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
        answer("nvmlDeviceGetP2PStatus", lambda a, b, index: int({a, b} != {0, 1}))
        answer("nvmlDeviceGetTopologyCommonAncestor", lambda a, b: 50)
        answer("nvmlDeviceGetMigMode", lambda index: [int(index in self.mig)] * 2)
        answer("nvmlDeviceGetComputeRunningProcesses", self._processes)
        answer("nvmlDeviceGetMPSComputeRunningProcesses", self._processes)

    def _open(self) -> None:
        self.opened += 1

    def _count(self) -> int:
        self.listed += 1
        return self.count

    def _processes(self, index: int) -> list[SimpleNamespace]:
        untold = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=3 * GIB if pid == 1 else untold)
            for pid in self.computing.get(index, [])
        ]


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
    assert await inventory.board_uuids() == ("GPU-1",)
    assert inventory.problem.startswith("GPU 0 does not answer")


async def test_a_divided_device_is_not_offered_whole(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in MIG mode would fail every program that gets it, so without instances it is left out and said to be."""
    driver.mig = {1}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxMigDeviceCount", lambda index: 0)
    inventory = NvmlInventory()
    assert [d.uuid for d in await inventory.devices()] == ["GPU-0"]
    assert "GPU 1 is in MIG mode" in inventory.problem
    assert await inventory.board_uuids() == ("GPU-0", "GPU-1")


async def test_instances_of_a_divided_device_are_devices(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each has its own UUID, memory and nodes, is asked for by its profile, and is not what a kind's name means."""
    driver.mig, driver.count = {0}, 1
    instances = {2: "MIG-a", 3: "MIG-b"}

    def instance(index: int, n: int) -> str:
        if n not in instances:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return instances[n]

    def told(name: str, whole: Any, part: Callable[[str], Any]) -> None:
        monkeypatch.setattr(pynvml, name, lambda one: part(one) if isinstance(one, str) else whole)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMaxMigDeviceCount", lambda index: 7)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", instance)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetGpuInstanceId", {"MIG-a": 7, "MIG-b": 8}.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeInstanceId", lambda one: 0)
    told("nvmlDeviceGetUUID", "GPU-0", str)
    told("nvmlDeviceGetName", b"", lambda one: "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    told("nvmlDeviceGetMemoryInfo", None, lambda one: SimpleNamespace(total=10 * GIB, used=0))
    told("nvmlDeviceGetMinorNumber", 7, str)
    monkeypatch.setattr("warmcell.sandbox.gpus.nvml.CAPABILITIES", tmp_path)
    for path, minor in (("gi7/access", 66), ("gi7/ci0/access", 67), ("gi8/access", 75)):
        file = tmp_path / "gpu7" / "mig" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\n")
    inventory = NvmlInventory()
    first, second = await inventory.devices()
    assert (first.uuid, first.index, first.mig, first.memory_total_bytes) == ("MIG-a", 0, True, 10 * GIB)
    assert first.device_nodes == ("/dev/nvidia7", "/dev/nvidia-caps/nvidia-cap66", "/dev/nvidia-caps/nvidia-cap67")
    assert second.device_nodes == ("/dev/nvidia7", "/dev/nvidia-caps/nvidia-cap75")
    assert inventory.problem == ""
    answers = {asked: parse(asked).alternatives[0].matches(first) for asked in ("1g.10gb", "any", "H100", "2g.20gb")}
    assert answers == {"1g.10gb": True, "any": True, "H100": False, "2g.20gb": False}


async def test_how_near_devices_are_is_asked_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 by NVLink, else what the driver counts along PCIe; a driver that does not tell is no failure."""
    driver.count = 3
    monkeypatch.setattr("warmcell.sandbox.gpus.nvml._FRESH_S", 0.0)
    inventory = NvmlInventory()
    first = (await inventory.devices())[0]
    assert first.near == {"GPU-1": 0, "GPU-2": 50}
    driver.failures["nvmlDeviceGetP2PStatus"] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    driver.failures["nvmlDeviceGetTopologyCommonAncestor"] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert (await inventory.devices())[0].near == first.near
    assert (await NvmlInventory().devices())[0].near == {}


async def test_without_gpustat_there_is_no_gpu_and_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation is told, and breaks no kernel that wants none."""
    monkeypatch.setitem(sys.modules, "gpustat.nvml", None)
    inventory = NvmlInventory()
    assert await inventory.devices() == ()
    assert "gpustat cannot be loaded" in inventory.problem
    assert "pip install gpustat" in inventory.problem


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount"])
async def test_a_driver_that_is_too_old_is_told(driver: Driver, function: str) -> None:
    """It lacks a function that every newer one has."""
    driver.failures[function] = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    inventory = NvmlInventory()
    assert await inventory.devices() == ()
    assert "driver is too old" in inventory.problem


@pytest.mark.parametrize(
    "failure", ["GPU_IS_LOST", "RESET_REQUIRED", "TIMEOUT", "IN_USE", "INSUFFICIENT_POWER", "IRQ_ISSUE"]
)
@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName"])
async def test_a_failure_half_way_costs_that_device_alone(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, failure: str, function: str
) -> None:
    """Whatever is asked of it, and however it fails."""
    ask, code = getattr(pynvml, function), getattr(pynvml, f"NVML_ERROR_{failure}")

    def fail(index: int) -> Any:
        if index == 1:
            raise pynvml.NVMLError(code)
        return ask(index)

    monkeypatch.setattr(pynvml, function, fail)
    inventory = NvmlInventory()
    assert [d.uuid for d in await inventory.devices()] == ["GPU-0"]
    assert inventory.problem.startswith("GPU 1 does not answer")


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
    assert [process.memory_bytes for process in found] == [3 * GIB, None]
    assert str(found[1]) == f"process {2**22 + 5}"


async def test_what_is_free_is_asked_each_time(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of devices may be a second old; a failure is not read as room."""
    inventory = NvmlInventory()
    device = (await inventory.devices())[1]
    for free in (GIB, 79 * GIB):
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda index, free=free: SimpleNamespace(free=free))
        assert await inventory.free_bytes(device) == free
    driver.failures["nvmlDeviceGetHandleByUUID"] = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(BackendUnavailableError, match="nvidia-smi"):
        await inventory.free_bytes(device)


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
