"""Kernels that stay: suspended where Jupyter would end them without anybody's wish for that kernel."""

import asyncio
import types
from contextvars import ContextVar
from logging import Logger
from typing import Any, cast

from jupyter_client.manager import KernelManager
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager

from warmcell.kernel_provisioner.provisioner import WarmcellProvisioner
from warmcell.sandbox.errors import (
    ConflictError,
    NotFoundError,
    OperationTimeoutError,
    TransportError,
    UnsupportedOperationError,
    WarmcellError,
)

_culled: ContextVar[str] = ContextVar("_culled", default="")
"""The kernel that the culler looks at in this task."""


class SuspendingKernelManager(AsyncMappingKernelManager):
    """The server's own culler suspends Warmcell's kernels. Those of others it ends, as ever."""

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """Cull a kernel that has been idle for long enough, unless it is suspended already."""
        provisioner = provisioner_of(self._kernels.get(kernel_id))
        try:
            if provisioner is not None and await provisioner.is_suspended():
                return
        except WarmcellError as error:
            self.log.warning("Warmcell: kernel %s is not culled: %s", kernel_id, error)
            return
        before = _culled.set(kernel_id)
        try:
            await super().cull_kernel_if_idle(kernel_id)  # type: ignore[no-untyped-call]
        finally:
            _culled.reset(before)

    async def shutdown_kernel(  # type: ignore[override] # as jupyter_server's own
        self, kernel_id: str, now: bool = False, restart: bool = False
    ) -> None:
        """End a kernel, or suspend it if it is the culler that asks."""
        if _culled.get() == kernel_id and await self._suspend(kernel_id):
            return
        await super().shutdown_kernel(kernel_id, now=now, restart=restart)  # type: ignore[no-untyped-call]

    async def _suspend(self, kernel_id: str) -> bool:
        """Whether the kernel is to be left alone from now on."""
        manager = self._kernels.get(kernel_id)
        provisioner = provisioner_of(manager)
        if provisioner is None or getattr(manager, "execution_state", None) == "dead":
            return False
        try:
            await provisioner.suspend(even_busy=self.cull_busy)
        except (UnsupportedOperationError, NotFoundError) as error:
            self.log.warning("Warmcell: kernel %s ends, because it cannot be suspended: %s", kernel_id, error)
            return False
        except ConflictError as error:
            self.log.info("Warmcell: kernel %s is left alone: %s", kernel_id, error)
        except WarmcellError as error:
            self.log.warning("Warmcell: kernel %s could not be suspended: %s", kernel_id, error)
        else:
            self.log.info("Warmcell: kernel %s is suspended; its next cell has it go on", kernel_id)
        return True


def suspending(kind: type[Any]) -> type[Any]:
    """The same class of kernel managers, with a culler that suspends. One that is not asynchronous is left as it is."""
    if not issubclass(kind, AsyncMappingKernelManager) or issubclass(kind, SuspendingKernelManager):
        return kind
    if kind is AsyncMappingKernelManager:
        return SuspendingKernelManager
    return types.new_class(f"Suspending{kind.__name__}", (SuspendingKernelManager, kind))


async def keep_all(kernels: AsyncMappingKernelManager, log: Logger) -> None:
    """The server ends: suspend its Warmcell kernels, also those that work, and leave them with the keeper.

    Kernels whose memory cannot be saved on this machine are left to Jupyter, which ends them. What goes wrong with one
    is logged, and is not the others' end.
    """
    ours = [(kernel_id, provisioner_of(kernels._kernels[kernel_id])) for kernel_id in kernels.list_kernel_ids()]
    work = {kernel_id: _keep(kernels, kernel_id, one, log) for kernel_id, one in ours if one is not None}
    ends = await asyncio.gather(*work.values(), return_exceptions=True)
    for kernel_id, end in zip(work, ends, strict=True):
        if isinstance(end, BaseException):
            log.error("Warmcell: kernel %s is not left to the next server", kernel_id, exc_info=end)


async def _keep(
    kernels: AsyncMappingKernelManager, kernel_id: str, provisioner: WarmcellProvisioner, log: Logger
) -> None:
    await provisioner.will_leave()
    try:
        await provisioner.suspend(even_busy=True)
        log.info("Warmcell: kernel %s is suspended; the next server takes it up", kernel_id)
    except UnsupportedOperationError as error:
        log.warning("Warmcell: kernel %s ends with this server, because it cannot be saved: %s", kernel_id, error)
        return
    except NotFoundError:
        return
    except (TransportError, OperationTimeoutError) as error:
        # It is being stopped as well, and then saves its kernels itself; or it still saves this one.
        log.warning("Warmcell: kernel %s is left to the keeper: %s", kernel_id, error)
    except WarmcellError as error:
        log.error(
            "Warmcell: kernel %s could not be suspended and runs on; the next server takes it up, "
            "`warmcell clean` ends it: %s",
            kernel_id,
            error,
        )
    await _let_go(kernels, kernel_id, provisioner)


async def _let_go(kernels: AsyncMappingKernelManager, kernel_id: str, provisioner: WarmcellProvisioner) -> None:
    """The server has this kernel no more; nobody tells the kernel."""
    untyped = cast(Any, kernels)
    if kernel_id not in untyped:  # Somebody has shut it down meanwhile.
        return
    untyped.stop_watching_activity(kernel_id)
    untyped.stop_buffering(kernel_id)
    manager: Any = kernels.remove_kernel(kernel_id)
    manager.stop_restarter()
    manager._close_control_socket()
    manager.cleanup_connection_file()
    await provisioner.leave()


def provisioner_of(manager: KernelManager | None) -> WarmcellProvisioner | None:
    """The provisioner of one of our kernels that has started; None for all others."""
    provisioner = getattr(manager, "provisioner", None)
    return provisioner if isinstance(provisioner, WarmcellProvisioner) and provisioner.has_process else None
