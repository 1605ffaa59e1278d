"""What a kernel is told about its GPUs."""

from collections.abc import Sequence

from warmcell.sandbox.models import MIB, GpuDevice


def environment(devices: Sequence[GpuDevice]) -> dict[str, str]:
    """Environment variables for a kernel that has a lease on `devices`; without one, none is visible.

    CUDA counts the devices of its list as 0, 1, …, whatever their index on the machine is. Simulated devices
    are named in WARMCELL_GPUS and are none for CUDA. Of a share the frameworks are told how much memory it has; they
    heed it, nobody enforces it.
    """
    uuids = ",".join(device.uuid for device in devices if not device.simulated)
    told = {"CUDA_VISIBLE_DEVICES": uuids}
    if uuids:
        told["NVIDIA_VISIBLE_DEVICES"] = uuids
    shared = [device for device in devices if device.parts > 1]
    part = f"{min((1 / device.parts for device in shared), default=1.0):.4g}"
    if shared and uuids:
        # JAX, TensorFlow and CUDA's own service each have a word of their own for it. torch has a function only, which
        # the guest calls with the fraction below.
        told["XLA_PYTHON_CLIENT_MEM_FRACTION"] = part
        told["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
        limits = (f"{n}={_share_mib(device)}M" for n, device in enumerate(devices))
        told["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = ",".join(limits)
    if shared:
        told["WARMCELL_GPU_MEMORY_FRACTION"] = part
        told["WARMCELL_GPU_MEMORY_MIB"] = ",".join(str(_share_mib(device)) for device in devices)
    names = ",".join(device.name for device in devices if device.simulated)
    if names:
        told["WARMCELL_GPUS"] = names
    return told


def _share_mib(device: GpuDevice) -> int:
    return device.memory_total_bytes // device.parts // MIB
