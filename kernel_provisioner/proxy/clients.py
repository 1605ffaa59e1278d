"""Who is connected to a kernel's proxy, and what is on its way to them, bounded in bytes."""

import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Final

from warmcell.kernel_provisioner.proxy.connection import Channel
from warmcell.kernel_provisioner.proxy.waiter import IN, OUT, Waiter
from warmcell.kernel_provisioner.proxy.zmtp import Chunk, Part, Peer, encode

UNSENT_MAX_BYTES: Final = 64 * 1024**2
"""Output that waits for one client; above it the kernel is not read until the client has caught up."""
PATIENCE_S: Final = 10.0
"""A client that takes nothing for so long loses output from then on, as it would with a plain kernel, so that a
stopped console does not stop a notebook."""


class Client(Peer):
    """One client's socket of one channel."""

    def __init__(self, sock: socket.socket, channel: Channel) -> None:
        super().__init__(sock, b"XPUB" if channel == "iopub" else b"ROUTER")
        self.channel: Channel = channel
        self.topics: list[bytes] = []
        """What it has subscribed to (iopub)."""
        self.known = False
        """It is reachable under its identity."""
        self.losing = False
        self.moved_at = 0.0
        """When it last took something while more was waiting for it."""

    def offer(self, chunks: Sequence[Chunk]) -> bool:
        """Send, unless it loses output by now; False then."""
        if self.losing and self.unsent_bytes:
            return False
        self.losing = False
        if not self.unsent_bytes:
            self.moved_at = time.monotonic()
        self.write(chunks)
        return True

    def subscribe(self, event: Part) -> bytes | None:
        """Take in a message of a subscriber; the topic if it is a new subscription."""
        kind, topic = bytes(event[:1]), bytes(event[1:])
        if kind == b"\x01":
            self.topics.append(topic)
            return topic
        if kind == b"\x00" and topic in self.topics:
            self.topics.remove(topic)
        return None


class Clients:
    """All clients of one kernel."""

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self._all: dict[int, Client] = {}
        self._known: dict[tuple[Channel, bytes], Client] = {}
        self._slow: set[Client] = set()
        self._held: set[Channel] = set()

    def add(self, client: Client) -> None:
        """Somebody has connected."""
        self._all[client.fd] = client
        self._wait_for(client)

    def get(self, fd: int) -> Client | None:
        """The client with this descriptor."""
        return self._all.get(fd)

    def __iter__(self) -> Iterator[Client]:
        return iter(tuple(self._all.values()))

    def remove(self, client: Client) -> None:
        """It is gone; its socket is closed."""
        self._waiter.want(client.fd, 0)
        self._all.pop(client.fd, None)
        if self._known.get((client.channel, client.identity)) is client:
            del self._known[client.channel, client.identity]
        self._slow.discard(client)
        client.close()

    def hold(self, channel: Channel, held: bool) -> None:
        """Whether to leave unread for now what clients send on a channel."""
        if held == (channel in self._held):
            return
        self._held ^= {channel}
        for client in self._all.values():
            if client.channel == channel:
                self._wait_for(client)

    def introduce(self, client: Client) -> None:
        """Called when it has said who it is. Who comes back under an old identity replaces the old connection."""
        client.known = True
        client.identity = client.identity or b"\0" + secrets.token_bytes(4)
        before = self._known.get((client.channel, client.identity))
        self._known[client.channel, client.identity] = client
        if before is not None and client.channel != "iopub":
            self.remove(before)

    def send(self, channel: Channel, frames: Sequence[Part]) -> None:
        """Send to the client whose identity is the first frame; nothing happens if it is gone or takes nothing."""
        client = self._known.get((channel, bytes(frames[0])))
        if client is not None and client.unsent_bytes < UNSENT_MAX_BYTES:
            self._offer(client, encode(frames[1:]))

    def publish(self, frames: Sequence[Part]) -> None:
        """Send to everyone who has subscribed to what the first frame begins with."""
        chunks: list[Chunk] | None = None
        for client in self._all.values():
            if client.topics and any(bytes(frames[0]).startswith(topic) for topic in client.topics):
                chunks = chunks or encode(frames)
                self._offer(client, chunks)

    def writable(self, client: Client) -> None:
        """Its socket takes data again."""
        if client.flush():
            client.moved_at = time.monotonic()
        self._settle(client)

    def full(self, *, times: int = 1) -> bool:
        """Whether a client has so much waiting that the kernel should not be read. Patience with it ends here."""
        now = time.monotonic()
        found = False
        for client in self._slow:
            if client.losing or client.channel != "iopub" or client.unsent_bytes < times * UNSENT_MAX_BYTES:
                continue
            client.losing = now - client.moved_at >= PATIENCE_S
            found = found or not client.losing
        return found

    def _offer(self, client: Client, chunks: Sequence[Chunk]) -> None:
        if client.offer(chunks):
            self._settle(client)

    def _settle(self, client: Client) -> None:
        if client.unsent_bytes:
            self._slow.add(client)
        else:
            self._slow.discard(client)
        self._wait_for(client)

    def _wait_for(self, client: Client) -> None:
        events = 0 if client.channel in self._held else IN
        self._waiter.want(client.fd, events | (OUT if client.unsent_bytes else 0))
