"""What a kernel is told about its GPUs."""

from collections.abc import Sequence

from warmcell.sandbox.models import GpuDevice


def environment(devices: Sequence[GpuDevice]) -> dict[str, str]:
    """Environment variables for a kernel that has a lease on `devices`; without one, none is visible.

    CUDA counts the devices of its list as 0, 1, …, whatever their index on the machine is. Simulated devices
    are named in WARMCELL_GPUS and are none for CUDA.
    """
    uuids = ",".join(device.uuid for device in devices if not device.simulated)
    told = {"CUDA_VISIBLE_DEVICES": uuids}
    if uuids:
        told["NVIDIA_VISIBLE_DEVICES"] = uuids
    names = ",".join(device.name for device in devices if device.simulated)
    if names:
        told["WARMCELL_GPUS"] = names
    return told
