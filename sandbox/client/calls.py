"""Requests to the API, sent again where a connection breaks, such that nothing is ever done twice."""

import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import httpx

from warmcell.sandbox.client import _api
from warmcell.sandbox.client.transport import Content, Transport
from warmcell.sandbox.errors import ProtocolError, TransportError, WarmcellError, from_json

ATTEMPTS = 5
FIRST_PAUSE_S = 0.1
STREAM_TIMEOUT_S = 60.0
"""A stream says something every ten seconds, if only that nothing is new."""

Entry = Callable[[Mapping[str, Any]], Awaitable[None]]
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class Calls:
    """What all verbs are built of."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.who = transport.where.who
        self._ensured = False

    async def call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Any = None,
        content: Content | None = None,
        key: str = "",
        timeout_s: float | None = _api.READ_TIMEOUT_S,
    ) -> Any:
        """One request and the JSON of its answer.

        Args:
            method: All but POST may be sent twice.
            path: Below `/warmcell/api/v1`.
            json: Body, as JSON.
            params: Of the query.
            content: Body, raw.
            key: With it a POST may be sent twice too: it is done once.
            timeout_s: For the answer.

        Raises:
            WarmcellError: What the other side answers, or `TransportError` where nobody does.
        """
        how = {"json": json, "params": params, "content": content, "timeout": _api.timeout(timeout_s)}
        headers = {"Idempotency-Key": key} if key else {}
        again = _Again(self.transport, twice=method != "POST" or bool(key))
        while True:
            try:
                await self._ready()
                response = await self.transport.request(method, path, headers=headers, **how)
            except httpx.ReadTimeout as error:
                raise _api.too_slow(method, path, timeout_s, self.who) from error
            except httpx.TransportError as error:
                await again.after(error)
                continue
            except httpx.RequestError as error:  # What came cannot be understood; it would come again.
                raise _api.unreachable(error, self.who) from error
            return _api.read(response, self.who)

    async def follow(self, path: str, body: Mapping[str, Any] | None, item: str, entry: Entry) -> Any:
        """Have something done and follow what it says to its end, across broken connections.

        Args:
            path: Of what such things are made below.
            body: Of the request that makes it, with an id of our own. None: it is there already.
            item: Its id.
            entry: Called with each entry, in order, each once.

        Returns:
            How it ended.

        Raises:
            WarmcellError: As `call`.
        """
        async with contextlib.aclosing(self.entries(path, body, item)) as said:
            async for one in said:
                if "ended" in one:
                    return one["ended"]
                await entry(one)
        raise AssertionError("what is followed has an end")

    async def entries(self, path: str, body: Mapping[str, Any] | None, item: str) -> AsyncGenerator[Mapping[str, Any]]:
        """As `follow`: each entry, in order, each once, and how it ended as the last."""
        again, start = _Again(self.transport, twice=True), 0
        while True:
            try:
                await self._ready()
                if body is not None:
                    how: dict[str, Any] = {"json": body, "params": {"follow": "1", "from": str(start)}}
                    opened = self.transport.stream("POST", path, timeout=_api.timeout(STREAM_TIMEOUT_S), **how)
                else:
                    where = f"{path}/{item}/output"
                    opened = self.transport.stream(
                        "GET", where, params={"from": str(start)}, timeout=_api.timeout(STREAM_TIMEOUT_S)
                    )
                async with opened as stream:
                    if stream.status >= 300:
                        raise _api.failure(stream.status, await stream.read(), self.who)
                    async for line in stream.lines():
                        said = self._entry(line)
                        if "ended" in said:
                            yield said
                            return
                        if "refused" in said:
                            raise from_json(said["refused"])
                        body = None  # It has begun.
                        if said.get("n", start) < start:
                            continue  # What was told already is no progress: else this could go on for ever.
                        if "n" in said:
                            start = said["n"] + 1
                            again.well()
                        if "n" in said or "lost" in said:
                            yield said
                raise httpx.RemoteProtocolError("the answer has no end")
            except httpx.TransportError as error:
                await again.after(error)
            except httpx.RequestError as error:
                raise _api.unreachable(error, self.who) from error

    async def download(self, path: str, params: Mapping[str, str]) -> AsyncGenerator[bytes]:
        """GET what is not JSON, piece by piece; raises as `call`. One that breaks in the middle is not begun anew."""
        again = _Again(self.transport, twice=True)
        while True:
            begun = False
            try:
                await self._ready()
                how: dict[str, Any] = {"params": params, "timeout": _api.TIMEOUT}
                async with self.transport.stream("GET", path, **how) as stream:
                    if stream.status >= 300:
                        raise _api.failure(stream.status, await stream.read(), self.who)
                    async for piece in stream.pieces():
                        begun = True
                        yield piece
                return
            except httpx.TransportError as error:
                if begun:
                    raise _api.unreachable(error, self.who) from error
                await again.after(error)

    def _entry(self, line: str) -> Mapping[str, Any]:
        """A line of a stream; raises ProtocolError where it is none of ours."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self.odd("a line that is no JSON") from error
        if not isinstance(said, dict) or not isinstance(said.get("n", 0), int):
            raise self.odd("a line that is no entry")
        if not all(isinstance(said.get(name, {}), dict) for name in ("ended", "refused", "content", "metadata")):
            raise self.odd("an entry of no form that is known")
        if not isinstance(said.get("ended", {}).get("error") or {}, dict):
            raise self.odd("an end of no form that is known")
        return said

    def odd(self, why: str) -> ProtocolError:
        """The error for an answer that is none."""
        return _api.odd(self.who, why)

    async def _ready(self) -> None:
        if not self._ensured:
            await self.transport.ensure()
            self._ensured = True


class _Again:
    """Whether and when to send a request once more."""

    def __init__(self, transport: Transport, *, twice: bool) -> None:
        self._transport = transport
        self._twice = twice
        self._left = ATTEMPTS
        self._pause_s = FIRST_PAUSE_S

    def well(self) -> None:
        """There was progress."""
        self._left, self._pause_s = ATTEMPTS, FIRST_PAUSE_S

    async def after(self, error: httpx.TransportError) -> None:
        """Wait for the next attempt.

        Raises:
            TransportError: There is none.
        """
        self._left -= 1
        who = self._transport.where.who
        if self._left <= 0 or not (self._twice or isinstance(error, NOT_SENT)):
            raise _api.unreachable(error, who) from error
        await self._transport.sleep(self._pause_s)
        self._pause_s *= 2
        try:
            await self._transport.ensure()
        except TransportError:
            raise
        except WarmcellError as other:
            raise _api.unreachable(error, who) from other
