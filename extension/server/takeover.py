"""Kernels that a server takes over from the one before: at its start, or when that one has let go of them."""

import asyncio
import contextlib
import time
from logging import Logger
from typing import Any, Final, cast

from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager

from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.extension.server.sessions import RememberingSessionManager
from warmcell.kernel_provisioner.adopt import adopt
from warmcell.sandbox.errors import ConflictError, NotFoundError, TransportError, WarmcellError

LEAVING_PATIENCE_S: Final = 60.0
"""A server begins to serve without the kernels that one which is ending has not saved by then; they come later."""

LATE_S: Final = 120.0
"""A server that does not say yet that it is ending is followed for so long: a signal may be on its way. What two
servers of one folder do later is their own affair."""

ANSWER_S: Final = 30.0
"""An answer takes at most so much longer than what was asked for."""


class Takeover:
    """The kernels of a server's folder that no other server owns become this server's. None ever has two owners."""

    def __init__(self, serverapp: ServerApp, link: KeeperLink, log: Logger) -> None:
        self._serverapp = serverapp
        self._link = link
        self._log = log
        self._root = str(serverapp.root_dir)
        self._following: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Take over what can be had; wait for what a server that is ending still saves, and follow the rest."""
        try:
            found = await self._link.kernels()
        except WarmcellError as error:
            self._log.warning("Warmcell: kernels of an earlier server could not be looked up: %s", error)
            return
        leaving: list[asyncio.Task[None]] = []
        for kernel in found["kernels"]:
            if kernel["server"] != self._root:
                continue
            if not kernel["server_alive"]:
                await self._adopt(kernel)
                continue
            task = asyncio.create_task(self._follow(kernel))
            self._following.add(task)
            task.add_done_callback(self._following.discard)
            if kernel["server_leaving"]:
                leaving.append(task)
        for lost in found["lost"]:
            if lost["server"] == self._root:
                await self._tell_loss(lost)
        if leaving:
            self._log.info("Warmcell: waiting for %d kernels of a server that is ending", len(leaving))
            await asyncio.wait(leaving, timeout=LEAVING_PATIENCE_S)

    async def end(self) -> None:
        """Follow no more. Idempotent."""
        for task in list(self._following):
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)

    async def _follow(self, kernel: dict[str, Any]) -> None:
        """Adopt a kernel when its server has let go of it, if that comes soon or is announced."""
        late = time.monotonic() + LATE_S
        try:
            while kernel["server_alive"]:
                left = LATE_S if kernel["server_leaving"] else late - time.monotonic()
                if left <= 0:
                    return
                kernel = await self._look(kernel["kernel_id"], left)
        except NotFoundError:  # it was ended
            return
        except WarmcellError as error:
            self._log.warning("Warmcell: kernel %s of another server is not followed: %s", kernel["kernel_id"], error)
            return
        await self._adopt(kernel)

    async def _look(self, kernel_id: str, patience_s: float) -> dict[str, Any]:
        """How it is when nobody owns it, or after this time; a keeper that is replaced meanwhile is waited for."""
        try:
            path = f"/kernels/{kernel_id}?unowned={patience_s:.3f}"
            kernel: dict[str, Any] = await self._link.get(path, timeout=patience_s + ANSWER_S)
        except TransportError:
            found = await self._link.kernels()
            for kernel in found["kernels"]:
                if kernel["kernel_id"] == kernel_id:
                    return kernel
            raise NotFoundError(f"Kernel {kernel_id} is gone", hint="It ended with its keeper.") from None
        return kernel

    async def _adopt(self, kernel: dict[str, Any]) -> None:
        """One that ended while no server looked is adopted too: it is restarted as if it had just died, and said so."""
        try:
            await adopt(cast(AsyncMappingKernelManager, self._serverapp.kernel_manager), kernel)
            sessions = self._serverapp.session_manager
            if isinstance(sessions, RememberingSessionManager):
                await sessions.recreate(kernel["sessions"], kernel["kernel_id"])
            self._log.info("Warmcell: kernel %s goes on with this server", kernel["kernel_id"])
        except ConflictError as error:  # another server was faster
            self._log.info("Warmcell: kernel %s is not taken over: %s", kernel["kernel_id"], error)
        except Exception:
            self._log.exception("Warmcell: kernel %s could not be re-attached", kernel["kernel_id"])

    async def _tell_loss(self, lost: dict[str, Any]) -> None:
        """The page says it when the notebook gets its next kernel; of a kernel without a notebook nobody else does."""
        which = lost["notebook"] or "no notebook"
        self._log.warning("Warmcell: kernel %s (%s): %s", lost["kernel_id"], which, lost["why"])
        if lost["notebook"] is None:
            with contextlib.suppress(WarmcellError):
                await self._link.delete(f"/kernels/{lost['kernel_id']}")
