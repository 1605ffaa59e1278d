"""Where the extension is put together: configuration, routes, kernels that outlived another server."""

import asyncio
import contextlib
from typing import Any, cast

from jupyter_server.extension.application import ExtensionApp
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from jupyter_server.services.sessions.sessionmanager import SessionManager

from warmcell.extension.config import CONFIG_FILE, Warmcell, unseen
from warmcell.extension.server.handlers import routes
from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.extension.server.keeping import keep_all, suspending
from warmcell.extension.server.kernelspecs import SandboxedKernelSpecManager
from warmcell.extension.server.sessions import RememberingSessionManager, remembering
from warmcell.extension.server.websocket import use_prompt_connections
from warmcell.kernel_provisioner.adopt import adopt
from warmcell.kernel_provisioner.provisioner import WarmcellProvisioner
from warmcell.sandbox.errors import WarmcellError


class WarmcellApp(ExtensionApp):
    """Warmcell in a Jupyter server."""

    name = "warmcell"
    config_file_name = CONFIG_FILE
    classes = [Warmcell, WarmcellProvisioner]  # noqa: RUF012 - a trait of the base class, not a shared list
    load_other_extensions = True

    def _link_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        """Before the server makes its managers: the last moment at which theirs can be chosen."""
        super()._link_jupyter_server_extension(serverapp)
        self.warmcell = Warmcell(parent=self)
        self._warn_of_unseen_settings()
        if not GatewayClient.instance(parent=serverapp).gateway_enabled:  # else its kernels are another server's
            self._choose_managers(serverapp)
        if self.warmcell.sandboxed_only:
            serverapp.kernel_spec_manager_class = SandboxedKernelSpecManager
            serverapp.terminals_enabled = False
            self.log.info("Warmcell: only sandboxed kernels, and no terminals (c.Warmcell.sandboxed_only)")

    def _choose_managers(self, serverapp: ServerApp) -> None:
        """Jupyter's, or those that were configured, and what they do for our kernels besides."""
        if self.warmcell.keep_kernels:
            kernels = _configured(serverapp, "kernel_manager_class") or AsyncMappingKernelManager
            serverapp.kernel_manager_class = suspending(kernels)
        sessions = _configured(serverapp, "session_manager_class") or SessionManager
        serverapp.session_manager_class = remembering(sessions)

    def _warn_of_unseen_settings(self) -> None:
        """The keeper serves all servers and scripts of the user, so it reads the one file that they share."""
        try:
            names = unseen(self.warmcell)
        except WarmcellError as error:
            self.log.error("Warmcell: kernels cannot start: %s", error)
            return
        if names:
            self.log.warning(
                "Warmcell: %s of this server's configuration has no effect: the keeper, which all your servers share, "
                "reads %s.py alone. Move it there (for example into ~/.jupyter), then run `warmcell clean`.",
                ", ".join(f"c.Warmcell.{name}" for name in names),
                CONFIG_FILE,
            )

    def initialize_settings(self) -> None:
        """Make what handlers use."""
        assert self.serverapp is not None
        self.link = KeeperLink()
        root_dir = str(self.serverapp.root_dir)
        WarmcellProvisioner.server = root_dir
        WarmcellProvisioner.ending = False
        self.settings["warmcell_link"] = self.link
        use_prompt_connections(self.settings)
        self._adopted = False
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # the usual way: the loop starts when all extensions are loaded
            self.serverapp.io_loop.run_sync(self._adopt_kernels)

    def initialize_handlers(self) -> None:
        """Our REST."""
        self.handlers.extend(routes())

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        """In a loop that ran already when we were loaded, now is the first moment to adopt."""
        await self._adopt_kernels()

    async def _adopt_kernels(self) -> None:
        """Take over kernels whose server is gone: before a page asks for the list and, not finding its own, starts
        another.
        """
        if self._adopted:
            return
        self._adopted = True
        serverapp = self.serverapp
        assert serverapp is not None
        try:
            found = await self.link.kernels()
        except WarmcellError as error:
            self.log.warning("Warmcell: kernels of an earlier server could not be looked up: %s", error)
            return
        root = str(serverapp.root_dir)
        for kernel in found["kernels"]:
            if kernel["server"] == root and not kernel["server_alive"]:
                await self._adopt_kernel(serverapp, kernel)
        for lost in found["lost"]:
            if lost["server"] == root:
                await self._tell_loss(lost)

    async def _adopt_kernel(self, serverapp: ServerApp, kernel: dict[str, Any]) -> None:
        """One that ended while no server looked is adopted too: it is restarted as if it had just died, and said so."""
        try:
            await adopt(cast(AsyncMappingKernelManager, serverapp.kernel_manager), kernel)
            sessions = serverapp.session_manager
            if isinstance(sessions, RememberingSessionManager):
                await sessions.recreate(kernel["sessions"], kernel["kernel_id"])
            self.log.info("Warmcell: kernel %s goes on with this server", kernel["kernel_id"])
        except Exception:
            self.log.exception("Warmcell: kernel %s could not be re-attached", kernel["kernel_id"])

    async def _tell_loss(self, lost: dict[str, Any]) -> None:
        """The page says it when the notebook gets its next kernel; of a kernel without a notebook nobody else does."""
        which = lost["notebook"] or "no notebook"
        self.log.warning("Warmcell: kernel %s (%s): %s", lost["kernel_id"], which, lost["why"])
        if lost["notebook"] is None:
            with contextlib.suppress(WarmcellError):
                await self.link.delete(f"/kernels/{lost['kernel_id']}")

    async def stop_extension(self) -> None:
        """The server ends. Kernels that nobody has shut down stay with the keeper; the others Jupyter ends next."""
        if not hasattr(self, "link"):
            return
        assert self.serverapp is not None
        WarmcellProvisioner.ending = True
        kernels = self.serverapp.kernel_manager
        try:
            if self.warmcell.keep_kernels and isinstance(kernels, AsyncMappingKernelManager):
                await keep_all(kernels, self.log)
            await asyncio.wait_for(self.link.close(), 5)
        except Exception:  # it would keep the server from ending
            self.log.exception("Warmcell: did not end well")


def _configured(serverapp: ServerApp, name: str) -> Any:
    """What a trait was set to; None if it has its default, which cannot be asked for so early."""
    return getattr(serverapp, name) if serverapp.trait_has_value(name) else None
