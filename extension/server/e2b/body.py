"""The body of a request, taken as it comes and held to a few pieces."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from warmcell.extension.pace import PATIENCE_S, Pace
from warmcell.extension.server.e2b.fields import Fields, read_object
from warmcell.sandbox.errors import InvalidRequestError

JSON_MAX_BYTES: Final = 4 * 2**20
PIECES_AHEAD: Final = 16
"""Pieces that wait to be read; then the sender waits."""

DRAIN_S: Final = 5.0
"""How long a request that is refused may still send."""


class Body:
    """What a client sends; the other end of `data_received`."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        """Nothing has come; `patience_s` is how long nothing may come of what is wanted as a whole."""
        self._pace = Pace(patience_s)
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(PIECES_AHEAD)
        self._unwanted = asyncio.Event()
        self._ended = asyncio.Event()

    async def put(self, piece: bytes | None) -> None:
        """A piece has come, or the end; waits until there is room for it, or until nobody wants any more."""
        if piece is None:
            self._ended.set()
        if self._unwanted.is_set():
            return
        put = asyncio.ensure_future(self._pieces.put(piece))
        given_up = asyncio.ensure_future(self._unwanted.wait())
        await asyncio.wait({put, given_up}, return_when=asyncio.FIRST_COMPLETED)
        put.cancel()
        given_up.cancel()

    def drop(self) -> None:
        """Nobody reads it any more: what still comes is thrown away."""
        self._unwanted.set()

    async def drain(self) -> None:
        """Throw away what still comes. Who sends hears the answer then; one who never ends does not get it."""
        self.drop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self._ended.wait()

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it, piece by piece, once, however slowly it comes."""
        while (piece := await self._pieces.get()) is not None:
            yield piece

    async def in_time(self) -> AsyncIterator[bytes]:
        """The same of a sender who is to send all that there is.

        Raises:
            OperationTimeoutError: It stalls.
        """
        while (piece := await self._next()) is not None:
            yield piece

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._pace.wait()):
                piece = await self._pieces.get()
        except TimeoutError:
            self._ended.set()  # for all that it matters
            raise self._pace.stalled() from None
        self._pace.came(len(piece or b""))
        return piece

    async def whole(self, max_bytes: int = JSON_MAX_BYTES) -> bytes:
        """All of it.

        Raises:
            InvalidRequestError: It is larger than that.
            OperationTimeoutError: It does not come.
        """
        data = bytearray()
        async for piece in self.in_time():
            data += piece
            if len(data) > max_bytes:
                raise InvalidRequestError("The request is too large", hint=f"At most {max_bytes} bytes.")
        return bytes(data)

    async def fields(self) -> Fields:
        """Its JSON object; raises as `read_object`."""
        return read_object(await self.whole(), max_bytes=JSON_MAX_BYTES)
