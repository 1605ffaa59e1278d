"""What a kernel has published of one cell, and whoever follows that cell has not taken yet."""

import asyncio
from collections import deque
from typing import Any

from warmcell.extension.keeper.agents.shown import note

AHEAD_MAX_BYTES = 16 * 2**20
"""Of what waits for one cell's follower, who keeps 8 MiB itself."""

OVERHEAD_BYTES = 1024
"""What a message takes besides its bytes."""

Message = dict[str, Any]


class Ahead:
    """The messages of one cell, in their order. Past the bound it is full; what is added then is lost, and told."""

    def __init__(self) -> None:
        self._messages: deque[tuple[Message, int]] = deque()
        self._size = 0
        self._lost = 0
        self._ended: set[str] = set()
        """What has said how it ended."""
        self._closed = False
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def full(self) -> bool:
        """Whether whoever adds should wait, or lose it."""
        return not self._room.is_set()

    @property
    def losing(self) -> bool:
        """Whether what was added last was lost."""
        return self._lost > 0

    def add(self, message: Message, size_bytes: int) -> None:
        """Add one of that size. How a cell has ended is never lost: the first word of it, that is."""
        kind = message["msg_type"]
        if kind == "status":  # Whatever runs in the sandbox may have put more into it.
            content = message["content"]
            state = content.get("execution_state") if isinstance(content, dict) else None
            if state != "idle":
                return
            message, size_bytes = {"msg_type": kind, "content": {"execution_state": state}, "metadata": {}}, 0
        ends = kind in ("status", "execute_reply") and kind not in self._ended
        if self._closed or (self.full and not ends):
            self._lost += not self._closed
            return
        if ends:
            self._ended.add(kind)
        if self._lost:
            self._append(note(f"[{self._lost} pieces of output were lost: they came faster than they were read]\n"), 0)
            self._lost = 0
        self._append(message, size_bytes)

    async def take(self) -> Message:
        """The next one, once it is there."""
        while not self._messages:
            self._came.clear()
            await self._came.wait()
        message, size = self._messages.popleft()
        self._size -= size
        if self._size <= AHEAD_MAX_BYTES // 2:
            self._room.set()
        return message

    async def room(self, timeout_s: float) -> bool:
        """Whether there is room again, at once or within that time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._room.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Nobody takes anything any more."""
        self._closed = True
        self._messages.clear()
        self._room.set()

    def _append(self, message: Message, size_bytes: int) -> None:
        size = size_bytes + OVERHEAD_BYTES
        self._messages.append((message, size))
        self._size += size
        self._came.set()
        if self._size > AHEAD_MAX_BYTES:
            self._room.clear()
