"""A Jupyter process's connection to the keeper, from whatever event loop asks.

jupyter_client runs the calls of a synchronous KernelManager in loops that change, and a connection belongs to one.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths


class KeeperLink:
    """Asks the keeper; one that was replaced meanwhile is found again. Links of one loop share their connections."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self._mine: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()

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
        shared = self._joined(_shared().get(self.paths))
        if shared is not None:
            try:
                return await request(shared.client)
            except TransportError:
                await self.drop(shared.client)
        return await request((await self._connect(start=start, patience_s=patience_s)).client)

    async def client(self, *, start: bool = False, patience_s: float | None = None) -> KeeperClient:
        """The connection of this loop, made if there is none; whoever finds that it is dead says so to `drop`.

        Raises:
            TransportError: There is no keeper.
        """
        shared = self._joined(_shared().get(self.paths))
        return (shared or await self._connect(start=start, patience_s=patience_s)).client

    async def drop(self, client: KeeperClient) -> None:
        """That connection is a dead one. One that was made anew meanwhile stays."""
        mine = self._mine.get(asyncio.get_running_loop())
        if mine is not None and mine.client is client:
            if _shared().get(self.paths) is mine:  # It is no good for the others either.
                del _shared()[self.paths]
            await self.close()

    async def close(self) -> None:
        """Let go of the connection of this loop; the last one that has it drops it. Idempotent."""
        mine = self._mine.pop(asyncio.get_running_loop(), None)
        if mine is not None:
            mine.links.discard(self)
            if not mine.links:
                if _shared().get(self.paths) is mine:
                    del _shared()[self.paths]
                await mine.client.close()

    async def _connect(self, *, start: bool, patience_s: float | None) -> "_Shared":
        client = await KeeperClient.connect(paths=self.paths, start=start, patience_s=patience_s)
        found = self._joined(_shared().get(self.paths))
        if found is not None:  # Another call of this loop was faster.
            await client.close()
            return found
        made = _shared()[self.paths] = _Shared(client)
        self._joined(made)
        return made

    def _joined(self, other: "_Shared | None") -> "_Shared | None":
        """The connection that this link has in this loop; that of another link if it has none."""
        loop = asyncio.get_running_loop()
        mine = self._mine.get(loop)
        if mine is None and other is not None:
            mine = self._mine[loop] = other
            mine.links.add(self)
        return mine


class _Shared:
    """What links of one loop have in common, for as long as one of them is there."""

    def __init__(self, client: KeeperClient) -> None:
        self.client = client
        self.links: WeakSet[KeeperLink] = WeakSet()


_all: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[Paths, _Shared]] = WeakKeyDictionary()


def _shared() -> WeakValueDictionary[Paths, _Shared]:
    """Those of this loop."""
    return _all.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
