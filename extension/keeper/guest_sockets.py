"""`api.sock` in the run directory of each notebook's sandbox: the keeper's API, narrowed to that sandbox."""

import asyncio
import os
from collections.abc import Callable

from tornado import web

from warmcell.extension.keeper.http import UnixServer
from warmcell.extension.keeper.scope import GuestScope
from warmcell.sandbox.lifecycle import TERMINAL
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo

NAME = "api.sock"


class GuestSockets:
    """Opens one per sandbox and closes it when the sandbox ends."""

    def __init__(self, application: Callable[[GuestScope], web.Application]) -> None:
        self._application = application
        self._servers: dict[SandboxId, UnixServer] = {}

    def open(self, box: LiveSandbox) -> None:
        """Listen for the code in this sandbox. Idempotent."""
        if box.info.id in self._servers:
            return
        path = box.run_directory / NAME
        server = UnixServer(self._application(GuestScope(box.info.id, box.spec)), path)
        server.listen_unix(owner=os.stat(box.run_directory).st_uid)
        self._servers[box.info.id] = server

    async def on_change(self, info: SandboxInfo) -> None:
        """Close the socket of a sandbox that has ended."""
        if info.state in TERMINAL and (server := self._servers.pop(info.id, None)) is not None:
            await server.close()

    async def close(self) -> None:
        """Close all."""
        servers = list(self._servers.values())
        self._servers.clear()
        await asyncio.gather(*(server.close() for server in servers))
