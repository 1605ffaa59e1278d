"""Changes of sandboxes and templates, for those who read them as they come."""

import asyncio
from collections.abc import Callable

from warmcell.sandbox.models import SandboxInfo, TemplateInfo

BACKLOG = 1000
"""Changes that a slow subscriber may be behind before it is dropped."""

Change = SandboxInfo | TemplateInfo


class Subscription:
    """The changes that one reader has not seen yet. One that falls too far behind is ended, not waited for."""

    def __init__(self, forget: Callable[["Subscription"], None], *, backlog: int | None) -> None:
        self._backlog = backlog
        self._queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self._forget = forget
        self.ended = False

    async def next(self, *, timeout: float | None = None) -> Change | None:
        """The next change, or None after `timeout` seconds without one or at the end; see `ended`."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        if self.ended:
            return None
        try:
            async with asyncio.timeout(timeout):
                return await self._queue.get()
        except TimeoutError:
            return None

    def put(self, change: Change) -> None:
        """Hand it a change."""
        if self._backlog is not None and self._queue.qsize() >= self._backlog:
            self.close()
        elif not self.ended:
            self._queue.put_nowait(change)

    def close(self) -> None:
        """Take no more changes and wake the reader. Idempotent."""
        if not self.ended:
            self.ended = True
            self._queue.put_nowait(None)
            self._forget(self)


class Changes:
    """Hands every change to everyone who has subscribed."""

    def __init__(self) -> None:
        self._subscribers: set[Subscription] = set()
        self._closed = False

    def subscribe(self, *, backlog: int | None = BACKLOG) -> Subscription:
        """Every change from now on; close it when done. After `close` it is over from the beginning."""
        subscription = Subscription(self._subscribers.discard, backlog=backlog)
        self._subscribers.add(subscription)
        if self._closed:
            subscription.close()
        return subscription

    def publish(self, change: Change) -> None:
        """Tell everyone."""
        for subscription in list(self._subscribers):
            subscription.put(change)

    def close(self) -> None:
        """End all subscriptions, those to come as well."""
        self._closed = True
        for subscription in list(self._subscribers):
            subscription.close()
