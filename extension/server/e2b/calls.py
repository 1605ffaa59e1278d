"""Procedure calls over Connect: one message and its answer, or streams of them."""

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from warmcell.extension.server.e2b.body import JSON_MAX_BYTES
from warmcell.extension.server.e2b.fields import Fields, read_object
from warmcell.extension.server.e2b.framing import (
    MAX_MESSAGE_BYTES,
    STREAM_TYPE,
    UNARY_TYPE,
    Code,
    ConnectError,
    Envelopes,
    envelope,
    trailer,
)
from warmcell.extension.server.e2b.handler import E2bHandler, Serve
from warmcell.sandbox.errors import InvalidRequestError

TIMEOUT_MAX_MS: Final = 10**10
PING_S: Final = 10.0
"""How often at least a stream says that it is there. Clients may want it more often."""


def unary(answer: Callable[[E2bHandler, Fields], Awaitable[Mapping[str, Any]]]) -> Serve:
    """Serve a call of one message, which is answered by one."""

    async def serve(request: E2bHandler) -> None:
        _check_type(request, UNARY_TYPE)
        message = read_object(await request.body_stream.whole(JSON_MAX_BYTES), max_bytes=JSON_MAX_BYTES)
        request.answer(await answer(request, message))

    return serve


def server_stream(events: Callable[[E2bHandler, Fields], AsyncGenerator[Mapping[str, Any], None]]) -> Serve:
    """Serve a call of one message, which is answered by many; each is sent as it comes."""

    async def serve(request: E2bHandler) -> None:
        _check_type(request, STREAM_TYPE)
        message: Fields | None = None
        async for found in messages(request.body_stream.in_time()):
            if message is not None:
                raise ConnectError(Code.INVALID_ARGUMENT, "The request has several messages")
            message = found
        if message is None:
            raise ConnectError(Code.INVALID_ARGUMENT, "The request has no message")
        request.set_header("Content-Type", STREAM_TYPE)
        async with contextlib.aclosing(events(request, message)) as told:
            async for event in told:
                await request.tell(envelope(event))
        await _end(request)

    return serve


def client_stream(take: Callable[[E2bHandler, AsyncIterator[Fields]], Awaitable[Mapping[str, Any]]]) -> Serve:
    """Serve a call of many messages, which are answered by one."""

    async def serve(request: E2bHandler) -> None:
        _check_type(request, STREAM_TYPE)
        answer = await take(request, messages(request.body_stream.pieces()))
        request.set_header("Content-Type", STREAM_TYPE)
        await request.tell(envelope(answer))
        await _end(request)

    return serve


async def messages(pieces: AsyncIterator[bytes]) -> AsyncIterator[Fields]:
    """A stream's messages, as they come."""
    envelopes = Envelopes()
    async for piece in pieces:
        for message in envelopes.feed(piece):
            yield read_object(message, max_bytes=MAX_MESSAGE_BYTES)
    envelopes.close()


def timeout_s(request: E2bHandler) -> float | None:
    """For how long the client will listen; None: for ever."""
    asked = request.request.headers.get("connect-timeout-ms")
    if asked is None:
        return None
    if not re.fullmatch(r"[0-9]{1,11}", asked) or not 0 < int(asked) <= TIMEOUT_MAX_MS:
        raise InvalidRequestError("connect-timeout-ms must be a number above 0", hint="Leave it out for no limit.")
    return int(asked) / 1000


def ping_s(request: E2bHandler) -> float:
    """After how many seconds of silence the client wants to hear that the stream is there."""
    asked = request.request.headers.get("Keepalive-Ping-Interval", "")
    return min(float(asked), PING_S) if re.fullmatch(r"[1-9][0-9]{0,5}", asked) else PING_S


async def paced(lines: AsyncIterator[dict[str, Any]], every_s: float) -> AsyncGenerator[dict[str, Any], None]:
    """The keeper's lines, and an empty one whenever nothing has come for so many seconds."""
    now = asyncio.get_running_loop().time
    until = now() + every_s
    waiting: asyncio.Task[dict[str, Any] | None] | None = None
    try:
        while True:
            waiting = waiting or asyncio.create_task(_next(lines))
            done, _ = await asyncio.wait({waiting}, timeout=max(0.0, until - now()))
            line: dict[str, Any] = {}
            if done:
                found, waiting = waiting.result(), None
                if found is None:
                    return
                if not found:  # The keeper's own, at its own pace.
                    continue
                line = found
            yield line
            until = now() + every_s
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


async def _next(lines: AsyncIterator[dict[str, Any]]) -> dict[str, Any] | None:
    return await anext(lines, None)


def _check_type(request: E2bHandler, wanted: str) -> None:
    given = request.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if given != wanted:
        raise ConnectError(Code.UNIMPLEMENTED, f"{given or 'No content type'} is not supported here: send {wanted}")
    encoding = request.request.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ConnectError(Code.UNIMPLEMENTED, f"{encoding} is not supported: send messages as they are")


async def _end(request: E2bHandler) -> None:
    request.write(trailer())
    request.finish()
