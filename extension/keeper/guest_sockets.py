"""`api.sock` in the run directory of each notebook's sandbox, and of its ranks': the keeper's API, narrowed to that."""

import asyncio
import os
from collections.abc import Callable

from tornado import web

from warmcell.extension.keeper.http import UnixServer
from warmcell.extension.keeper.scope import GuestScope
from warmcell.sandbox.errors import ProtocolError
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo

NAME = "api.sock"
RANKS = "remote"
"""Whose the sandboxes of remote cells are."""

MAX_CONNECTIONS = 64
"""Of one sandbox. Each costs the keeper a descriptor, and a guest may open as many as it likes."""


class GuestSockets:
    """Opens one per sandbox and closes it when the sandbox ends. Their files go with the run directories."""

    def __init__(self, application: Callable[[GuestScope], web.Application]) -> None:
        self._application = application
        self._open: dict[SandboxId, tuple[web.Application, UnixServer]] = {}

    def open(self, box: LiveSandbox) -> None:
        """Listen for the code in this sandbox, within what it was given last.

        Raises:
            ProtocolError: The guest has put something in the way.
        """
        if box.info.terms is not None:  # Code that nobody has read asks for nothing.
            return
        self._listen(box)

    def open_for_ranks(self, box: LiveSandbox, parent: SandboxInfo | None) -> None:
        """Listen for the ranks of a remote cell, unless that is within another remote cell; raises as `open`.

        Args:
            box: The ranks' sandbox.
            parent: What it was made from, if that is a sandbox.
        """
        if box.info.owner == RANKS and (parent is None or parent.owner != RANKS):
            self._listen(box)

    def _listen(self, box: LiveSandbox) -> None:
        scope = GuestScope(box.info.id, box.spec)
        path = box.run_directory / NAME
        known = self._open.get(box.info.id)
        if known is not None and known[1].path == path:
            known[0].settings["scope"] = scope
            return
        if known is not None:  # it was suspended since, and has another run directory
            known[1].stop()
        application = self._application(scope)
        server = UnixServer(application, path, max_connections=MAX_CONNECTIONS)
        try:
            server.listen_unix(owner=os.stat(box.run_directory).st_uid)
        except OSError as error:
            raise ProtocolError(
                f"{NAME} cannot be made in the run directory: {error.strerror}", hint="Restart the sandbox."
            ) from error
        self._open[box.info.id] = (application, server)

    async def open_again(self, box: LiveSandbox) -> None:
        """The sandbox has a run directory of its own again, so it listens there; raises as `open`."""
        await self.forget(box.info.id)
        self.open(box)

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Close the socket of a sandbox that has ended. Idempotent."""
        known = self._open.pop(sandbox_id, None)
        if known is not None:
            await known[1].close()

    async def close(self) -> None:
        """Close all."""
        await asyncio.gather(*(self.forget(sandbox_id) for sandbox_id in list(self._open)))
