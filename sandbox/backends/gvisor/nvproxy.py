"""GPUs by gVisor's own driver, nvproxy: it passes on those calls of the machine's driver that it knows.

What these look like changes from one version of NVIDIA's driver to the next, so a runsc serves exactly the versions
that it lists.
"""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import cdi, nvidia
from warmcell.sandbox.backends.gvisor.binary import Runsc
from warmcell.sandbox.backends.gvisor.root import Root
from warmcell.sandbox.errors import BackendUnavailableError, UnsupportedOperationError
from warmcell.sandbox.models import GpuDevice

DRIVER = Path("/sys/module/nvidia/version")
"""Where the driver that is loaded says its version."""
CAPABILITIES = {"NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
"""What a runsc that asks for it lets through: no display, no video."""
ELSEWHERE = "use the bubblewrap backend."
_OWN_NODE = re.compile(r"/dev/nvidia\d+")
_VERSION = re.compile(r"^\d+\.\d+(?:\.\d+)?$", re.M)
_OPEN_TO_ALL = 0o666


@dataclass(frozen=True, slots=True)
class Shown:
    """What a sandbox with GPUs has besides the rest."""

    devices: Sequence[Mapping[str, Any]] = ()
    """Of the OCI configuration. runsc makes these nodes and opens no other of the host's."""
    env: Mapping[str, str] = field(default_factory=dict)


def serving(runsc: Runsc, gpus: Sequence[GpuDevice]) -> Runsc:
    """The runsc as it is to be called for a sandbox with these devices: as before where none is real. Blocks.

    Raises:
        UnsupportedOperationError: One of them is an instance of a divided GPU.
        BackendUnavailableError: It does not know the driver of this machine.
    """
    if not nvidia.leased(gpus):
        return runsc
    if any(gpu.mig for gpu in gpus):
        raise UnsupportedOperationError(
            "gVisor sandboxes cannot have MIG instances", hint=f"Ask for a whole GPU, or {ELSEWHERE}"
        )
    return replace(runsc, driver=check(runsc))


def check(runsc: Runsc) -> str:
    """The version of this machine's driver, which that runsc knows. Blocks, the first time for some 20 ms.

    Raises:
        BackendUnavailableError: It does not, or there is none.
    """
    try:
        driver = DRIVER.read_text().strip()
    except OSError:
        driver = ""
    if not driver:
        raise BackendUnavailableError(
            "No NVIDIA driver is loaded on this machine", hint="Install it, or load it: modprobe nvidia."
        )
    try:
        known = _known(runsc.path, runsc.path.stat().st_mtime_ns)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BackendUnavailableError(
            f"{runsc.path} does not say which NVIDIA drivers it knows: {error}", hint=f"Update runsc, or {ELSEWHERE}"
        ) from error
    if driver not in known:
        raise BackendUnavailableError(
            f"runsc {runsc.version} does not know the NVIDIA driver {driver} of this machine",
            hint=f"Install a runsc that lists it (runsc nvproxy list-supported-drivers), or a driver that this one"
            f" knows ({', '.join(known)}), or {ELSEWHERE}",
            details={"required": driver, "found": list(known)},
        )
    return driver


def show(root: Root, gpus: Sequence[GpuDevice]) -> Shown:
    """The nodes of the leased devices, those that all of them share, and what the driver wants besides. Blocks.

    This comes after all that the spec asks for.

    Raises:
        BackendUnavailableError: A node is not there.
        UnsupportedOperationError: A device has a node that gVisor does not pass on.
    """
    leased = nvidia.leased(gpus)
    if not leased:
        return Shown()
    others = [node for node in leased if not _OWN_NODE.fullmatch(node)]
    if others:
        raise UnsupportedOperationError(
            f"gVisor does not pass on {others[0]}", hint=f"Ask for another GPU, or {ELSEWHERE}"
        )
    more = cdi.edits(gpus)
    found = nvidia.nodes(gpus, more)
    wanted = (*dict.fromkeys(leased), nvidia.CONTROL, nvidia.MEMORY)
    missing = [node for node in wanted if found.get(node) != node]
    if missing:
        raise BackendUnavailableError(
            f"The NVIDIA driver has no {missing[0]} on this machine", hint="Run nvidia-modprobe -c 0 -u as root."
        )
    # CUDA looks devices up there; it is gVisor's own.
    root.memory("/sys", kind="sysfs")
    root.link_aliases()
    return Shown(devices=[_device(node) for node in wanted], env={**nvidia.show(root, more), **CAPABILITIES})


def _device(node: str) -> Mapping[str, Any]:
    number = os.stat(node).st_rdev
    place = {"path": node, "type": "c", "major": os.major(number), "minor": os.minor(number)}
    return {**place, "fileMode": _OPEN_TO_ALL, "uid": 0, "gid": 0}


@cache
def _known(path: Path, changed_ns: int) -> tuple[str, ...]:
    """The versions that the binary lists, oldest first; asked again when the file has changed."""
    words = [str(path), "nvproxy", "list-supported-drivers"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    found = set(_VERSION.findall(said.stdout))
    if not found:
        raise ValueError((said.stderr or said.stdout).strip()[:200] or f"exit code {said.returncode}")
    return tuple(sorted(found, key=lambda version: [int(part) for part in version.split(".")]))
