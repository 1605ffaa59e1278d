"""Give a Jupyter server a kernel that outlived the server before it."""

import asyncio
import os
from collections.abc import Mapping
from typing import Any, cast

from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_server._tz import utcnow
from jupyter_server.prometheus.metrics import KERNEL_CURRENTLY_RUNNING_TOTAL
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager, ServerKernelManager

from warmcell.kernel_provisioner.provisioner import WarmcellProvisioner
from warmcell.sandbox.errors import ConflictError, InvalidRequestError


async def adopt(kernels: AsyncMappingKernelManager, kernel: Mapping[str, Any]) -> str:
    """Have a server manage a kernel of the keeper's (one of `GET /kernels`) as if it had started it.

    Afterwards the server lists it under its old id, its websocket works, its activity is watched, and it is restarted
    if it dies. Sessions are the caller's to make again.

    Returns:
        The kernel's id.

    Raises:
        ConflictError: The server has a kernel of that id.
        InvalidRequestError: Its kernelspec is none of Warmcell's any more.
        WarmcellError: The keeper does not have it any more.
    """
    kernel_id: str = kernel["kernel_id"]
    if kernel_id in kernels:
        raise ConflictError(f"This server has a kernel {kernel_id} already", hint="Nothing needs to be done.")
    manager, name, _ = kernels.pre_start_kernel(kernel["kernel_name"] or None, {"kernel_id": kernel_id})
    assert isinstance(manager, ServerKernelManager)
    factory = KernelProvisionerFactory.instance(parent=kernels)
    provisioner = factory.create_provisioner_instance(kernel_id, manager.kernel_spec, parent=manager)
    if not isinstance(provisioner, WarmcellProvisioner):
        raise InvalidRequestError(
            f"The kernelspec {name} is none of Warmcell's", hint="Install it again: warmcell kernelspec install."
        )
    await provisioner.attach(kernel)
    _connect(manager, provisioner, kernel)
    await _enlist(kernels, manager, kernel)
    return kernel_id


def _connect(manager: ServerKernelManager, provisioner: WarmcellProvisioner, kernel: Mapping[str, Any]) -> None:
    """As after a start: where the kernel is, what a restart starts it with, and who watches it."""
    manager.kernel_id = kernel["kernel_id"]
    manager.provisioner = provisioner
    manager.load_connection_info(kernel["connection"])
    manager.write_connection_file()
    environ, launch = dict(os.environ), dict[str, Any]()
    if kernel["session_name"] is not None:
        environ["JPY_SESSION_NAME"] = kernel["session_name"]
    if kernel["cwd"]:
        launch["cwd"] = kernel["cwd"]
    manager.set_trait("_launch_args", {**launch, "env": environ})
    manager._attempted_start = True
    manager.ready.set_result(None)
    manager.start_restarter()
    manager._connect_control_socket()


async def _enlist(kernels: AsyncMappingKernelManager, manager: ServerKernelManager, kernel: Mapping[str, Any]) -> None:
    """What jupyter_server's `start_kernel` does once a kernel has started."""
    kernel_id = kernel["kernel_id"]
    kernels._kernels[kernel_id] = manager
    kernels._kernel_connections[kernel_id] = 0
    manager.execution_state = "busy" if kernel["busy"] else "idle"
    if kernel["busy"]:
        # Else the first page to come waits for an answer that is behind a cell; the version in it is the current one.
        known = asyncio.get_running_loop().create_future()
        known.set_result({})
        cast(Any, manager)._kernel_info_future = known
    manager.reason = ""
    manager.last_activity = utcnow()
    await kernels._finish_kernel_start(kernel_id)  # type: ignore[no-untyped-call]
    KERNEL_CURRENTLY_RUNNING_TOTAL.labels(type=manager.kernel_name).inc()
    kernels.initialize_culler()  # type: ignore[no-untyped-call]
