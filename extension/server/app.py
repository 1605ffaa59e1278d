"""Where the extension is put together: configuration, routes, kernels that outlived another server."""

import asyncio
from typing import Any

from jupyter_server.extension.application import ExtensionApp
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from jupyter_server.services.sessions.sessionmanager import SessionManager
from prometheus_client import REGISTRY

from warmcell.extension.config import CONFIG_FILE, Warmcell, unseen
from warmcell.extension.server.e2b import routing as e2b
from warmcell.extension.server.forward import keep_out_of_logs, serve_programs
from warmcell.extension.server.handlers import routes
from warmcell.extension.server.jupyter_api import rest as jupyter_api
from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.extension.server.keeping import keep_all, suspending
from warmcell.extension.server.kernelspecs import SandboxedKernelSpecManager
from warmcell.extension.server.managers import use_prompt_managers
from warmcell.extension.server.metrics import KeeperMetrics, MetricsHandler
from warmcell.extension.server.ports import handler as ports
from warmcell.extension.server.sessions import remembering
from warmcell.extension.server.takeover import Takeover
from warmcell.extension.server.websocket import use_prompt_connections
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
        keep_out_of_logs(self.settings)
        self.metrics = self.settings["warmcell_metrics"] = KeeperMetrics()
        REGISTRY.register(self.metrics)
        use_prompt_connections(self.settings)
        if isinstance(self.serverapp.kernel_manager, AsyncMappingKernelManager):
            use_prompt_managers(self.serverapp.kernel_manager)
        self._adopted = False
        self.takeover = Takeover(self.serverapp, self.link, self.log)
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # the usual way: the loop starts when all extensions are loaded
            self.serverapp.io_loop.run_sync(self._adopt_kernels)

    def initialize_handlers(self) -> None:
        """Our REST; first what programs ask for, whatever the path."""
        assert self.serverapp is not None
        serve_programs(self.serverapp.web_app)
        e2b.add_to(self.serverapp.web_app, self.serverapp.base_url, self.warmcell, alone=False)
        self.handlers.extend(routes())
        self.handlers.extend([*ports.routes(), *jupyter_api.routes()])
        self.handlers.append((r"/metrics", MetricsHandler))

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        """In a loop that ran already when we were loaded, now is the first moment to adopt."""
        await self._adopt_kernels()

    async def _adopt_kernels(self) -> None:
        """Take over kernels whose server is gone: before a page asks for the list and, not finding its own, starts
        another.
        """
        if not self._adopted:
            self._adopted = True
            await self.takeover.begin()

    async def stop_extension(self) -> None:
        """The server ends. Kernels that nobody has shut down stay with the keeper; the others Jupyter ends next."""
        if not hasattr(self, "link"):
            return
        assert self.serverapp is not None
        REGISTRY.unregister(self.metrics)
        WarmcellProvisioner.ending = True
        kernels = self.serverapp.kernel_manager
        try:
            await self.takeover.end()
            if self.warmcell.keep_kernels and isinstance(kernels, AsyncMappingKernelManager):
                await keep_all(kernels, self.log)
            await asyncio.wait_for(self.link.close(), 5)
        except Exception:  # it would keep the server from ending
            self.log.exception("Warmcell: did not end well")


def _configured(serverapp: ServerApp, name: str) -> Any:
    """What a trait was set to; None if it has its default, which cannot be asked for so early."""
    return getattr(serverapp, name) if serverapp.trait_has_value(name) else None
