"""Whom a request of an MCP client is asked for: over stdio one and the same, over HTTP whoever shows a token."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from warmcell.extension.keeper.principals import TOKEN_PREFIX
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.transport import AsyncTransport, Where
from warmcell.sandbox.errors import UnauthenticatedError

KEPT_MAX: Final = 64
"""Connections of so many tokens are kept."""


def token_of(headers: Mapping[str, str] | None) -> str | None:
    """The token that a request shows."""
    kind, _, token = (headers or {}).get("authorization", "").partition(" ")
    return token.strip() or None if kind.lower() == "bearer" else None


class Callers:
    """Connections to a keeper, or to a server by URL."""

    def __init__(self, where: Where, *, each: bool = False) -> None:
        """Nothing is connected yet.

        Args:
            where: Whom to ask, with the token of whoever runs this.
            each: Use the token that each request shows, and none else.
        """
        self._where = where
        self._each = each
        self._kept: OrderedDict[str, AsyncTransport] = OrderedDict()

    async def of(self, headers: Mapping[str, str] | None) -> Calls:
        """What a request is asked with.

        Raises:
            UnauthenticatedError: It shows no token, where each has to.
        """
        token = token_of(headers) if self._each else self._where.token
        if self._each and not (token or "").startswith(TOKEN_PREFIX):
            raise UnauthenticatedError("There is no token", hint="Send `Authorization: Bearer wct_…`.")
        transport = self._kept.pop(token or "", None)
        if transport is None:
            transport = AsyncTransport(Where(self._where.url, token, self._where.paths))
        self._kept[token or ""] = transport
        while len(self._kept) > KEPT_MAX:
            _, oldest = self._kept.popitem(last=False)
            await oldest.close()
        return Calls(transport)

    async def close(self) -> None:
        """Drop all connections."""
        while self._kept:
            _, transport = self._kept.popitem()
            await transport.close()
