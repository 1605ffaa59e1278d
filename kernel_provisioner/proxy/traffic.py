"""Messages between a kernel's clients and its guest: read, checked, counted, signed, forwarded."""

import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Final

from warmcell.kernel_provisioner.proxy.activity import Activity, Asked
from warmcell.kernel_provisioner.proxy.clients import Client
from warmcell.kernel_provisioner.proxy.connection import Connection
from warmcell.kernel_provisioner.proxy.crossings import Crossings
from warmcell.kernel_provisioner.proxy.host import Host
from warmcell.kernel_provisioner.proxy.link import GuestChannel, GuestLink, Word
from warmcell.kernel_provisioner.proxy.requests import RequestChannel, Requests
from warmcell.kernel_provisioner.proxy.stand_in import StandIn
from warmcell.kernel_provisioner.proxy.unwanted import Unwanted
from warmcell.kernel_provisioner.proxy.waiter import OUT, Waiter
from warmcell.kernel_provisioner.proxy.wire import Author, MalformedMessageError, Message, Signer, cut_short, parse
from warmcell.kernel_provisioner.proxy.zmtp import Cut, Part, ZmtpError

FOR_THIS_KERNEL: Final = frozenset({"shutdown_request", "interrupt_request", "input_reply"})
"""Meant for the kernel that runs now: never kept for the next one."""

_GRUDGE_S: Final = 10.0

_log = logging.getLogger(__name__)


