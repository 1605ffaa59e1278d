"""One kernel as the proxy knows it: its four channels, whether it answers, and whether its output comes through."""

import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Literal

from warmcell.kernel_provisioner.proxy.connection import CHANNELS
from warmcell.kernel_provisioner.proxy.requests import RequestChannel
from warmcell.kernel_provisioner.proxy.waiter import IN, OUT, Waiter
from warmcell.kernel_provisioner.proxy.wire import Author, Message
from warmcell.kernel_provisioner.proxy.zmtp import Peer, encode
from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    SnapshotError,
    TransportError,
    UnsupportedOperationError,
    WarmcellError,
)

UNSENT_MAX_BYTES: Final = 1024 * 1024
"""Above this, no more requests are taken for a kernel that does not read."""

_CONNECT_RETRY_S: Final = 0.001
_CONNECT_RETRY_MAX_S: Final = 0.01
_PROBE_S: Final = 0.02
_PROBE_MAX_S: Final = 0.5
_PROOF_S: Final = 0.25
"""How long the word to a kernel that goes on waits for a sign that its output comes through."""


GuestChannelName = Literal["shell", "iopub", "stdin", "control"]
Answer = Future[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Word:
    """A request on control that a kernel must answer with `ok` before anything else reaches it."""

    kind: str
    content: Mapping[str, Any]


class GuestChannel(Peer):
    """One connection to the kernel, an unsigned socket in the sandbox's private run directory."""

    def __init__(self, name: GuestChannelName, prefix: str, identity: bytes, message_max_bytes: int) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        if name == "iopub":
            super().__init__(sock, b"SUB", connected=False, cut_above_bytes=message_max_bytes)
        else:
            super().__init__(sock, b"DEALER", identity=identity, connected=False, cut_above_bytes=message_max_bytes)
        self.name: GuestChannelName = name
        self.path = f"{prefix}-{CHANNELS.index(name) + 1}"


class GuestLink:
    """Live once the kernel has answered and was heard on iopub, which proves the subscription.

    The answer is that to `kernel_info`, or to `word` where that is given.
    """

    def __init__(
        self,
        prefix: str,
        author: Author,
        *,
        identity: bytes,
        message_max_bytes: int,
        fresh: bool,
        word: Word | None = None,
    ) -> None:
        # ipykernel asks for input() at the identity that the request on shell came from, so all share one.
        self.iopub = GuestChannel("iopub", prefix, identity, message_max_bytes)
        self.shell = GuestChannel("shell", prefix, identity, message_max_bytes)
        self.control = GuestChannel("control", prefix, identity, message_max_bytes)
        self.stdin = GuestChannel("stdin", prefix, identity, message_max_bytes)
        self.channels = (self.iopub, self.shell, self.control, self.stdin)
        self.live = False
        self.held = False
        """It gets no requests of clients for now."""
        self.heard_at = time.monotonic()
        """When something last came on iopub."""
        self.marked: Answer = _future()
        """Done when the mark has come."""
        self.info: dict[str, Any] | None = None
        """The content of its last kernel_info reply."""
        self._of: dict[str, GuestChannel] = {each.name: each for each in self.channels}
        self._author = author
        self._fresh = fresh
        self._word = word
        self._heard = False
        self._answer: dict[str, Any] | None = None
        self._asked: dict[str, Answer] = {}
        self._probes: set[str] = set()
        self._probe_at = 0.0
        self._pause = _PROBE_S
        self._retry = _CONNECT_RETRY_S
        self._open_since = 0.0
        self._mark = ""
        self._ready: list[Answer] = []
        self._error: WarmcellError | None = None

    @property
    def drained(self) -> bool:
        """All that it has said was read, as far as that can be known."""
        return self.marked.done() or all(each.state in ("closed", "connecting") for each in self.channels)

    @property
    def closed(self) -> bool:
        """The kernel has closed all channels, or never opened them."""
        return all(each.state in ("closed", "connecting") for each in self.channels)

    @property
    def unsent_bytes(self) -> int:
        """What is on its way to the kernel."""
        return sum(each.unsent_bytes for each in self.channels)

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
            self._retry = min(1.5 * self._retry, _CONNECT_RETRY_MAX_S)
            return self._retry
        now = time.monotonic()
        if self._word is not None and not self._heard and self._open_since:
            return max(0.001, self._open_since + _PROOF_S - now)
        return max(0.001, self._probe_at - now) if self._answer is not None else None

    def care(self) -> None:
        """Connect what is not connected, and ask until the kernel has answered and been heard."""
        if self.live:
            return
        for each in self.channels:
            if each.state == "connecting":
                each.connect(each.path)
                self.lost(each)
        if not all(each.state == "open" for each in self.channels):
            return
        now = time.monotonic()
        self._open_since = self._open_since or now
        if self._word is not None:
            # What it has kept is let go by the word, so that waits until a subscription is proved by a welcome.
            if self._heard or now >= self._open_since + _PROOF_S:
                word, self._word = self._word, None
                self.ask(word.kind, word.content).add_done_callback(self._answered)
                self._probe_at = now + self._pause
            return
        # One question waits in the kernel until it can answer; it is repeated only for its output's sake,
        # which goes nowhere if it comes before the subscription.
        due = not self._probes and not self._asked
        if due or (self._answer is not None and now >= self._probe_at):
            # A kernel that goes on may be in the middle of a cell, where only its control channel answers.
            self._probes.add(self.send_own("shell" if self._fresh else "control", "kernel_info_request"))
            self._probe_at = now + self._pause
            self._pause = min(2 * self._pause, _PROBE_MAX_S)

    # To the kernel.

    def takes(self, channel: RequestChannel) -> bool:
        """Whether a client's request may be sent now."""
        found = self._of[channel]
        return self.live and not self.held and found.state == "open" and found.unsent_bytes < UNSENT_MAX_BYTES

    def send(self, channel: RequestChannel, message: Message) -> None:
        """Send a client's request. Without a connection it is lost, as with a kernel that is not there."""
        if self._of[channel].state == "open":
            self._of[channel].write(encode(message.frames(b"")))

    def send_own(self, channel: RequestChannel, kind: str, content: Mapping[str, Any] | None = None) -> str:
        """Send a request of the proxy's and give its msg_id; empty if there is no connection."""
        if self._of[channel].state != "open":
            return ""
        name, message = self._author.request(kind, content)
        self._of[channel].write(encode(message.frames(b"")))
        return name

    def ask(self, kind: str, content: Mapping[str, Any], *, mark: bool = False) -> Answer:
        """Send a request of the proxy's on control; a future of its reply's content.

        With `mark`, the idle status that ends it is the mark.
        """
        answer = _future()
        name = self.send_own("control", kind, content)
        if not name:
            answer.set_exception(_gone())
            return answer
        self._asked[name] = answer
        if mark:
            self._mark, self.marked = name, _future()
        return answer

    def mark(self) -> None:
        """Ask for something that is published after all that was said before; `drained` tells when it has come."""
        self.marked = _future()
        self._mark = self.send_own("control", "kernel_info_request")

    # From the kernel.

    def hears(self, channel: GuestChannel, message: Message) -> bool:
        """Look at what came. True: it was for the proxy alone."""
        if channel is not self.iopub:
            if message.route[:1] != [self._author.route]:
                return False
            parent = message.read_parent()[1]
            if parent in self._asked:
                self._asked.pop(parent).set_result(message.read_content())
            elif parent in self._probes:
                self.info = message.read_content()
                if self._answer is None:
                    self._answer = self.info
                self._settle()
            return True
        self.heard_at = time.monotonic()
        if not self._heard:
            self._heard = True
            self._settle()
        if message.mentions("iopub_welcome"):
            return True
        if not message.mentions("status"):
            return False
        kind, parent = message.read_parent()
        if parent and parent == self._mark and message.read_content().get("execution_state") == "idle":
            self._mark = ""
            self.marked.set_result({})
        # The answer to a probe also tells clients that a new kernel is idle. In the middle of a cell it would be a lie.
        # What another proxy asked for a snapshot's sake may come out of the snapshot.
        ours = self._author.owns(parent) and not (self._fresh and parent in self._probes)
        return ours or kind.startswith("warmcell_")

    def lost(self, channel: GuestChannel) -> None:
        """Called when a channel may have been closed by the other side, or for what it said."""
        if channel.state == "closed" and channel is not self.stdin:
            self._fail(TransportError("The kernel closed its sockets", hint="Restart the kernel."))

    def wait_ready(self) -> Answer:
        """A future of the content of the kernel's answer."""
        ready = _future()
        if self._error is not None:
            ready.set_exception(self._error)
        else:
            self._ready.append(ready)
            self._settle()
        return ready

    def hang_up(self) -> None:
        """Say no more. The kernel reads what was said, and closes its side."""
        for each in self.channels:
            each.end()

    def close(self, waiter: Waiter) -> None:
        """Close all channels."""
        for each in self.channels:
            waiter.want(each.fd, 0)
            each.close()
        self._fail(_gone())

    def _answered(self, answer: Answer) -> None:
        if answer.exception() is not None:
            return
        content = answer.result()
        if content.get("status") == "ok":
            self._answer = content
            self._settle()
        else:
            self._fail(refusal(content))

    def _settle(self) -> None:
        if self._heard and self._answer is not None and self._error is None:
            self.live = True
            for each in self._ready:
                each.set_result(self._answer)
            self._ready.clear()

    def _fail(self, error: WarmcellError) -> None:
        self._error = error
        for each in (*self._ready, *self._asked.values()):
            each.set_exception(error)
        self._ready.clear()
        self._asked.clear()


def refusal(content: Mapping[str, Any]) -> WarmcellError:
    """The error that a kernel's refusal stands for, in the words of whoever refused there."""
    words = str(content.get("evalue") or "The kernel gave no reason")
    hint = str(content.get("hint") or "The kernel's own hooks decide that; change them or what they complain about.")
    for kind in (UnsupportedOperationError, ConflictError, CapacityError):
        if content.get("ename") == kind.__name__:
            return kind(words, hint=hint)
    return SnapshotError(words, hint=hint)


def _future() -> Answer:
    made: Answer = Future()
    made.set_running_or_notify_cancel()
    return made


def _gone() -> TransportError:
    return TransportError("The kernel went away before it was ready", hint="Restart the kernel.")
