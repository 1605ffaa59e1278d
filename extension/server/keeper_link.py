"""A server's connection to the keeper: made when first needed, made again when the keeper was replaced.

It is the one that the server's kernels use, so a kernel that is started while a page is open finds it there.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx

from warmcell.kernel_provisioner import keeper_link
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.client.start import has_kernels
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths

LOOK_TIMEOUT_S = 30.0
"""A server does not wait longer for a keeper that hangs before it begins to serve."""

PREDECESSOR_PATIENCE_S = 120.0
"""Nor for one that comes up when the one before has saved its kernels."""

PATIENCE_S = 15.0
"""A page rather hears that the keeper is not there yet than that it waits."""


class KeeperLink:
    """Forwards requests. A keeper that is gone is started again once per request, then the error stands."""

    def __init__(self) -> None:
        self._link = keeper_link.KeeperLink(Paths.default())

    async def get(self, path: str, **how: Any) -> Any:
        """GET from the keeper; with `timeout` in seconds, if another than the usual one."""
        return await self._ask("get", path, **how)

    async def post(self, path: str, body: Any) -> Any:
        """POST to the keeper. Only for verbs that change nothing: it may be sent twice."""
        return await self._ask("post", path, body)

    async def delete(self, path: str) -> Any:
        """DELETE at the keeper."""
        return await self._ask("delete", path)

    async def do(self, verb: str, path: str, *body: Any, timeout: float | None = None) -> Any:
        """A verb that changes something: sent once, after the keeper was seen to be there."""
        await self._ask("get", "/status")
        return await getattr(await self._connected(), verb)(path, *body, timeout=timeout)

    async def download(self, path: str) -> AsyncGenerator[bytes, None]:
        """GET what is not JSON, piece by piece."""
        await self._ask("get", "/status")
        client = await self._connected()
        async with contextlib.aclosing(client.download(path)) as pieces:
            async for piece in pieces:
                yield piece

    async def upload(self, path: str, pieces: AsyncIterator[bytes]) -> Any:
        """POST what is not JSON, once."""
        await self._ask("get", "/status")
        return await (await self._connected()).upload(path, pieces)

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **how: Any) -> AsyncGenerator[httpx.Response, None]:
        """One request of any kind, sent once; see `KeeperClient.stream`."""
        await self._ask("get", "/status")
        async with (await self._connected()).stream(method, path, **how) as response:
            yield response

    async def events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """The keeper's events until it ends.

        Raises:
            TransportError: It has gone; the next call finds or starts another.
        """
        client = await self._connected()
        try:
            async with contextlib.aclosing(client.events()) as events:
                async for event in events:
                    yield event
        except TransportError:
            await self._link.drop(client)
            raise

    async def kernels(self) -> dict[str, list[dict[str, Any]]]:
        """`GET /kernels`: those that run or are suspended, and those that are lost.

        A keeper is started if one that went has left some; none are there where none runs and none has left any.
        """
        paths = Paths.default()
        start = await asyncio.to_thread(has_kernels, paths)
        try:
            client = await KeeperClient.connect(paths=paths, start=start, patience_s=PREDECESSOR_PATIENCE_S)
        except TransportError:
            if start:
                raise
            return {"kernels": [], "lost": []}
        async with client:
            found: dict[str, list[dict[str, Any]]] = await client.get("/kernels", timeout=LOOK_TIMEOUT_S)
            return found

    async def close(self) -> None:
        """Let go of the keeper, which ends if nobody else needs it."""
        await self._link.close()

    async def _ask(self, verb: str, path: str, *body: Any, **how: Any) -> Any:
        return await self._link.ask(lambda it: getattr(it, verb)(path, *body, **how), start=True, patience_s=PATIENCE_S)

    async def _connected(self) -> KeeperClient:
        return await self._link.client(start=True, patience_s=PATIENCE_S)
