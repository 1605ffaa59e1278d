"""A server's connection to the keeper: made when first needed, made again when the keeper was replaced."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import TransportError


class KeeperLink:
    """Forwards requests. A keeper that is gone is started again once per request, then the error stands."""

    def __init__(self) -> None:
        self._client: KeeperClient | None = None
        self._connecting = asyncio.Lock()

    async def get(self, path: str) -> Any:
        """GET from the keeper."""
        return await self._ask("get", path)

    async def post(self, path: str, body: Any) -> Any:
        """POST to the keeper. Only for verbs that change nothing: it may be sent twice."""
        return await self._ask("post", path, body)

    async def delete(self, path: str) -> Any:
        """DELETE at the keeper."""
        return await self._ask("delete", path)

    async def events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """The keeper's events until it ends."""
        client = await self._connected()
        async for event in client.events():
            yield event

    async def kernels(self) -> list[dict[str, Any]]:
        """Kernels of a keeper that runs already; none where no keeper runs."""
        try:
            client = await KeeperClient.connect(start=False)
        except TransportError:
            return []
        async with client:
            found: list[dict[str, Any]] = (await client.get("/kernels"))["kernels"]
            return found

    async def close(self) -> None:
        """Let go of the keeper, which ends if nobody else needs it."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _ask(self, verb: str, path: str, *body: Any) -> Any:
        client = await self._connected()
        try:
            return await getattr(client, verb)(path, *body)
        except TransportError:
            await self.close()
            client = await self._connected()
            return await getattr(client, verb)(path, *body)

    async def _connected(self) -> KeeperClient:
        async with self._connecting:
            if self._client is None:
                self._client = await KeeperClient.connect()
            return self._client
