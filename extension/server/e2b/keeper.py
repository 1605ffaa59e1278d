"""The keeper's REST for whoever asks over E2B's wire: the only way to sandboxes that this package has."""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx

from warmcell.extension.keeper.gate import TOKEN_HEADER
from warmcell.extension.server.e2b.keys import Holder
from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.sandbox.errors import ForbiddenError, ProtocolError, from_json

START_TIMEOUT_S = 600.0
"""A sandbox may wait for a GPU, a snapshot for a disk."""

LINE_TIMEOUT_S = 60.0
"""The keeper says something every ten seconds on a stream, if only that nothing is new."""


class Keeper:
    """Requests on behalf of one caller."""

    def __init__(self, link: KeeperLink, headers: Mapping[str, str]) -> None:
        """`headers` say who asks; none: the user."""
        self._link = link
        self._headers = dict(headers)

    @classmethod
    def of(cls, link: KeeperLink, holder: Holder) -> "Keeper":
        """For one who has a sandbox's token."""
        return cls(link, holder.headers())

    @property
    def token_id(self) -> str:
        """Of the principal's token with which the sandbox was opened; empty: it was the user's."""
        return self._headers.get(TOKEN_HEADER, "")

    async def may_run(self) -> bool:
        """Whether the caller may run code: a principal's token may be one that only looks; the user may do all."""
        return not self._headers or "run" in (await self.ask("GET", "/principals/self"))["scopes"]

    async def check_run(self) -> None:
        """Raises ForbiddenError unless the caller may run code."""
        if not await self.may_run():
            raise ForbiddenError("This token may not run code", hint="Use one that was made with `--scope run`.")

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        key: str | None = None,
        timeout: float = START_TIMEOUT_S,
    ) -> Any:
        """The JSON answer to one request, sent once; `key` is an idempotency key, `timeout` in seconds.

        Raises:
            WarmcellError: What the keeper answers, or that it cannot be reached.
        """
        headers = self._headers if key is None else {**self._headers, "Idempotency-Key": key}
        how: dict[str, Any] = {"headers": headers, "params": params, "content": content, "timeout": timeout}
        async with self._link.stream(method, path, json=body, **how) as response:
            data = await response.aread()
        return json.loads(data) if data else None

    @contextlib.asynccontextmanager
    async def bytes(self, path: str, params: Mapping[str, str]) -> AsyncGenerator[httpx.Response, None]:
        """GET what is not JSON."""
        async with self._link.stream("GET", path, headers=self._headers, params=params) as response:
            yield response

    @contextlib.asynccontextmanager
    async def lines(
        self, method: str, path: str, body: Any = None, *, params: Mapping[str, str] | None = None
    ) -> AsyncGenerator[AsyncIterator[dict[str, Any]], None]:
        """An answer of JSON line by line, each as it comes; raises as `ask`."""
        how: dict[str, Any] = {"headers": self._headers, "params": params, "json": body, "timeout": LINE_TIMEOUT_S}
        async with self._link.stream(method, path, **how) as response:
            yield _read(response)


async def _read(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        try:
            said = json.loads(line)
        except ValueError as error:
            raise ProtocolError(
                "The keeper answered something that is not JSON", hint="`warmcell clean` ends it; it starts on demand."
            ) from error
        if "refused" in said:
            raise from_json(said["refused"])
        yield said
