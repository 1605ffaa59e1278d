"""Kernels' sockets that are not the host's: init listens for them in the run directory and passes on what comes.

A sandbox that is saved whole, with a kernel of its own below it, must not have sockets that are bound on the host or
connected with it. So kernels bind in a place of the sandbox's own, and init alone has the host's sockets, which it
closes before the sandbox is saved and has again afterwards.
"""

from __future__ import annotations

import _socket
import os

from .endpoint import Endpoint
from .forward import join
from .loop import READ, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

OWN = ".own"
"""Below the run directory; only there where kernels' sockets are not the host's."""

CHANNELS = range(1, 6)
BACKLOG = 64


def bound(name: str) -> _socket.socket:
    """A socket of that name in the run directory, which is init's own, that listens."""
    remove_socket(name)
    listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listening.bind(name)
    finally:
        os.umask(mask)
    listening.listen(BACKLOG)
    listening.setblocking(False)
    return listening


def remove_socket(name: str) -> None:
    """Remove a socket's file, if it is there. The host removes those of kernels that have ended, too."""
    try:
        os.unlink(name)
    except FileNotFoundError:
        return


class Relays:
    """Those of all kernels."""

    def __init__(self, loop: Loop, admit: Callable[[Endpoint], None]) -> None:
        """Nothing is relayed yet.

        Args:
            loop: Where to wait.
            admit: Told of each connection that the host has made.
        """
        self._loop = loop
        self._admit = admit
        self._needed = os.path.isdir(OWN)
        self._names: set[str] = set()
        self._listening: dict[str, _socket.socket] = {}

    def add(self, name: str) -> None:
        """Stand in for a kernel whose sockets have names that begin so."""
        if self._needed:
            self._names.add(name)
            self._listen(name)

    def remove(self, name: str) -> None:
        """That kernel is gone."""
        self._names.discard(name)
        for path in [path for path in self._listening if path.rpartition("-")[0] == name]:
            self._deafen(path)

    def leave(self) -> None:
        """Listen no more."""
        for path in list(self._listening):
            self._deafen(path)

    def come_back(self) -> None:
        """Listen again."""
        for name in self._names:
            self._listen(name)

    def _listen(self, name: str) -> None:
        for number in CHANNELS:
            path = f"{name}-{number}"
            listening = self._listening[path] = bound(path)
            self._loop.watch(listening.fileno(), READ, lambda events, path=path: self._on_connect(path))  # type: ignore[misc]

    def _deafen(self, path: str) -> None:
        self._loop.close(self._listening.pop(path).detach())
        remove_socket(path)

    def _on_connect(self, path: str) -> None:
        if path not in self._listening:
            return
        try:
            fd, _ = self._listening[path]._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        host = Endpoint(self._loop, fd)
        inner = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            inner.connect(f"{OWN}/{path}")
        except OSError:
            inner.close()
            host.close()
            return
        kernel = Endpoint(self._loop, inner.detach())
        self._admit(host)
        self._admit(kernel)
        join(host, kernel)
        join(kernel, host)
