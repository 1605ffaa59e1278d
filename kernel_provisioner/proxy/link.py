"""One kernel as the proxy knows it: its four channels, whether it answers, and whether its output comes through."""

import secrets
import socket
import time
from concurrent.futures import Future
from typing import Any, Final, Literal

from warmcell.kernel_provisioner.proxy.connection import CHANNELS
from warmcell.kernel_provisioner.proxy.requests import RequestChannel
from warmcell.kernel_provisioner.proxy.waiter import IN, OUT, Waiter
from warmcell.kernel_provisioner.proxy.wire import Author, Message
from warmcell.kernel_provisioner.proxy.zmtp import Peer, encode
from warmcell.sandbox.errors import TransportError, WarmcellError

UNSENT_MAX_BYTES: Final = 1024 * 1024
"""Above this, no more requests are taken for a kernel that does not read."""

_CONNECT_RETRY_S: Final = 0.01
_PROBE_S: Final = 0.02
_PROBE_MAX_S: Final = 0.5


GuestChannelName = Literal["shell", "iopub", "stdin", "control"]


class GuestChannel(Peer):
    """One connection to the kernel, an unsigned socket in the sandbox's private run directory."""

    def __init__(self, name: GuestChannelName, prefix: str, identity: bytes) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        if name == "iopub":
            super().__init__(sock, b"SUB", connected=False)
        else:
            super().__init__(sock, b"DEALER", identity=identity, connected=False)
        self.name: GuestChannelName = name
        self.path = f"{prefix}-{CHANNELS.index(name) + 1}"


class GuestLink:
    """Live once the kernel has answered `kernel_info` and was heard on iopub, which proves the subscription."""

    def __init__(self, prefix: str, author: Author, *, fresh: bool) -> None:
        # ipykernel asks for input() at the identity that the request on shell came from, so all share one.
        identity = b"warmcell-" + secrets.token_hex(8).encode()
        self.iopub = GuestChannel("iopub", prefix, identity)
        self.shell = GuestChannel("shell", prefix, identity)
        self.control = GuestChannel("control", prefix, identity)
        self.stdin = GuestChannel("stdin", prefix, identity)
        self.channels = (self.iopub, self.shell, self.control, self.stdin)
        self.live = False
        self._of: dict[str, GuestChannel] = {each.name: each for each in self.channels}
        self._author = author
        self._fresh = fresh
        self._heard = False
        self._info: dict[str, Any] | None = None
        self._probes: set[str] = set()
        self._probe_at = 0.0
        self._pause = _PROBE_S
        self._mark = ""
        self._marked = False
        self._ready: list[Future[dict[str, Any]]] = []
        self._error: WarmcellError | None = None

    @property
    def drained(self) -> bool:
        """All that it has said was read, as far as that can be known."""
        return self._marked or all(each.state in ("closed", "connecting") for each in self.channels)

    # Waiting for events.

    def watch(self, waiter: Waiter, *, output: bool) -> None:
        """Wait for what this link needs; without `output` the kernel's iopub is not read."""
        for each in self.channels:
            wanted = 0
            if each.state not in ("closed", "connecting"):
                wanted = IN if output or each is not self.iopub else 0
                wanted |= OUT if each.unsent_bytes else 0
            waiter.want(each.fd, wanted)

    def timeout_s(self) -> float | None:
        """How long to wait at most before `care` is to be called."""
        if self.live:
            return None
        if any(each.state == "connecting" for each in self.channels):
            return _CONNECT_RETRY_S
        return max(0.001, self._probe_at - time.monotonic()) if self._info is not None else None

    def care(self) -> None:
        """Connect what is not connected, and ask until the kernel has answered and been heard."""
        if self.live:
            return
        for each in self.channels:
            if each.state == "connecting":
                each.connect(each.path)
                self.lost(each)
        # One question waits in the kernel until it can answer; it is repeated only for its output's sake,
        # which goes nowhere if it comes before the subscription.
        due = not self._probes or (self._info is not None and time.monotonic() >= self._probe_at)
        if due and all(each.state == "open" for each in self.channels):
            # A kernel that goes on may be in the middle of a cell, where only its control channel answers.
            self._probes.add(self.send_own("shell" if self._fresh else "control", "kernel_info_request"))
            self._probe_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _PROBE_MAX_S)

    # To the kernel.

    def takes(self, channel: RequestChannel) -> bool:
        """Whether a client's request may be sent now."""
        found = self._of[channel]
        return self.live and found.state == "open" and found.unsent_bytes < UNSENT_MAX_BYTES

    def send(self, channel: RequestChannel, message: Message) -> None:
        """Send a client's request. Without a connection it is lost, as with a kernel that is not there."""
        if self._of[channel].state == "open":
            self._of[channel].write(encode(message.frames(b"")))

    def send_own(self, channel: RequestChannel, kind: str) -> str:
        """Send a request of the proxy's and give its msg_id; empty if there is no connection."""
        if self._of[channel].state != "open":
            return ""
        name, message = self._author.request(kind)
        self._of[channel].write(encode(message.frames(b"")))
        return name

    def mark(self) -> None:
        """Ask for something that is published after all that was said before; `drained` tells when it has come."""
        self._mark = self.send_own("control", "kernel_info_request")

    # From the kernel.

    def hears(self, channel: GuestChannel, message: Message) -> bool:
        """Look at what came. True: it was for the proxy alone."""
        if channel is not self.iopub:
            if message.route[:1] != [self._author.route]:
                return False
            if message.read_parent()[1] in self._probes:
                self._info = message.read_content()
                self._settle()
            return True
        if not self._heard:
            self._heard = True
            self._settle()
        if message.mentions("iopub_welcome"):
            return True
        if not message.mentions("status"):
            return False
        parent = message.read_parent()[1]
        if parent and parent == self._mark:
            self._marked = message.read_content().get("execution_state") == "idle"
        # The answer to a probe also tells clients that a new kernel is idle. In the middle of a cell it would be a lie.
        return self._author.owns(parent) and not (self._fresh and parent in self._probes)

    def lost(self, channel: GuestChannel) -> None:
        """Called when a channel may have been closed by the other side, or for what it said."""
        if channel.state == "closed" and channel in (self.iopub, self.shell):
            self._fail(TransportError("The kernel closed its sockets", hint="Restart the kernel."))

    def wait_ready(self) -> Future[dict[str, Any]]:
        """A future of the content of the kernel's kernel_info reply."""
        ready: Future[dict[str, Any]] = Future()
        ready.set_running_or_notify_cancel()
        if self._error is not None:
            ready.set_exception(self._error)
        else:
            self._ready.append(ready)
            self._settle()
        return ready

    def close(self, waiter: Waiter) -> None:
        """Close all channels."""
        for each in self.channels:
            waiter.want(each.fd, 0)
            each.close()
        self._fail(TransportError("The kernel went away before it was ready", hint="Restart the kernel."))

    def _settle(self) -> None:
        if self._heard and self._info is not None:
            self.live = True
            for each in self._ready:
                each.set_result(self._info)
            self._ready.clear()

    def _fail(self, error: WarmcellError) -> None:
        self._error = error
        for each in self._ready:
            each.set_exception(error)
        self._ready.clear()
