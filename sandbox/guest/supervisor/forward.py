"""The `forward` operation: bytes to and from a TCP port of the sandbox, which needs no network for it."""

from __future__ import annotations

import _socket
import os

from .endpoint import Endpoint, ignore
from .loop import WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Forward:
    """One connection joined to one TCP connection; each direction ends by itself."""

    def __init__(self, loop: Loop, connection: Endpoint, port: int, answer: Callable[..., None]) -> None:
        """Connect to `port` of the loopback interface and answer once that is done or has failed."""
        self._loop = loop
        self._connection = connection
        self._answer = answer
        self._port = port
        self._early = b""
        self._tcp = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        self._tcp.setblocking(False)
        self._tcp.connect_ex(("127.0.0.1", port))
        connection.on_data = self._hold
        connection.on_end = self._give_up
        loop.watch(self._tcp.fileno(), WRITE, self._on_connected)

    def _hold(self, data: bytes) -> None:
        self._early += data
        self._connection.pause()

    def _give_up(self) -> None:
        self._loop.close(self._tcp.detach())

    def _on_connected(self, events: int) -> None:
        error = self._tcp.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        fd = self._tcp.detach()
        self._loop.forget(fd)
        self._connection.on_end = ignore  # The answer may be what shows that the host has gone.
        if error:
            self._loop.close(fd)
            message = f"port {self._port} of the sandbox: {os.strerror(error)}"
            self._answer(ok=False, code="not_found", message=message, hint="Start what is to listen there first.")
            return
        self._answer(ok=True, stream=True)
        if self._connection.closed:
            self._loop.close(fd)
            return
        there = Endpoint(self._loop, fd)
        join(self._connection, there)
        join(there, self._connection)
        if self._early:
            there.write(self._early)


def join(source: Endpoint, target: Endpoint) -> None:
    """Let what comes from `source` go to `target`, at the pace of the latter."""

    def on_data(data: bytes) -> None:
        target.write(data)
        if target.closed:
            source.close()
        elif target.crowded:
            source.pause()

    source.become_half_duplex()
    source.on_data = on_data
    source.on_end = target.finish_writing
    target.on_room = source.resume
    source.resume()
