"""Requests that wait for a kernel, bounded in number and bytes."""

import collections
from collections.abc import Callable
from typing import Final, Literal

from warmcell.kernel_provisioner.proxy.wire import Message

WAITING_MAX_MESSAGES: Final = 1000
WAITING_MAX_BYTES: Final = 64 * 1024**2
"""Above either, requests wait in the clients."""

RequestChannel = Literal["control", "stdin", "shell"]
REQUEST_CHANNELS: Final[tuple[RequestChannel, ...]] = ("control", "stdin", "shell")
"""In the order of their urgency."""


class Requests:
    """One queue per channel."""

    def __init__(self) -> None:
        self._queues: dict[RequestChannel, collections.deque[tuple[str, Message]]] = {
            each: collections.deque() for each in REQUEST_CHANNELS
        }
        self._bytes = 0

    def room(self, channel: RequestChannel) -> bool:
        """Whether more may be taken from this channel's clients."""
        return self._bytes < WAITING_MAX_BYTES and len(self._queues[channel]) < WAITING_MAX_MESSAGES

    def put(self, channel: RequestChannel, name: str, message: Message) -> None:
        """Keep a request; `name` is its msg_id."""
        self._queues[channel].append((name, message))
        self._bytes += message.size_bytes

    def put_back(self, channel: RequestChannel, name: str, message: Message) -> None:
        """Keep a request that comes before all others of its channel."""
        self._queues[channel].appendleft((name, message))
        self._bytes += message.size_bytes

    def take(self, channel: RequestChannel) -> tuple[str, Message] | None:
        """The oldest request of a channel, and its msg_id."""
        if not self._queues[channel]:
            return None
        found = self._queues[channel].popleft()
        self._bytes -= found[1].size_bytes
        return found

    def sift(self, keep: Callable[[RequestChannel, str, Message], bool]) -> None:
        """Let go of what is not to be kept, by channel, msg_id and message."""
        for channel, queue in self._queues.items():
            for _ in range(len(queue)):
                name, message = queue.popleft()
                if keep(channel, name, message):
                    queue.append((name, message))
                else:
                    self._bytes -= message.size_bytes

    def names(self) -> frozenset[str]:
        """The msg_ids of all that waits."""
        return frozenset(name for queue in self._queues.values() for name, _ in queue)
