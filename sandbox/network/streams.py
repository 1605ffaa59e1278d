"""Byte streams of the proxy: plain ones, TLS over another one, and what goes out, counted."""

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from warmcell.sandbox.network.connecting import Refused

CHUNK_BYTES: Final = 64 * 1024


class Stream(Protocol):
    """Two directions that end one by one."""

    async def read(self) -> bytes:
        """What has come; empty at the end. Raises ConnectionError."""

    async def write(self, data: bytes) -> None:
        """Returns when there is room for more. Raises ConnectionError."""

    async def end(self) -> None:
        """Nothing more will be written. Raises ConnectionError."""


@dataclass(slots=True)
class Tally:
    """What went through one sandbox's proxy since it is there."""

    sent_bytes: int = 0
    """To the outside."""
    received_bytes: int = 0
    allowed: int = 0
    """Requests."""
    refused: int = 0

    @property
    def bytes(self) -> int:
        """Of both directions."""
        return self.sent_bytes + self.received_bytes


class Plain:
    """As asyncio has it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self) -> bytes:
        return await self._reader.read(CHUNK_BYTES)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def end(self) -> None:
        if self._writer.can_write_eof():
            with contextlib.suppress(OSError):  # Its other side has gone altogether.
                self._writer.write_eof()
        else:
            self._writer.close()


class Counted:
    """A stream to the outside, each byte of which counts for a sandbox."""

    def __init__(self, below: Stream, tally: Tally, max_bytes: Callable[[], int | None]) -> None:
        self._below, self._tally, self._max_bytes = below, tally, max_bytes

    async def read(self) -> bytes:
        data = await self._below.read()
        self._tally.received_bytes += len(data)
        self._check()
        return data

    async def write(self, data: bytes) -> None:
        self._tally.sent_bytes += len(data)
        self._check()
        await self._below.write(data)

    async def end(self) -> None:
        await self._below.end()

    def _check(self) -> None:
        most = self._max_bytes()
        if most is not None and self._tally.bytes > most:
            raise Refused(403, "the sandbox has used up its bytes")


class Tls:
    """The server's side of TLS over a stream whose first bytes were read already."""

    def __init__(self, below: Stream, context: ssl.SSLContext, first: bytes) -> None:
        self._below = below
        self._coming, self._going = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._coming.write(first)
        self._tls = context.wrap_bio(self._coming, self._going, server_side=True)

    async def handshake(self) -> None:
        """Raises ConnectionError where it fails."""
        await self._do(self._tls.do_handshake)

    async def read(self) -> bytes:
        data: bytes = await self._do(self._tls.read, CHUNK_BYTES)
        return data

    async def write(self, data: bytes) -> None:
        while data:
            data = data[await self._do(self._tls.write, data) :]

    async def end(self) -> None:
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        await self._flush()
        await self._below.end()

    async def _do(self, what: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            try:
                result = what(*arguments)
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._below.read()
                if data:
                    self._coming.write(data)
                else:
                    self._coming.write_eof()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                if what == self._tls.read:
                    return b""
                raise ConnectionError("the other side has gone") from None
            except ssl.SSLError as error:
                await self._flush()
                raise ConnectionError(f"TLS: {error.reason}") from None
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if self._going.pending:
            await self._below.write(self._going.read())


async def join(inner: Stream, outer: Stream, first: bytes, *, idle_s: float) -> None:
    """Let each have what comes from the other, until both have ended.

    Args:
        inner: Of the sandbox.
        outer: Of the outside.
        first: What has come from the sandbox already.
        idle_s: Seconds in which nothing moves after which it is over.

    Raises:
        ConnectionError: One of them broke.
        TimeoutError: Nothing moved.
    """
    loop = asyncio.get_running_loop()

    async def pass_on(source: Stream, target: Stream, data: bytes) -> None:
        while data or (data := await source.read()):
            idle.reschedule(loop.time() + idle_s)
            await target.write(data)
            data = b""
        await target.end()

    async with asyncio.timeout(idle_s) as idle:
        await both(pass_on(inner, outer, first), pass_on(outer, inner, b""))


async def both(*works: Any) -> None:
    """Wait for all of them; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
