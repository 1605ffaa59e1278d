"""The server's managers of single kernels: ours are ready when they are, not ten milliseconds later."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from jupyter_client.ioloop.manager import AsyncIOLoopKernelManager
from jupyter_server.services.kernels.kernelmanager import MappingKernelManager, ServerKernelManager

from warmcell.extension.server.kernelspecs import is_sandboxed

DEFAULT = f"{ServerKernelManager.__module__}.{ServerKernelManager.__name__}"


class _Unpaused(AsyncIOLoopKernelManager):
    """jupyter_client sleeps after each start and each end, so that its own tests can see the time in between.

    The start and the end themselves are what its wrapper wraps. Where a later version has no such wrapper, nothing is
    changed.
    """

    def _async_start_kernel(self, **kwargs: Any) -> Coroutine[Any, Any, None]:
        return self._unpaused(super()._async_start_kernel, **kwargs)

    def _async_shutdown_kernel(self, now: bool = False, restart: bool = False) -> Coroutine[Any, Any, None]:
        return self._unpaused(super()._async_shutdown_kernel, now=now, restart=restart)

    def _unpaused(self, paused: Callable[..., Coroutine[Any, Any, None]], **kwargs: Any) -> Coroutine[Any, Any, None]:
        change = getattr(paused, "__wrapped__", None)
        if change is None or self.kernel_spec is None or not is_sandboxed(self.kernel_spec):
            return paused(**kwargs)
        return self._pending(change(self, **kwargs))

    async def _pending(self, change: Coroutine[Any, Any, None]) -> None:
        """What the wrapper does, but for the sleep."""
        if self._attempted_start or self._ready is None:
            self._ready = asyncio.Future()
        try:
            await change
        except Exception as error:
            self._ready.set_exception(error)
            self.log.exception(self._ready.exception())
            raise
        if self.owns_kernel:
            self._ready.set_result(None)

    start_kernel = _async_start_kernel  # type: ignore[assignment] # as jupyter_client's own
    shutdown_kernel = _async_shutdown_kernel  # type: ignore[assignment]


class PromptKernelManager(ServerKernelManager, _Unpaused):
    """Jupyter's own, with starts and ends that do not wait where the kernel is one of ours."""


def use_prompt_managers(kernels: MappingKernelManager) -> None:
    """For all kernels of this server, unless it was told to use another class than its own."""
    if kernels.kernel_manager_class == DEFAULT:
        kernels.kernel_manager_class = f"{__name__}.{PromptKernelManager.__name__}"
