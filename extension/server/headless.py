"""`warmcell serve`: a server for agents and programs. It has Warmcell's REST and nothing else of Jupyter's."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from jupyter_server.extension.application import ExtensionApp
from jupyter_server.serverapp import ServerApp
from jupyter_server.utils import url_path_join
from tornado.httpserver import HTTPServer
from traitlets import Bool, Float, default

from warmcell.extension.config import CONFIG_FILE, Warmcell
from warmcell.extension.server.e2b import routing as e2b
from warmcell.extension.server.forward import PREFIX, ForwardHandler, keep_out_of_logs, serve_programs
from warmcell.extension.server.jupyter_api import rest as jupyter_api
from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.extension.server.ports import handler as ports
from warmcell.sandbox.choosing import AGENT
from warmcell.sandbox.client.start import is_listening
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.paths import Paths

QUIET = (*TERMINAL, State.SUSPENDED)
"""States in which a sandbox takes nothing but disk."""

CLOSE_TIMEOUT_S = 5.0

OPEN = (
    "your Jupyter configuration takes token and password away, and whoever reaches this server would be you. Leave "
    "c.IdentityProvider.token out of jupyter_config.py, or set it."
)


class HeadlessServer(ServerApp):
    """No contents, kernels, sessions, terminals or pages."""

    name = "jupyter-warmcell-serve"
    default_services = ()  # type: ignore[assignment] # it is declared as just as many as there are by default

    @default("no_browser_open_file")
    def _nothing_to_browse(self) -> bool:
        return True

    def running_server_info(self, kernel_count: bool = True) -> str:
        """What is logged as it listens (Jupyter's hook)."""
        return (
            f"Warmcell serves sandboxes at {self.connection_url.rstrip('/')}, to Sandbox(url=…, token=…) and others\n"
            "`warmcell token create NAME` makes a token; this server's own is good for all that is yours"
        )


class WarmcellServe(ExtensionApp):
    """Warmcell's REST in a server of its own, which ends when nobody needs it."""

    name = "warmcell_serve"
    extension_url = PREFIX
    config_file_name = CONFIG_FILE
    classes = [Warmcell]  # noqa: RUF012 - a trait of the base class, not a shared list
    serverapp_class = HeadlessServer
    load_other_extensions = False
    open_browser = False

    idle_s = Float(
        60.0,
        min=0.0,
        help="Seconds without a client and without a sandbox of an agent that runs, after which it ends. 0: never.",
    ).tag(config=True)

    announce = Bool(False, help="Print a line of JSON with its URL and its token once it listens.").tag(config=True)

    @classmethod
    def get_extension_package(cls) -> str:
        """The module that Jupyter loads it from."""
        return "warmcell.extension.server.headless"

    def initialize_settings(self) -> None:
        """Make what handlers use."""
        assert self.serverapp is not None
        if not self.serverapp.identity_provider.auth_enabled:
            self.log.critical("Warmcell: %s", OPEN)
            self.exit(1)
        self.link = KeeperLink()
        self.settings["warmcell_link"] = self.link
        keep_out_of_logs(self.settings)

    def initialize_handlers(self) -> None:
        """All verbs of sandboxes and snapshots go on to the keeper; others are not there."""
        assert self.serverapp is not None
        serve_programs(self.serverapp.web_app)
        e2b.add_to(self.serverapp.web_app, self.serverapp.base_url, Warmcell(parent=self), alone=True)
        self.handlers.extend([*ports.routes(), *jupyter_api.routes()])
        nouns = r"/(?:(?:sandboxes|snapshots)(?:/.*)?|gpus|check|events|openapi\.json)"
        self.handlers.append((url_path_join(PREFIX, nouns), ForwardHandler))

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        """The server listens (Jupyter's hook)."""
        if self.announce:
            url = serverapp.connection_url.rstrip("/")
            print(json.dumps({"url": url, "token": serverapp.identity_provider.token}), flush=True)  # noqa: T201
        if self.idle_s:
            self._watch = asyncio.create_task(self._end_when_idle(serverapp))

    async def stop_extension(self) -> None:
        """The server ends (Jupyter's hook)."""
        watch = getattr(self, "_watch", None)
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.link.close(), CLOSE_TIMEOUT_S)

    async def _end_when_idle(self, serverapp: ServerApp) -> None:
        clients = Clients(serverapp.http_server)
        try:
            while True:
                await clients.none_for(self.idle_s)
                if not await self._wait_for_sandboxes(clients):
                    self.log.info("Warmcell: nobody has needed this server for %g s", self.idle_s)
                    serverapp.stop()
                    return
        except Exception:
            self.log.exception("Warmcell: this server does not end by itself any more")

    async def _wait_for_sandboxes(self, clients: "Clients") -> bool:
        """Wait until no agent's sandbox runs, or somebody comes; whether there was anything to wait for."""
        if not await asyncio.to_thread(is_listening, Paths.default()):
            return False
        waited = False
        watching = asyncio.create_task(_none_runs(self.link))
        coming = asyncio.create_task(clients.changed.wait())
        try:
            await asyncio.wait({watching, coming}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                waited = watching.result()
            return waited or coming.done()
        finally:
            for task in (watching, coming):
                task.cancel()
            await asyncio.gather(watching, coming, return_exceptions=True)


class Clients:
    """Whoever has a connection to a server."""

    def __init__(self, server: HTTPServer) -> None:
        """From now on `server` tells of each connection."""
        self.changed = asyncio.Event()
        self._count = 0
        self._take, self._lose = server.handle_stream, server.on_close
        hooks: Any = server
        hooks.handle_stream, hooks.on_close = self._taken, self._lost

    async def none_for(self, seconds: float) -> None:
        """Return when there has been nobody for so long."""
        while True:
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._count else seconds):
                    await self.changed.wait()
            if not self._count and not self.changed.is_set():
                return

    def _taken(self, *arguments: Any) -> None:
        self._count += 1
        self.changed.set()
        self._take(*arguments)

    def _lost(self, server_conn: object) -> None:
        self._count -= 1
        self.changed.set()
        self._lose(server_conn)


async def _none_runs(link: KeeperLink) -> bool:
    """Return when no agent's sandbox runs, or the keeper is gone; whether any did."""
    running: set[str] = set()
    waited = False
    try:
        async with contextlib.aclosing(link.events()) as events:
            async for name, data in events:
                for info in data["sandboxes"] if name == "hello" else [data] if name == "sandbox" else []:
                    if info["owner"] == AGENT and _runs(info):
                        running.add(info["id"])
                    else:
                        running.discard(info["id"])
                if not running:
                    return waited
                waited = True
    except WarmcellError:  # nothing runs where there is no keeper
        pass
    return waited


def _runs(info: Mapping[str, Any]) -> bool:
    """Whether anything happens in it; not where it is frozen in memory, until somebody comes and uses it."""
    terms = info.get("terms")
    return State(info["state"]) not in QUIET and not (terms is not None and terms["frozen"])


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    """Where Jupyter finds it (its own hook)."""
    return [{"module": "warmcell.extension.server.headless", "app": WarmcellServe}]
