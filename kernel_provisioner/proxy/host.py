"""Where clients connect: the listening sockets of a connection."""

import contextlib
import errno
import ipaddress
import os
import select
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from warmcell.kernel_provisioner.proxy.clients import Client, Clients
from warmcell.kernel_provisioner.proxy.connection import CHANNELS, TEMPORARY_SUFFIX, Channel, Connection
from warmcell.kernel_provisioner.proxy.waiter import IN, Waiter
from warmcell.sandbox.errors import BackendError, ConflictError, InvalidRequestError, WarmcellError
from warmcell.sandbox.paths import FULL, no_room

LINGER_S: Final = 0.2
"""How long closing waits for what is still on its way to a client."""

_BACKLOG: Final = 128
_UNUSABLE: Final = frozenset(
    {errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL, errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EROFS}
)


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket."""

    channel: Channel
    socket: socket.socket
    file: tuple[int, int] | None
    """Device and inode of a Unix socket's file, which tell it from one that came later."""


class Host:
    """Listens, and lets clients in."""

    def __init__(self, waiter: Waiter) -> None:
        self.clients = Clients(waiter)
        self._waiter = waiter
        self._listeners: dict[int, Listener] = {}
        self._at: dict[str, int] = {}
        """Address to the descriptor that listens there."""

    def bind(self, connection: Connection) -> None:
        """Listen at the connection's addresses; where a socket's file was removed, again.

        Raises:
            ConflictError: Somebody else listens there.
            InvalidRequestError: There is no such directory or address.
        """
        for channel in CHANNELS:
            if connection.transport == "tcp":
                address = connection.url(channel)
                if address not in self._at:
                    self._listen(address, _tcp(channel, connection))
            else:
                address = connection.path(channel)
                if not self._is_there(address):
                    self._listen(address, _unix(channel, address))

    def accept(self, fd: int) -> bool:
        """Let in who waits at this descriptor; False if nobody listens there."""
        listener = self._listeners.get(fd)
        if listener is None:
            return False
        try:
            while True:
                accepted, _ = listener.socket.accept()
                if accepted.family != socket.AF_UNIX:
                    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.clients.add(Client(accepted, listener.channel))
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # They wait in the listener until a descriptor is free; do not spin meanwhile.
        return True

    def close(self) -> None:
        """Send what is still to be sent, shortly; then close everything and remove the socket files. Idempotent."""
        deadline = time.monotonic() + LINGER_S
        while (waiting := [each for each in self.clients if each.unsent_bytes]) and time.monotonic() < deadline:
            poll = select.poll()
            for each in waiting:
                poll.register(each.fd, select.POLLOUT)
            poll.poll(1000 * LINGER_S)
            for each in waiting:
                each.flush()
        for each in self.clients:
            self.clients.remove(each)
        for address, fd in tuple(self._at.items()):
            if self._listeners[fd].file is not None and self._is_there(address):
                os.unlink(address)
            self._forget(address)

    def _is_there(self, path: str) -> bool:
        """Whether what is at `path` is the socket that was made there."""
        fd = self._at.get(path)
        return fd is not None and self._listeners[fd].file == _file(path)

    def _listen(self, address: str, listener: Listener) -> None:
        if address in self._at:
            self._forget(address)  # Its file is gone, so nobody can come that way any more.
        fd = listener.socket.fileno()
        self._listeners[fd] = listener
        self._at[address] = fd
        self._waiter.want(fd, IN)

    def _forget(self, address: str) -> None:
        fd = self._at.pop(address)
        self._waiter.want(fd, 0)
        self._listeners.pop(fd).socket.close()


def _unix(channel: Channel, path: str) -> Listener:
    """A listener whose file appears at `path` when it is ready, for its owner alone."""
    _make_way(path)
    temporary = path + TEMPORARY_SUFFIX
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        made.bind(temporary)
        os.chmod(temporary, 0o600)
        made.listen(_BACKLOG)
        os.rename(temporary, path)
    except OSError as error:
        made.close()
        raise _bind_error(path, error) from error
    return Listener(channel, made, _file(path))


def _tcp(channel: Channel, connection: Connection) -> Listener:
    address = ipaddress.ip_address(connection.ip)
    made = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((connection.ip, connection.port(channel)))
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise _bind_error(connection.url(channel), error) from error
    return Listener(channel, made, None)


def _make_way(path: str) -> None:
    """Check that a socket may be made at `path`: nothing is there but the file of a dead one.

    Raises:
        ConflictError: It is something else, or alive.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    what = "is there and no socket"
    if stat.S_ISSOCK(mode):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) in (errno.ECONNREFUSED, errno.ENOENT):
                return
        what = "is in use by another process"
    raise ConflictError(f"{path} {what}", hint=f"Remove {path} or use another connection file.")


def _file(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _bind_error(address: str, error: OSError) -> WarmcellError:
    if error.errno == errno.EADDRINUSE:
        return ConflictError(f"Another process listens at {address}", hint="Use other ports, or end that process.")
    if error.errno in _UNUSABLE:
        return InvalidRequestError(
            f"Clients cannot be awaited at {address}: {error.strerror}",
            hint="Give an address of this machine, or a path in a directory that exists and is writable.",
        )
    if error.errno in FULL:
        return no_room(Path(address).parent)
    return BackendError(f"Listening at {address} failed: {error.strerror}", hint="See the keeper's log.")
