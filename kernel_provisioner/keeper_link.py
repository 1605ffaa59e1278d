"""A provisioner's connection to the keeper, from whatever event loop asks.

jupyter_client runs the calls of a synchronous KernelManager in loops that change, and a connection belongs to one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths


class KeeperLink:
    """Asks the keeper; one that was replaced meanwhile is found again."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, KeeperClient] = WeakKeyDictionary()

    async def ask(
        self,
        request: Callable[[KeeperClient], Awaitable[Any]],
        *,
        start: bool = False,
        patience_s: float | None = None,
    ) -> Any:
        """The answer to one request, sent again if the connection that it went out on was a dead one.

        Args:
            request: Sends it.
            start: Start a keeper if there is none.
            patience_s: How long to wait for one that comes up, as `KeeperClient.connect`.

        Raises:
            TransportError: There is no keeper, or it went away.
            WarmcellError: What the keeper answers.
        """
        known = self._clients.get(asyncio.get_running_loop())
        if known is not None:
            try:
                return await request(known)
            except TransportError:
                await self.close()
        return await request(await self._connect(start=start, patience_s=patience_s))

    async def close(self) -> None:
        """Let go of the connection of this loop. Idempotent."""
        known = self._clients.pop(asyncio.get_running_loop(), None)
        if known is not None:
            await known.close()

    async def _connect(self, *, start: bool, patience_s: float | None) -> KeeperClient:
        loop = asyncio.get_running_loop()
        client = await KeeperClient.connect(paths=self.paths, start=start, patience_s=patience_s)
        if loop in self._clients:  # Another call of this loop was faster.
            await client.close()
        else:
            self._clients[loop] = client
        return self._clients[loop]
