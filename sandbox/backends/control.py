"""JSON lines, and descriptors with them, from who starts a sandbox for us."""

import asyncio
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from warmcell.sandbox.errors import OperationTimeoutError, SandboxStartError

READ_BYTES = 65536
LINE_MAX_BYTES = 1 << 20
FDS_MAX = 8


class Control:
    """One end of a socket that somebody speaks on. Not blocking."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._buffer = b""
        self._fds: list[int] = []

    def take_fds(self) -> list[int]:
        """The descriptors that have come so far; the caller closes them."""
        fds, self._fds = self._fds, []
        return fds

    def take_fd(self) -> int:
        """The first of them, where others may have come with what was said after."""
        return self._fds.pop(0)

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        """Send a few bytes with descriptors, which stay the caller's.

        Raises:
            OSError: Nobody takes them.
        """
        if socket.send_fds(self._control, [data], fds) != len(data):
            raise BlockingIOError

    def close(self) -> None:
        """Close it, and descriptors that nobody took. Idempotent."""
        self._control.close()
        for fd in self.take_fds():
            os.close(fd)

    async def line(self, timeout_s: float | None) -> dict[str, Any] | None:
        """The next JSON line, None at the end of what is said.

        Raises:
            OperationTimeoutError: It said nothing for too long.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while b"\n" not in self._buffer:
                    if len(self._buffer) > LINE_MAX_BYTES or not await self._receive():
                        return None
        except TimeoutError:
            raise OperationTimeoutError(
                f"A sandbox did not start within {timeout_s:.0f} s",
                hint="The machine may be overloaded; try again.",
                details={"operation": "create", "timeout": timeout_s},
            ) from None
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise SandboxStartError(f"The sandbox said {line[:200]!r} while it started", hint="Try again.")
        return said

    async def _receive(self) -> bool:
        """Read what has come, descriptors included; False at the end."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._control, READ_BYTES, FDS_MAX)
            except BlockingIOError:
                readable = loop.create_future()
                loop.add_reader(self._control, _wake, readable)
                try:
                    await readable
                finally:
                    loop.remove_reader(self._control)
                continue
            except ConnectionError:
                return False
            self._fds += fds
            self._buffer += data
            return bool(data)


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
