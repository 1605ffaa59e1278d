"""What is asked of an engine of containers, without one."""

import pytest

from warmcell.sandbox.backends.docker.engine import EngineInfo
from warmcell.sandbox.backends.docker.graphics import devices
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import GIB, GpuDevice


def info(*, runtimes: tuple[str, ...] = ("runc",), cdi: bool = False) -> EngineInfo:
    """An engine that can do that."""
    return EngineInfo(
        version="20.10",
        api=(1, 41),
        runtimes=frozenset(runtimes),
        default_runtime="runc",
        driver="overlay2",
        can={"memory": True, "pids": True, "cpu": True},
        cdi=cdi,
        maps_users=False,
        live_restore=False,
    )


def gpu(uuid: str, *, simulated: bool = False) -> GpuDevice:
    """One of a machine's."""
    return GpuDevice(uuid=uuid, index=0, name="A100", memory_total_bytes=80 * GIB, simulated=simulated)


def test_gpus_are_named_by_uuid_and_never_counted() -> None:
    """`Count` would give everybody the same device."""
    (asked,) = devices([gpu("GPU-1"), gpu("GPU-2")], info(runtimes=("runc", "nvidia")))["DeviceRequests"]
    assert asked == {
        "Driver": "nvidia",
        "DeviceIDs": ["GPU-1", "GPU-2"],
        "Capabilities": [["gpu", "compute", "utility"]],
    }


def test_without_nvidias_runtime_devices_are_named_as_the_interface_does() -> None:
    """Engines that know the Container Device Interface need no runtime of NVIDIA's."""
    (asked,) = devices([gpu("GPU-1")], info(cdi=True))["DeviceRequests"]
    assert asked == {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1"]}


def test_simulated_gpus_and_none_ask_for_nothing() -> None:
    """A simulated one has no device."""
    assert devices([], info()) == {}
    assert devices([gpu("GPU-1", simulated=True)], info()) == {}


def test_an_engine_without_a_way_to_gpus_says_so() -> None:
    """A kernel that was promised a GPU never starts without one."""
    with pytest.raises(BackendUnavailableError) as failed:
        devices([gpu("GPU-1")], info())
    assert "NVIDIA Container Toolkit" in failed.value.hint
