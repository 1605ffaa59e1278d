"""The thread that carries messages between a kernel's clients and its guest."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

from warmcell.kernel_provisioner.proxy.activity import Activity
from warmcell.kernel_provisioner.proxy.clients import Client
from warmcell.kernel_provisioner.proxy.connection import Connection
from warmcell.kernel_provisioner.proxy.host import Host
from warmcell.kernel_provisioner.proxy.link import GuestChannel, GuestLink
from warmcell.kernel_provisioner.proxy.requests import REQUEST_CHANNELS, RequestChannel, Requests
from warmcell.kernel_provisioner.proxy.waiter import IN, OUT, Waiter
from warmcell.kernel_provisioner.proxy.wire import Author, MalformedMessageError, Message, Signer, parse
from warmcell.kernel_provisioner.proxy.zmtp import Part, ZmtpError
from warmcell.sandbox.errors import BackendError, ConflictError

_DRAIN_S: Final = 0.25
_IMPATIENCE_S: Final = 1.0
"""How often to look whether a client that takes nothing has used up the patience with it."""
_GRUDGE_S: Final = 10.0

_FOR_THIS_KERNEL: Final = frozenset({"shutdown_request", "interrupt_request", "input_reply"})
"""Meant for the kernel that runs now: never kept for the next one."""

_log = logging.getLogger(__name__)


class Relay:
    """One kernel's thread and all of its state. Others call `submit` and `join` and read `activity`."""

    def __init__(self, connection: Connection, *, name: str) -> None:
        self.activity = Activity()
        self._name = name
        self._connection = connection
        self._signer = Signer(connection.key, connection.signature_scheme)
        self._author = Author()
        self._waiter = Waiter()
        self._host = Host(self._waiter)
        self._clients = self._host.clients
        self._requests = Requests()
        self._guest: GuestLink | None = None
        self._complained_at = -_GRUDGE_S
        self._closing = False
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"proxy-{name}", daemon=True)
        self._thread.start()

    # For other threads.

    def submit(self, command: Callable[[], Any]) -> Future[Any]:
        """Run `command` in the relay's thread."""
        done: Future[Any] = Future()
        with self._lock:
            if self._ended:
                done.set_exception(ConflictError("The kernel's proxy is closed", hint="Start the kernel again."))
            else:
                self._commands.put((command, done))
                os.eventfd_write(self._wake, 1)
        return done

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; False if it has not come after `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # Commands: run in the relay's thread.

    def bind(self, connection: Connection | None = None) -> None:
        """Listen for clients, again where the socket files were removed."""
        self._host.bind(connection or self._connection)
        if connection is not None and connection != self._connection:
            self._connection = connection
            self._signer = Signer(connection.key, connection.signature_scheme)

    def connect(self, prefix: str, *, fresh: bool) -> None:
        """Begin to speak with the kernel whose sockets have this prefix."""
        self.drop()
        self._guest = GuestLink(prefix, self._author, fresh=fresh)
        if fresh:
            # A kernel says so itself, but before anybody listens.
            self._publish(self._author.make("status", {"execution_state": "starting"})[1])

    def drop(self) -> None:
        """Read what the guest has said so far, then close its side completely."""
        if self._guest is None:
            return
        self._drain(self._guest)
        self._guest.close(self._waiter)
        self._guest = None
        while self._requests.take("stdin"):
            pass  # An answer to a question that nobody asks any more.
        self.activity.forgotten(waiting=self._requests.names())

    def wait_ready(self) -> Future[dict[str, Any]]:
        """A future of the content of the kernel's kernel_info reply."""
        if self._guest is None:
            raise _no_guest()
        return self._guest.wait_ready()

    def interrupt(self) -> None:
        """Ask the kernel to interrupt what it runs."""
        if self._guest is None or not self._guest.send_own("control", "interrupt_request"):
            raise _no_guest()

    def close(self) -> None:
        """End the thread after this round."""
        self._closing = True

    # The thread.

    def _run(self) -> None:
        try:
            self._waiter.want(self._wake, IN)
            while not self._closing:
                self._round()
        except Exception:
            _log.exception("The proxy of kernel %s ended by an error", self._name)
        finally:
            self._end()

    def _end(self) -> None:
        if self._guest is not None:
            with contextlib.suppress(Exception):
                self.drop()
        self._host.close()
        self._waiter.close()
        with self._lock:
            self._ended = True
            while not self._commands.empty():
                self._commands.get()[1].set_exception(
                    BackendError("The kernel's proxy ended", hint="Restart the kernel; the keeper's log says why.")
                )
            os.close(self._wake)

    def _round(self) -> None:
        guest = self._guest
        for channel in REQUEST_CHANNELS:
            self._clients.hold(channel, not self._requests.room(channel))
        full = self._clients.full()
        if guest is not None:
            guest.watch(self._waiter, output=not full)
        ready = self._waiter.wait(_IMPATIENCE_S if full else guest.timeout_s() if guest is not None else None)
        if guest is not None:
            for each in guest.channels:
                if each.fd in ready:
                    self._from_guest(guest, each, ready.pop(each.fd))
            guest.care()
        woken = ready.pop(self._wake, 0)
        for fd, events in ready.items():
            client = self._clients.get(fd)
            if client is not None:
                self._from_client(client, events)
            else:
                self._host.accept(fd)
        for channel in REQUEST_CHANNELS:
            self._forward(channel)
        if woken:
            self._run_commands()

    def _run_commands(self) -> None:
        os.eventfd_read(self._wake)
        while not self._commands.empty():
            command, done = self._commands.get()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(command())
            except Exception as error:
                done.set_exception(error)

    # From the clients.

    def _from_client(self, client: Client, events: int) -> None:
        if events & OUT:
            self._clients.writable(client)
        if not events & ~OUT:
            return
        try:
            for frames in client.read():
                self._take_from_client(client, frames)
        except ZmtpError as error:
            self._complain("a client's %s connection was closed: %s", client.channel, error)
        if client.state == "closed":
            self._clients.remove(client)
        elif client.state == "open" and not client.known:
            self._clients.introduce(client)

    def _take_from_client(self, client: Client, frames: list[Part]) -> None:
        if not client.known:
            self._clients.introduce(client)
        if client.channel == "hb":
            self._clients.send("hb", [client.identity, *frames])
        elif client.channel == "iopub":
            topic = client.subscribe(frames[0])
            if topic is not None:
                # It tells that its subscription works (protocol 5.5).
                content = {"subscription": topic.decode(errors="replace")}
                _, welcome = self._author.make("iopub_welcome", content, route=[topic] if topic else None)
                self._clients.send("iopub", [client.identity, *welcome.frames(self._signer.sign(welcome.signed))])
        else:
            try:
                self._request(client.channel, parse([client.identity, *frames]))
            except MalformedMessageError as error:
                self._complain("a client's %s message was dropped: %s", client.channel, error)

    def _request(self, channel: RequestChannel, message: Message) -> None:
        kind, name = message.read_header()
        if not self._signer.accepts(message):
            self._complain("a client's %s message (%s) was dropped: its signature is wrong", channel, kind)
        elif kind in _FOR_THIS_KERNEL:
            # It also overtakes what waits for the kernel to be ready.
            if self._guest is not None:
                self._guest.send(channel, message)
        else:
            self._requests.put(channel, name, message)
            if channel != "stdin":
                self.activity.asked(kind, name)

    def _forward(self, channel: RequestChannel) -> None:
        guest = self._guest
        while guest is not None and guest.takes(channel):
            message = self._requests.take(channel)
            if message is None:
                return
            guest.send(channel, message)

    # From the guest.

    def _from_guest(self, guest: GuestLink, channel: GuestChannel, events: int) -> None:
        if events & OUT:
            channel.flush()
        if not events & ~OUT:
            return
        try:
            for frames in channel.read():
                try:
                    self._take_from_guest(guest, channel, parse(frames))
                except MalformedMessageError as error:
                    self._complain("a message of the guest's on %s was dropped: %s", channel.name, error)
        except ZmtpError as error:
            self._complain("the guest's %s channel was closed: %s", channel.name, error)
            self._tell(f"The connection to the kernel broke: {error}. Restart the kernel.\n")
        if channel.state == "closed":
            self._waiter.want(channel.fd, 0)
            guest.lost(channel)

    def _take_from_guest(self, guest: GuestLink, channel: GuestChannel, message: Message) -> None:
        if guest.hears(channel, message):
            return
        if channel.name == "iopub":
            if message.mentions("status"):
                self.activity.status(str(message.read_content().get("execution_state")), *message.read_parent())
            else:
                self.activity.output()
            self._publish(message)
            return
        if channel.name != "stdin":
            self.activity.answered(message.read_parent()[1])
        if message.route:
            self._clients.send(channel.name, message.frames(self._signer.sign(message.signed)))

    def _drain(self, guest: GuestLink) -> None:
        """Carry over what the guest has said, up to a mark that it publishes last, or to its end."""
        deadline = time.monotonic() + _DRAIN_S
        guest.mark()
        with contextlib.closing(Waiter()) as waiter:
            self._read_until(guest, waiter, deadline)

    def _read_until(self, guest: GuestLink, waiter: Waiter, deadline: float) -> None:
        while not guest.drained and not self._clients.full(times=2):
            guest.watch(waiter, output=True)
            ready = waiter.wait(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for channel in guest.channels:
                self._from_guest(guest, channel, ready.get(channel.fd, 0))

    # To the clients.

    def _publish(self, message: Message) -> None:
        self._clients.publish(message.frames(self._signer.sign(message.signed)))

    def _tell(self, text: str) -> None:
        self._publish(self._author.make("stream", {"name": "stderr", "text": text})[1])

    def _complain(self, what: str, *args: object) -> None:
        now = time.monotonic()
        if now - self._complained_at >= _GRUDGE_S:
            self._complained_at = now
            _log.warning("Proxy of kernel %s: " + what, self._name, *args)


def _no_guest() -> ConflictError:
    return ConflictError("No kernel is connected", hint="Start or restart the kernel.")
