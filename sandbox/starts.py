"""Which kernels are being started right now, so that what can wait does not slow them."""

import asyncio
import time

from warmcell.sandbox.models import SandboxId

SETTLED_S = 0.1
"""So long no start must have been under way: a sandbox comes first, then its kernel, then its first cell."""

PATIENCE_S = 5.0
"""Whoever has waited for so long goes on in any case."""


class Starts:
    """The starts of one service."""

    def __init__(self) -> None:
        self._under_way: set[SandboxId] = set()
        self._none = asyncio.Event()
        self._none.set()
        self._last = -SETTLED_S
        """When the last one ended."""

    def begin(self, sandbox_id: SandboxId) -> None:
        """Somebody waits for this one."""
        self._under_way.add(sandbox_id)
        self._none.clear()

    def end(self, sandbox_id: SandboxId) -> None:
        """Nobody waits for it any more. Idempotent."""
        if sandbox_id not in self._under_way:
            return
        self._under_way.discard(sandbox_id)
        self._last = time.monotonic()
        if not self._under_way:
            self._none.set()

    async def quiet(self) -> None:
        """Wait until none is under way, though not for ever: one that takes that long, or whose end was not told,
        is not waited for again.
        """
        before, asked = set(self._under_way), time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await self._none.wait()
                    left_s = max(self._last, asked) + SETTLED_S - time.monotonic()
                    if left_s <= 0:
                        return
                    await asyncio.sleep(left_s)
        except TimeoutError:
            for sandbox_id in before:
                self.end(sandbox_id)