class Traffic:
    """All that is for the relay's thread: who is connected, what waits, and what becomes of each message."""

    def __init__(
        self, connection: Connection, waiter: Waiter, activity: Activity, *, name: str, message_max_bytes: int
    ) -> None:
        self.activity = activity
        self.waiter = waiter
        self.author = Author()
        self.host = Host(waiter)
        self.clients = self.host.clients
        self.requests = Requests()
        self.guest: GuestLink | None = None
        self.stand_in = StandIn(self.author, self.reply, self.publish)
        self.unwanted = Unwanted()
        self.crossings = Crossings(self._reply_lost)
        self.identity = b"warmcell-" + secrets.token_hex(8).encode()
        """Under which every kernel knows the proxy, so that one that goes on can answer what it was asked before."""
        self.paused = False
        """The kernel of this moment is not connected, or is about to be, and goes on later."""
        self.last_input: Message | None = None
        """The last `execute_input` that a kernel published."""
        self._name = name
        self._message_max_bytes = message_max_bytes
        self._signer = Signer(connection.key, connection.signature_scheme)
        self._complained_at = -_GRUDGE_S

    def link(self, prefix: str, *, fresh: bool, word: Word | None = None) -> GuestLink:
        """The guest side of a kernel whose sockets have this prefix."""
        return GuestLink(
            prefix,
            self.author,
            identity=self.identity,
            message_max_bytes=self._message_max_bytes,
            fresh=fresh,
            word=word,
        )

    def use_key(self, connection: Connection) -> None:
        """Sign and check with this connection's key from now on."""
        self._signer = Signer(connection.key, connection.signature_scheme)

    def forget(self) -> None:
        """The kernel is gone, and what was meant for it alone."""
        self.paused = False
        self.stand_in.end()
        self.unwanted.clear()
        self.crossings.clear()
        self.requests.sift(_for_the_next)
        self.activity.forgotten(waiting=self.requests.names())

    # From the clients.

    def from_client(self, client: Client, events: int) -> None:
        """A client's descriptor is ready."""
        if events & OUT:
            self.clients.writable(client)
        if not events & ~OUT:
            return
        try:
            for frames in client.read():
                self._take_from_client(client, frames)
        except ZmtpError as error:
            self._complain("a client's %s connection was closed: %s", client.channel, error)
        if client.state == "closed":
            self.clients.remove(client)
        elif client.state == "open" and not client.known:
            self.clients.introduce(client)

    def _take_from_client(self, client: Client, frames: list[Part]) -> None:
        if not client.known:
            self.clients.introduce(client)
        if client.channel == "hb":
            self.clients.send("hb", [client.identity, *frames])
        elif client.channel == "iopub":
            topic = client.subscribe(frames[0])
            if topic is not None:
                # It tells that its subscription works (protocol 5.5).
                content = {"subscription": topic.decode(errors="replace")}
                _, welcome = self.author.make("iopub_welcome", content, route=[topic] if topic else None)
                self.clients.send("iopub", [client.identity, *welcome.frames(self._signer.sign(welcome.signed))])
        else:
            try:
                self._request(client.channel, parse([client.identity, *frames]))
            except MalformedMessageError as error:
                self._complain("a client's %s message was dropped: %s", client.channel, error)

    def _request(self, channel: RequestChannel, message: Message) -> None:
        kind, name = message.read_header()
        if not self._signer.accepts(message):
            self._complain("a client's %s message (%s) was dropped: its signature is wrong", channel, kind)
        elif self.stand_in.active and self.stand_in.answers(channel, kind, message):
            pass
        elif kind in FOR_THIS_KERNEL and not self.paused:
            # It also overtakes what waits for the kernel to be ready.
            if self.guest is not None:
                self.guest.send(channel, message)
        else:
            self.requests.put(channel, name, message)
            if channel != "stdin" and kind not in FOR_THIS_KERNEL:
                self.activity.asked(kind, name, channel, message)
            if self.stand_in.active and self.stand_in.wakes(kind, message):
                self.stand_in.wake()

    def forward(self, channel: RequestChannel) -> None:
        """Give the guest what waits, as far as it takes it."""
        guest = self.guest
        while guest is not None and guest.takes(channel):
            found = self.requests.take(channel)
            if found is None:
                return
            name, message = found
            guest.send(channel, message)
            self.activity.sent(name)

    def waits_for_kernel(self) -> bool:
        """Whether something waits that is worth to wake a suspended kernel for."""
        found = []

        def look(channel: RequestChannel, name: str, message: Message) -> bool:
            found.append(self.stand_in.wakes(message.read_header()[0], message))
            return True

        self.requests.sift(look)
        return any(found)

    def answer_waiting(self, answers: Callable[[RequestChannel, str, Message], bool]) -> None:
        """Offer all that waits to somebody who answers what he can, by channel and kind; the rest goes on waiting."""

        def waits(channel: RequestChannel, name: str, message: Message) -> bool:
            answered = answers(channel, message.read_header()[0], message)
            if answered:
                self.activity.finished(name)
            return not answered

        self.requests.sift(waits)

    # From the guest.

    def from_guest(self, guest: GuestLink, channel: GuestChannel, events: int) -> None:
        """A guest's descriptor is ready."""
        if events & OUT:
            channel.flush()
        if not events & ~OUT:
            return
        try:
            for frames in channel.read():
                try:
                    message = self._instead_of(channel, frames) if isinstance(frames, Cut) else parse(frames)
                    self._take_from_guest(guest, channel, message)
                except MalformedMessageError as error:
                    self._complain("a message of the guest's on %s was dropped: %s", channel.name, error)
        except ZmtpError as error:
            self._complain("the guest's %s channel was closed: %s", channel.name, error)
            self.tell(f"The connection to the kernel broke: {error}. Restart the kernel.\n")
        if channel.state == "closed":
            self.waiter.want(channel.fd, 0)
            guest.lost(channel)

    def _instead_of(self, channel: GuestChannel, cut: Cut) -> Message:
        """What is told in the place of a message that is too large: output becomes a line of it, a reply an error.

        Raises:
            MalformedMessageError: It does not say in time what it belongs to.
        """
        message = cut_short(cut)
        kind, mib = message.read_header()[0], 2**20
        note = (
            f"A {kind} message of {cut.size_bytes / mib:.0f} MiB is left out: at most {self._message_max_bytes // mib} "
            "MiB go at once. Write it to a file, or send it in parts."
        )
        self._complain("%s", note)
        if channel.name == "iopub":
            _, told = self.author.make("stream", {"name": "stderr", "text": f"[{note}]\n"})
            told.parent = message.parent
            return told
        error = {"status": "error", "ename": "MessageTooLarge", "evalue": note, "traceback": [note]}
        asks = {"prompt": note, "password": False} if channel.name == "stdin" else error
        message.content = json.dumps(asks).encode()
        return message

    def _take_from_guest(self, guest: GuestLink, channel: GuestChannel, message: Message) -> None:
        if guest.hears(channel, message):
            return
        if self.crossings:
            self.crossings.saw(channel.name, message)
        wanted = not self.unwanted or not self.unwanted.includes(channel.name, message)
        if channel.name == "iopub":
            if message.mentions("status"):
                self.activity.status(message.read_content().get("execution_state"), *message.read_parent())
            else:
                self.activity.output()
                if message.mentions("execute_input"):
                    self.activity.began(message.read_content().get("execution_count"))
                    self.last_input = message  # Which can be read again.
            if wanted:
                self.publish(message)
            return
        if not wanted:
            return
        if channel.name != "stdin":
            self.activity.answered(message.read_parent()[1])
        if message.route:
            self.clients.send(channel.name, message.frames(self._signer.sign(message.signed)))

    def _reply_lost(self, name: str, asked: Asked, said: Mapping[str, object]) -> None:
        """A kernel has answered while it was paused. A cell's reply is made from its output, the rest asked again."""
        request = asked.message
        if request is None:
            return
        if asked.kind == "execute_request":
            content = {"status": "ok", "execution_count": 0, "user_expressions": {}, "payload": [], **said}
            self.answer(asked.channel, "execute_reply", content, request)
        elif asked.kind.endswith("_request") and asked.whole:
            self.requests.put(asked.channel, name, request)
            self.activity.asked(asked.kind, name, asked.channel, request)

    def read_guest(self, guest: GuestLink, *, deadline: float, until_closed: bool = False) -> None:
        """Carry over what the guest says, up to its mark or until it has closed its side, at most up to `deadline`."""
        waiter = Waiter()
        try:
            while not (guest.closed if until_closed else guest.drained or self.clients.full(times=2)):
                guest.watch(waiter, output=True)
                ready = waiter.wait(max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for channel in guest.channels:
                    self.from_guest(guest, channel, ready.get(channel.fd, 0))
                    if channel.state == "closed":
                        waiter.want(channel.fd, 0)
        finally:
            waiter.close()

    # To the clients.

    def publish(self, message: Message) -> None:
        """Send to all subscribers."""
        self.clients.publish(message.frames(self._signer.sign(message.signed)))

    def reply(self, channel: RequestChannel, message: Message) -> None:
        """Send to the client that the message's route names."""
        self.clients.send(channel, message.frames(self._signer.sign(message.signed)))

    def answer(self, channel: RequestChannel, kind: str, content: Mapping[str, object], request: Message) -> None:
        """Answer a request in the kernel's place."""
        self.reply(channel, self.author.answer(kind, content, request, to_asker=True))

    def say_status(self, state: str, request: Message) -> None:
        """Publish an execution state in the kernel's place."""
        self.publish(self.author.answer("status", {"execution_state": state}, request, to_asker=False))

    def tell(self, text: str) -> None:
        """Say something to all clients, as what was said on stderr."""
        self.publish(self.author.make("stream", {"name": "stderr", "text": text})[1])

    def _complain(self, what: str, *args: object) -> None:
        now = time.monotonic()
        if now - self._complained_at >= _GRUDGE_S:
            self._complained_at = now
            _log.warning("Proxy of kernel %s: " + what, self._name, *args)


def _for_the_next(channel: RequestChannel, _: str, message: Message) -> bool:
    return channel != "stdin" and not any(map(message.mentions, FOR_THIS_KERNEL))
