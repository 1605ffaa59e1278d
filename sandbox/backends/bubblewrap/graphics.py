"""What a sandbox with GPUs sees of the machine: device nodes, and where libraries look devices up."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends import cdi, nvidia
from warmcell.sandbox.backends.bubblewrap.rootfs import NODE_LINKS, NODES, View, host
from warmcell.sandbox.models import GpuDevice

_SYS = ("/sys/bus/pci", "/sys/devices/pci*", "/sys/module/nvidia*", "/sys/class/drm")
_OWN_NODES = (*NODES, *(f"/dev/{name}" for name in (*NODE_LINKS, "pts", "shm")))


def show(view: View, gpus: Sequence[GpuDevice]) -> None:
    """The nodes of the leased devices, those that all devices share, and what the driver wants besides.

    This comes after all that the spec asks for.
    """
    more = cdi.edits(gpus)
    view.nodes = nvidia.nodes(gpus, more, taken=_OWN_NODES)
    if not view.nodes:
        return
    for guest, node in view.nodes.items():
        view.entries[guest] = host(Path(node), mode="dev")
    for pattern in _SYS:
        for path in sorted(Path("/").glob(pattern.lstrip("/"))):
            view.show(path)
    view.make_links()
    view.env |= nvidia.show(view, more)


def nodes(gpus: Sequence[GpuDevice]) -> Mapping[str, str]:
    """Place in a sandbox → node of the host, of all that these devices need; none for made-up ones. Blocks."""
    return nvidia.nodes(gpus, cdi.edits(gpus), taken=_OWN_NODES)
