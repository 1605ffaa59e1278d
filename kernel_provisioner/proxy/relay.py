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
from warmcell.kernel_provisioner.proxy.connection import Connection
from warmcell.kernel_provisioner.proxy.link import Answer
from warmcell.kernel_provisioner.proxy.pauses import Pauses
from warmcell.kernel_provisioner.proxy.requests import REQUEST_CHANNELS
from warmcell.kernel_provisioner.proxy.traffic import Traffic
from warmcell.kernel_provisioner.proxy.waiter import IN, Waiter
from warmcell.sandbox.errors import BackendError, ConflictError

_DRAIN_S: Final = 0.25
_IMPATIENCE_S: Final = 1.0
"""How often to look whether a client that takes nothing has used up the patience with it."""

_log = logging.getLogger(__name__)


class Relay:
    """One kernel's thread and all of its state. Others call `submit` and `join` and read `activity`."""

    def __init__(self, connection: Connection, *, name: str, message_max_bytes: int) -> None:
        self.activity = Activity()
        self._name = name
        self._connection = connection
        self._waiter = Waiter()
        self._traffic = Traffic(connection, self._waiter, self.activity, name=name, message_max_bytes=message_max_bytes)
        self.pauses = Pauses(self._traffic)
        """Its commands, as those here, run in the relay's thread."""
        self._closing = False
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=f"proxy-{name}", daemon=True)
        self._thread.start()

    @property
    def known_as(self) -> bytes:
        """The proxy's identity, as kernels know it."""
        return self._traffic.identity

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
        self._traffic.host.bind(connection or self._connection)
        if connection is not None and connection != self._connection:
            self._connection = connection
            self._traffic.use_key(connection)

    def connect(self, prefix: str, *, fresh: bool) -> None:
        """Begin to speak with the kernel whose sockets have this prefix."""
        self.drop()
        traffic = self._traffic
        if traffic.paused:
            traffic.forget()  # The kernel that was to go on is replaced.
        traffic.guest = traffic.link(prefix, fresh=fresh)
        if fresh:
            # A kernel says so itself, but before anybody listens.
            traffic.publish(traffic.author.make("status", {"execution_state": "starting"})[1])

    def drop(self) -> None:
        """Read what the guest has said so far, then close its side completely."""
        guest = self._traffic.guest
        if guest is None:
            return
        guest.mark()
        self._traffic.read_guest(guest, deadline=time.monotonic() + _DRAIN_S)
        guest.close(self._waiter)
        self._traffic.guest = None
        self._traffic.forget()

    def wait_ready(self) -> Answer:
        """A future of the content of the kernel's kernel_info reply."""
        if self._traffic.guest is None:
            raise _no_guest()
        return self._traffic.guest.wait_ready()

    def interrupt(self) -> None:
        """Ask the kernel to interrupt what it runs."""
        if self._traffic.guest is None or not self._traffic.guest.send_own("control", "interrupt_request"):
            raise _no_guest()

    def info(self) -> dict[str, Any] | None:
        """The content of the last kernel_info reply that is known."""
        guest = self._traffic.guest
        return (guest.info if guest is not None else None) or self._traffic.stand_in.info

    def tell(self, text: str) -> None:
        """Say something to all clients."""
        self._traffic.tell(text)

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
        with contextlib.suppress(Exception):
            self.drop()
        self._traffic.host.close()
        self._waiter.close()
        with self._lock:
            self._ended = True
            waiting = [self._commands.get()[1] for _ in range(self._commands.qsize())]
            for each in waiting:
                each.set_exception(
                    BackendError("The kernel's proxy ended", hint="Restart the kernel; the keeper's log says why.")
                )
            os.close(self._wake)

    def _round(self) -> None:
        traffic = self._traffic
        guest, clients = traffic.guest, traffic.clients
        for channel in REQUEST_CHANNELS:
            clients.hold(channel, not traffic.requests.room(channel))
        full = clients.full()
        if guest is not None:
            guest.watch(self._waiter, output=not full)
        ready = self._waiter.wait(_IMPATIENCE_S if full else self._timeout_s())
        if guest is not None:
            for each in guest.channels:
                if each.fd in ready:
                    traffic.from_guest(guest, each, ready.pop(each.fd))
            guest.care()
        if traffic.crossings:
            traffic.crossings.care()
        woken = ready.pop(self._wake, 0)
        for fd, events in ready.items():
            client = clients.get(fd)
            if client is not None:
                traffic.from_client(client, events)
            else:
                traffic.host.accept(fd)
        if woken:
            self._run_commands()
        for channel in REQUEST_CHANNELS:
            traffic.forward(channel)

    def _timeout_s(self) -> float | None:
        guest, crossings = self._traffic.guest, self._traffic.crossings
        timeout = guest.timeout_s() if guest is not None else None
        if not crossings:
            return timeout
        other = crossings.timeout_s()
        return min((each for each in (timeout, other) if each is not None), default=None)

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


def _no_guest() -> ConflictError:
    return ConflictError("No kernel is connected", hint="Start or restart the kernel.")
