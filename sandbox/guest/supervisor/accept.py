"""The `accept` operation: who connects to a port of the sandbox's loopback interface speaks with the host.

It is how programs in a sandbox reach the host's proxy, and nothing else of it: the host answers each of them on a
connection that it has made itself.
"""

from __future__ import annotations

import _socket

from .endpoint import Endpoint, ignore
from .forward import join
from .loop import READ, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BACKLOG = 128


class Acceptors:
    """Ports on which somebody of the host waits."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._listening: dict[int, _socket.socket] = {}
        self._waiting: dict[int, list[tuple[Endpoint, Callable[..., None]]]] = {}

    def open(self, port: int) -> None:
        """Have `port` open, until the host no longer waits there; who connects before it does waits, too.

        Raises:
            OSError: The port is taken.
        """
        if port in self._listening:
            return
        listening = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        try:
            listening.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", port))
            listening.listen(BACKLOG)
            listening.setblocking(False)
        except OSError:
            listening.close()
            raise
        self._listening[port] = listening

    def wait(self, connection: Endpoint, port: int, answer: Callable[..., None]) -> None:
        """Answer once somebody has connected to `port`, and join the two; raises as `open`."""
        self.open(port)
        waiting = self._waiting.setdefault(port, [])
        one = (connection, answer)
        waiting.append(one)
        connection.on_data = lambda data: connection.hang_up()  # Nothing is to be said before the answer.
        connection.on_end = lambda: self._leave(port, one)
        self._loop.watch(self._listening[port].fileno(), READ, lambda events: self._on_connect(port))

    def _leave(self, port: int, one: tuple[Endpoint, Callable[..., None]]) -> None:
        """The host waits no longer; whoever connects is refused if nobody else does."""
        self._waiting[port].remove(one)
        self._close_if_nobody_waits(port)

    def _close_if_nobody_waits(self, port: int) -> None:
        if not self._waiting[port] and port in self._listening:
            self._loop.close(self._listening.pop(port).detach())

    def _on_connect(self, port: int) -> None:
        waiting = self._waiting[port]
        if not waiting or port not in self._listening:
            return
        try:
            fd, _ = self._listening[port]._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        while waiting:
            connection, answer = waiting.pop(0)
            connection.on_end = ignore  # The answer may be what shows that the host has gone.
            answer(ok=True, stream=True)
            if connection.closed:
                continue
            if not waiting:  # Until the host asks again they queue up.
                self._loop.forget(self._listening[port].fileno())
            inside = Endpoint(self._loop, fd)
            join(connection, inside)
            join(inside, connection)
            return
        self._loop.close(fd)
        self._close_if_nobody_waits(port)
