"""A process in a sandbox whose streams are the host's."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Literal

from warmcell.sandbox.errors import ProtocolError
from warmcell.sandbox.guest_wire import RESTART, gone, read_object, whole_number
from warmcell.sandbox.models import MIB

STDIN, STDOUT, STDERR, CONTROL = range(4)
"""Channels of frames."""

FRAME_MAX_BYTES = 1 * MIB


class GuestProcess:
    """A process in a sandbox whose streams are ours; leaving its context kills it if it still runs."""

    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.exit_code: int | None = None
        """Known once `output` has ended."""
        self._reader = reader
        self._writer = writer

    async def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        """What it writes, as it comes; ends when the process has.

        Raises:
            TransportError: The sandbox is gone.
        """
        while True:
            channel, content = await self._frame()
            if channel == CONTROL:
                self.exit_code = whole_number(read_object(content), "exit_code")
                return
            if channel not in (STDOUT, STDERR):
                raise ProtocolError(f"The guest sent a frame on channel {channel}", hint=RESTART)
            yield ("stdout" if channel == STDOUT else "stderr"), content

    async def write(self, data: bytes) -> None:
        """Give it input, at the pace at which it reads. Ignored when it has ended."""
        for start in range(0, len(data), FRAME_MAX_BYTES):
            await self._send(STDIN, data[start : start + FRAME_MAX_BYTES])

    async def close_stdin(self) -> None:
        """End its input."""
        await self._send(STDIN, b"")

    async def resize(self, rows: int, columns: int) -> None:
        """Tell it the size of its terminal, in characters."""
        await self._send(CONTROL, json.dumps({"resize": [rows, columns]}).encode())

    async def send_signal(self, signum: int) -> None:
        """Signal it and its process group. Ignored when it has ended."""
        await self._send(CONTROL, json.dumps({"signal": signum}).encode())

    async def _send(self, channel: int, content: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self._writer.write(bytes((channel,)) + len(content).to_bytes(4, "big") + content)
            await self._writer.drain()

    async def _frame(self) -> tuple[int, bytes]:
        try:
            head = await self._reader.readexactly(5)
            size = int.from_bytes(head[1:], "big")
            if size > FRAME_MAX_BYTES:
                raise ProtocolError(f"The guest sent a frame of {size} bytes", hint=RESTART)
            return head[0], await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise gone() from error

    async def feed(self, data: bytes) -> None:
        """Give it all of its input and end that."""
        if data:
            await self.write(data)
        await self.close_stdin()
