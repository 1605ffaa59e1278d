"""Who may not lose an image just now, and which images are going: so no removal meets a start or a build."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

Key = tuple[str, str]
"""A builder, and the digest of an image of its."""


class Claims:
    """On images of one cache. On one loop."""

    def __init__(self) -> None:
        """Nobody wants anything yet."""
        self._held: Counter[Key] = Counter()
        self._going: dict[Key, asyncio.Task[None]] = {}

    @contextlib.contextmanager
    def hold(self, key: Key) -> Iterator[None]:
        """Whoever is about to remove that image finds it held meanwhile."""
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]

    def is_held(self, key: Key) -> bool:
        """Whether it is being built, named, or taken for a start."""
        return key in self._held

    def is_going(self, key: Key) -> bool:
        """Whether it is being removed; it may turn out to stay."""
        return key in self._going

    async def settled(self, key: Key) -> None:
        """Wait until it is not being removed; nobody has had a turn since when this returns."""
        while (going := self._going.get(key)) is not None:
            await asyncio.wait({going})

    async def remove(self, key: Key, removal: Coroutine[Any, Any, None]) -> None:
        """Have it go. Nothing may be waited for between a look at whether it is held and this call.

        Who does not wait for the end leaves nothing half-removed: it goes on.
        """
        task = self._going[key] = asyncio.create_task(removal)
        task.add_done_callback(lambda done: self._going.pop(key))
        await asyncio.shield(task)

    async def close(self) -> None:
        """Wait for what is going."""
        await asyncio.gather(*self._going.values(), return_exceptions=True)
