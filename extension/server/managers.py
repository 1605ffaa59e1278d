"""The server's managers of single kernels: ours are ready when they are, not ten milliseconds later."""

import asyncio
from typing import Any

from jupyter_client.ioloop.manager import AsyncIOLoopKernelManager
from jupyter_server.services.kernels.kernelmanager import MappingKernelManager, ServerKernelManager

from warmcell.extension.server.kernelspecs import is_sandboxed

DEFAULT = f"{ServerKernelManager.__module__}.{ServerKernelManager.__name__}"


class _Unpaused(AsyncIOLoopKernelManager):
    """jupyter_client sleeps after each start, so that its own tests can see the time before a kernel is ready.

    The start itself is what its wrapper wraps. Where a later version has no such wrapper, nothing is changed.
    """

    async def _async_start_kernel(self, **kwargs: Any) -> None:
        start = getattr(super()._async_start_kernel, "__wrapped__", None)
        if start is None or self.kernel_spec is None or not is_sandboxed(self.kernel_spec):
            await super()._async_start_kernel(**kwargs)
            return
        if self._attempted_start or self._ready is None:
            self._ready = asyncio.Future()
        try:
            await start(self, **kwargs)
        except Exception as error:
            self._ready.set_exception(error)
            self.log.exception(self._ready.exception())
            raise
        if self.owns_kernel:
            self._ready.set_result(None)

    start_kernel = _async_start_kernel  # type: ignore[assignment] # as jupyter_client's own


class PromptKernelManager(ServerKernelManager, _Unpaused):
    """Jupyter's own, with starts that do not wait where the kernel is one of ours."""


def use_prompt_managers(kernels: MappingKernelManager) -> None:
    """For all kernels of this server, unless it was told to use another class than its own."""
    if kernels.kernel_manager_class == DEFAULT:
        kernels.kernel_manager_class = f"{__name__}.{PromptKernelManager.__name__}"
