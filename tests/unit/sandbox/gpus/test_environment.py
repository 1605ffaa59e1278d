"""What a kernel is told about its GPUs."""

from warmcell.sandbox.gpus.environment import environment
from warmcell.sandbox.models import GIB, GpuDevice


def device(uuid: str, name: str, *, simulated: bool) -> GpuDevice:
    return GpuDevice(uuid=uuid, index=0, name=name, memory_total_bytes=GIB, simulated=simulated)


def test_a_cpu_sandbox_sees_no_gpu() -> None:
    """Without a lease CUDA finds nothing, also where device nodes are in sight."""
    assert environment(()) == {"CUDA_VISIBLE_DEVICES": ""}


def test_real_devices_are_named_by_uuid() -> None:
    """UUIDs, in the order of the lease: an index means another device on another machine or after a reboot."""
    pair = (device("GPU-b", "H100", simulated=False), device("GPU-a", "H100", simulated=False))
    assert environment(pair) == {"CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a", "NVIDIA_VISIBLE_DEVICES": "GPU-b,GPU-a"}


def test_simulated_devices_are_named_and_hidden_from_cuda() -> None:
    """A program can read what it was given, and CUDA does not look for it."""
    pair = (device("GPU-sim-1", "A100", simulated=True), device("GPU-sim-2", "T4", simulated=True))
    assert environment(pair) == {"CUDA_VISIBLE_DEVICES": "", "WARMCELL_GPUS": "A100,T4"}


def test_a_share_is_told_how_much_memory_it_has() -> None:
    """A half of 80 GiB, in the words of the frameworks that have some; a simulated one in ours alone."""
    half = GpuDevice(uuid="GPU-a", index=0, name="A100", memory_total_bytes=80 * GIB, parts=2)
    told = environment((half,))
    assert (told["WARMCELL_GPU_MEMORY_FRACTION"], told["WARMCELL_GPU_MEMORY_MIB"]) == ("0.5", "40960")
    assert told["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert told["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=40960M"
    simulated = environment((device("GPU-sim-1", "A100", simulated=True),))
    assert "WARMCELL_GPU_MEMORY_FRACTION" not in simulated
