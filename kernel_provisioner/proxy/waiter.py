"""Waiting for descriptors."""

import select
from typing import Final

IN: Final = select.EPOLLIN
OUT: Final = select.EPOLLOUT


class Waiter:
    """An epoll that may be told everything again and again, and acts on what has changed."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wanted: dict[int, int] = {}

    def want(self, fd: int, events: int) -> None:
        """Wait for these events of a descriptor; 0: for none, which must be said before it is closed."""
        before = self._wanted.get(fd, 0)
        if before == events:
            return
        if not events:
            self._epoll.unregister(fd)
            del self._wanted[fd]
            return
        if before:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._wanted[fd] = events

    def wait(self, timeout_s: float | None) -> dict[int, int]:
        """What is ready, after at most `timeout_s`."""
        return dict(self._epoll.poll(timeout_s))

    def close(self) -> None:
        """Wait for nothing any more."""
        self._epoll.close()
