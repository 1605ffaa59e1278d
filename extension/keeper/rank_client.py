"""The keeper's own connection to a kernel that runs cells for it, in ZeroMQ's wire protocol as the proxy speaks it.

What a kernel prints is bounded here in bytes: a message that is too large is thrown away while it comes, and no more is
read than whoever listens has room for.
"""

import asyncio
import collections
import logging
import select
import socket
import time
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from warmcell.kernel_provisioner.proxy.connection import CHANNELS
from warmcell.kernel_provisioner.proxy.wire import Author, MalformedMessageError, Message, Signer, cut_short, parse
from warmcell.kernel_provisioner.proxy.zmtp import Cut, Peer, ZmtpError, encode
from warmcell.sandbox import errors

log = logging.getLogger(__name__)

MESSAGE_MAX_BYTES: Final = 64 * 2**20
"""Of one. A page could not show more, and a picture that is larger is a mistake."""

WAITING_MAX_BYTES: Final = 4 * 2**20
"""What has come and was not looked at yet; beyond that nothing is read where it came."""

HEARD_BYTES: Final = 1024
"""What a message takes here besides what it says."""

CONNECT_AGAIN_S: Final = 0.005
ASK_AGAIN_S: Final = 0.25

ChannelName = Literal["shell", "iopub", "control"]
NAMES: Final[tuple[ChannelName, ...]] = ("shell", "iopub", "control")


class Heard(NamedTuple):
    """A message of the kernel's."""

    channel: ChannelName
    parent: str
    """The id of the request that it belongs to."""
    message: Message
    left_out_bytes: int = 0
    """How large one was that was too large, of which nothing is there but what it is."""


