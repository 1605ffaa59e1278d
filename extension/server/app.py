"""Where the extension is put together: configuration, routes, kernels that outlived another server."""

import asyncio
from typing import Any, cast

from jupyter_server.extension.application import ExtensionApp
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager

from warmcell.extension.config import CONFIG_FILE, Warmcell, unseen
from warmcell.extension.server.handlers import routes
from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.extension.server.kernelspecs import SandboxedKernelSpecManager
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
        if self.warmcell.sandboxed_only:
            serverapp.kernel_spec_manager_class = SandboxedKernelSpecManager
            serverapp.terminals_enabled = False
            self.log.info("Warmcell: only sandboxed kernels, and no terminals (c.Warmcell.sandboxed_only)")

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
            kernels = await self.link.kernels()
        except WarmcellError as error:
            self.log.warning("Warmcell: kernels of an earlier server could not be looked up: %s", error)
            return
        for kernel in kernels:
            if kernel["server"] != str(serverapp.root_dir) or kernel["server_alive"]:
                continue
            try:
                if not kernel["alive"]:  # it ended while no server looked; what is left of it is its sandbox
                    await self.link.delete(f"/kernels/{kernel['kernel_id']}")
                    continue
                await adopt(cast(AsyncMappingKernelManager, serverapp.kernel_manager), kernel)
                await self._recreate_notebook_session(serverapp, kernel)
                self.log.info("Warmcell: kernel %s runs on", kernel["kernel_id"])
            except Exception:
                self.log.exception("Warmcell: kernel %s could not be re-attached", kernel["kernel_id"])

    async def _recreate_notebook_session(self, serverapp: ServerApp, kernel: dict[str, Any]) -> None:
        """Jupyter keeps which notebook has which kernel in memory only; without it the page starts another."""
        path = kernel["notebook"]
        if path is None:
            return
        root = str(serverapp.root_dir).rstrip("/") + "/"
        if not path.startswith(root):
            return
        relative = path.removeprefix(root)
        await serverapp.session_manager.create_session(
            path=relative,
            name=relative.rsplit("/", 1)[-1],
            type="notebook",
            kernel_name=kernel["kernel_name"],
            kernel_id=kernel["kernel_id"],
        )

    async def stop_extension(self) -> None:
        """The server ends. Its kernels are shut down by Jupyter itself."""
        if hasattr(self, "link"):
            await asyncio.wait_for(self.link.close(), 5)
