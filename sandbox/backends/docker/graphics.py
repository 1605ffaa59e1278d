"""Leased GPUs, handed to a container by their UUIDs and never by number."""

from collections.abc import Mapping, Sequence
from typing import Any

from warmcell.sandbox.backends.docker.about import EngineInfo
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import GpuDevice

WHAT_FOR = ("gpu", "compute", "utility")
"""What of the driver comes along: no display, no video."""


def devices(gpus: Sequence[GpuDevice], info: EngineInfo) -> Mapping[str, Any]:
    """What a container's host configuration says of GPUs; nothing where none is real.

    Raises:
        BackendUnavailableError: The engine has no way to hand out GPUs.
    """
    uuids = [gpu.uuid for gpu in gpus if not gpu.simulated]
    if not uuids:
        return {}
    check(info)
    if "nvidia" in info.runtimes:
        return {"DeviceRequests": [{"Driver": "nvidia", "DeviceIDs": uuids, "Capabilities": [list(WHAT_FOR)]}]}
    return {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={uuid}" for uuid in uuids]}]}


def check(info: EngineInfo) -> None:
    """See that this engine has a way to hand out GPUs.

    Raises:
        BackendUnavailableError: It has none.
    """
    if info.podman:
        raise BackendUnavailableError(
            "Podman hands out no GPUs over this API", hint="Use Docker, or the bubblewrap backend."
        )
    if "nvidia" not in info.runtimes and not info.cdi:
        raise BackendUnavailableError(
            "The container engine cannot hand out GPUs",
            hint="Install the NVIDIA Container Toolkit, 1.17.8 or newer: `nvidia-ctk runtime configure`, then restart "
            "the engine.",
        )
