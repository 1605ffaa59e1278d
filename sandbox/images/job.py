"""A build under way, with all who wait for it."""

import asyncio
from collections import deque

from warmcell.sandbox.errors import ConflictError
from warmcell.sandbox.images.base import Tell
from warmcell.sandbox.images.records import Record

KEPT_LINES = 1000
"""Of its output, for who comes later."""


class Job:
    """One of them; the last one to leave ends it."""

    task: "asyncio.Task[Record]"

    def __init__(self, *, again: bool) -> None:
        self.again = again
        """Whether it takes the place of an image that may be there."""
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._tells: list[Tell] = []
        self._waiting = 0

    def say(self, line: str) -> None:
        """A line of output."""
        self._lines.append(line)
        for tell in self._tells:
            tell(line)

    async def join(self, tell: Tell) -> Record:
        """Wait for its end."""
        for line in self._lines:
            tell(line)
        self._tells.append(tell)
        self._waiting += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or not current.cancelling():
                raise ConflictError("The build was given up", hint="Build it again later.") from None
            raise
        finally:
            self._tells.remove(tell)
            self._waiting -= 1
            if not self._waiting and not self.task.done():
                self.task.cancel()
                await asyncio.gather(self.task, return_exceptions=True)
