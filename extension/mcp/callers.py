"""Whom a request of an MCP client is asked for: over stdio one and the same, over HTTP whoever shows a token."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import httpx

from warmcell.extension.keeper.principals import TOKEN_PREFIX
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.transport import AsyncTransport, Stream, Where
from warmcell.sandbox.errors import UnauthenticatedError

Done = TypeVar("Done")


def token_of(headers: Mapping[str, str] | None) -> str | None:
    """The token that a request shows."""
    kind, _, token = (headers or {}).get("authorization", "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


class Callers:
    """One connection to a keeper, or to a server by URL, for all who ask."""

    def __init__(self, where: Where, *, each: bool = False) -> None:
        """Nothing is connected yet.

        Args:
            where: Whom to ask, with the token of whoever runs this.
            each: Use the token that each request shows, and none else.
        """
        self._token = where.token
        self._each = each
        self._transport = AsyncTransport(Where(where.url, None, where.paths))

    async def of(self, headers: Mapping[str, str] | None) -> Calls:
        """What a request is asked with.

        Raises:
            UnauthenticatedError: It shows no token, where each has to.
        """
        token = token_of(headers) if self._each else self._token
        if self._each and not (token or "").startswith(TOKEN_PREFIX):
            raise UnauthenticatedError("There is no token", hint="Send `Authorization: Bearer wct_…`.")
        return Calls(self._transport if token is None else _Showing(self._transport, token))

    async def close(self) -> None:
        """Drop all connections."""
        await self._transport.close()


class _Showing:
    """A transport with which one caller's token is shown. The connections are everybody's."""

    def __init__(self, transport: AsyncTransport, token: str) -> None:
        self._transport = transport
        self.where = transport.where
        self._shown = {"Authorization": f"Bearer {token}"}

    async def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        return await self._transport.request(method, path, **self._with_token(how))

    def stream(self, method: str, path: str, **how: Any) -> contextlib.AbstractAsyncContextManager[Stream]:
        return self._transport.stream(method, path, **self._with_token(how))

    async def ensure(self) -> None:
        await self._transport.ensure()

    async def sleep(self, seconds: float) -> None:
        await self._transport.sleep(seconds)

    async def off_loop(self, work: Callable[[], Done]) -> Done:
        return await self._transport.off_loop(work)

    async def close(self) -> None:
        """They stay, for the others."""

    def _with_token(self, how: Mapping[str, Any]) -> dict[str, Any]:
        return {**how, "headers": {**(how.get("headers") or {}), **self._shown}}
