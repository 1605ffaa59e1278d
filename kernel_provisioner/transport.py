"""How a KernelManager's clients reach the proxy: sockets in a short private directory, unless it insists on tcp."""

import hashlib
import ipaddress
from typing import Final

from jupyter_client.manager import KernelManager

from warmcell.sandbox.paths import Paths

_PORTS: Final = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}


def settle(manager: KernelManager, kernel_id: str, paths: Paths) -> None:
    """Before the first start: have the manager use ipc, at paths that are short and ours.

    jupyter_client's own would lie beside the connection file, whose path may be too long for a Unix socket. A manager
    that was told to use tcp (configured, or given ports or an address of another interface) keeps it, and one that
    was given an ipc address keeps that.
    """
    if manager.transport == "ipc":
        if manager.ip == manager._ip_default():
            _use_ipc(manager, kernel_id, paths)
    elif not _insists_on_tcp(manager):
        _use_ipc(manager, kernel_id, paths)


def socket_prefix(kernel_id: str, paths: Paths) -> str:
    """What the names of a kernel's sockets begin with: in a directory of its own below `paths.kernels`."""
    return str(paths.kernels / hashlib.sha256(kernel_id.encode()).hexdigest()[:12] / "c")


def _use_ipc(manager: KernelManager, kernel_id: str, paths: Paths) -> None:
    manager.transport = "ipc"
    manager.ip = socket_prefix(kernel_id, paths)
    for name, number in _PORTS.items():
        setattr(manager, name, number)


def _insists_on_tcp(manager: KernelManager) -> bool:
    if any(getattr(manager, name) for name in _PORTS):
        return True
    for kind in type(manager).__mro__:
        if manager.config.get(kind.__name__, {}).get("transport") == "tcp":
            return True
    try:
        return not ipaddress.ip_address(manager.ip).is_loopback
    except ValueError:
        return True