class RankClient:
    """Three channels to one kernel. One task at a time listens."""

    def __init__(self, prefix: str, *, key: str = "") -> None:
        """Nothing is connected yet.

        Args:
            prefix: Of the names of its sockets.
            key: What requests are signed with, where the sockets are a proxy's.
        """
        self.ended = False
        """The other side has gone, or says what nobody understands."""
        self.alone = not key
        """Nobody else listens to this kernel, not even a proxy."""
        self._author = Author()
        self._signer = Signer(key.encode(), "hmac-sha256")
        self._loop = asyncio.get_running_loop()
        self._paths = {name: f"{prefix}-{CHANNELS.index(name) + 1}" for name in NAMES}
        self._peers = {name: _peer(name) for name in NAMES}
        self._waiting: collections.deque[Heard] = collections.deque()
        self._waiting_bytes = 0
        self._held: set[ChannelName] = set()
        """Channels that are not read, as too much waits."""
        self._came: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Wait until all channels are open.

        Raises:
            TransportError: It hangs up.
        """
        while not all(peer.state == "open" for peer in self._peers.values()):
            for name, peer in self._peers.items():
                if peer.state == "connecting":
                    peer.connect(self._paths[name])
                    self._watch(name)
            if self.ended:
                raise _hung_up()
            await self._something(time.monotonic() + CONNECT_AGAIN_S)

    async def answers(self) -> None:
        """Wait until it answers, and what it publishes reaches us: what comes before that is lost.

        Raises:
            TransportError: It hangs up.
        """
        await self.open()
        while not self.ended:
            asked, until = self.request("shell", "kernel_info_request", {}), time.monotonic() + ASK_AGAIN_S
            while (heard := await self.hear(until)) is not None:
                if heard.channel == "iopub" and heard.parent == asked:
                    return
        raise _hung_up()

    def request(self, channel: ChannelName, kind: str, content: Mapping[str, Any]) -> str:
        """Send one; its id."""
        name, message = self._author.make(kind, content)
        peer = self._peers[channel]
        if peer.state != "closed":
            peer.write(encode(message.frames(self._signer.sign(message.signed))))
            if peer.unsent_bytes:
                self._loop.add_writer(peer.fd, self._flush, channel)
        return name

    async def hear(self, until: float | None = None) -> Heard | None:
        """The next message; None where none comes until that time of the monotonic clock, or after `wake`."""
        if not self._waiting and not self.ended:
            await self._something(until)
        if not self._waiting:
            return None
        heard = self._waiting.popleft()
        self._waiting_bytes -= heard.message.size_bytes + HEARD_BYTES
        if self._held and self._waiting_bytes < WAITING_MAX_BYTES // 2:
            held, self._held = self._held, set()
            for name in held:
                self._watch(name)
        return heard

    def wake(self) -> None:
        """Have whoever listens look whether there is still something to wait for."""
        if self._came is not None and not self._came.done():
            self._came.set_result(None)

    async def ask(self, kind: str, content: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        """A request on control that is to be answered with `ok`; what comes meanwhile is thrown away.

        Raises:
            SnapshotError: It was answered with an error.
            TransportError: It hangs up.
            OperationTimeoutError: It was not answered.
        """
        await self.open()
        asked, until = self.request("control", kind, content), time.monotonic() + timeout_s
        while (heard := await self.hear(until)) is not None:
            if heard.channel == "control" and heard.parent == asked:
                said = heard.message.read_content()
                if said.get("status") != "ok":
                    raise errors.SnapshotError(f"The kernel refuses: {said.get('evalue')}", hint="Restart the kernel.")
                return said
        if self.ended:
            raise _hung_up()
        raise errors.OperationTimeoutError(f"The kernel did not answer {kind}", hint="Restart the kernel.")

    def finish(self) -> None:
        """Its process has ended: take what it has still said, then let go."""
        peer = self._peers["iopub"]
        while peer.state == "open" and select.select([peer.fd], [], [], 0)[0]:
            self._read("iopub")
        self.close()

    def close(self) -> None:
        """Let go of the kernel; what has come can still be heard. Idempotent."""
        if self.ended:
            return
        self.ended = True
        for peer in self._peers.values():
            self._loop.remove_reader(peer.fd)
            self._loop.remove_writer(peer.fd)
            peer.close()
        self.wake()

    async def _something(self, until: float | None) -> None:
        """Wait until something has happened, or that time."""
        self._came = self._loop.create_future()
        timer = None if until is None else self._loop.call_later(max(0.0, until - time.monotonic()), self.wake)
        try:
            await self._came
        finally:
            self._came = None
            if timer is not None:
                timer.cancel()

    def _watch(self, name: ChannelName) -> None:
        """Wait for what a channel needs."""
        peer = self._peers[name]
        if peer.state not in ("closed", "connecting"):
            if name not in self._held:
                self._loop.add_reader(peer.fd, self._read, name)
            if peer.unsent_bytes:
                self._loop.add_writer(peer.fd, self._flush, name)

    def _read(self, name: ChannelName) -> None:
        peer = self._peers[name]
        before = peer.state
        try:
            for frames in peer.read():
                if isinstance(frames, Cut):
                    self._hear(name, cut_short(frames), left_out_bytes=frames.size_bytes)
                else:
                    self._hear(name, parse(frames))
        except (ZmtpError, MalformedMessageError) as error:
            log.warning("a remote kernel breaks the protocol: %s", error)
            self.close()
            return
        if peer.state == "closed":  # The end of its process follows, and is waited for elsewhere.
            self._loop.remove_reader(peer.fd)
        elif peer.state != before:
            self.wake()

    def _hear(self, name: ChannelName, message: Message, *, left_out_bytes: int = 0) -> None:
        self._waiting.append(Heard(name, message.read_parent()[1], message, left_out_bytes))
        self._waiting_bytes += message.size_bytes + HEARD_BYTES
        if self._waiting_bytes > WAITING_MAX_BYTES and name not in self._held:
            self._held.add(name)
            self._loop.remove_reader(self._peers[name].fd)
        self.wake()

    def _flush(self, name: ChannelName) -> None:
        peer = self._peers[name]
        peer.flush()
        if not peer.unsent_bytes:
            self._loop.remove_writer(peer.fd)


def _peer(name: ChannelName) -> Peer:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    kind: Literal[b"SUB", b"DEALER"] = b"SUB" if name == "iopub" else b"DEALER"
    return Peer(sock, kind, connected=False, cut_above_bytes=MESSAGE_MAX_BYTES)


def _hung_up() -> errors.TransportError:
    return errors.TransportError("The remote kernel closed its sockets", hint="Run the cell again.")
