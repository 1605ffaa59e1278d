"""A Unix socket for httpx without a loop: its own way leaves the socket open when nobody listens."""

import socket
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

from warmcell.sandbox.client import _api


class UnixTransport(httpx.HTTPTransport):
    """Requests over the socket at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__(verify=_api.no_certificates())
        self._pool.close()
        self._pool = httpcore.ConnectionPool(
            ssl_context=_api.no_certificates(),
            max_connections=_api.LIMITS.max_connections,
            max_keepalive_connections=_api.LIMITS.max_keepalive_connections,
            keepalive_expiry=_api.LIMITS.keepalive_expiry,
            uds=path,
            network_backend=_Backend(),
        )


class _Backend(httpcore.SyncBackend):
    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(path)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                kind = httpcore.ConnectTimeout if isinstance(error, TimeoutError) else httpcore.ConnectError
                raise kind(str(error)) from error
            raise
        return _Stream(connection)


class _Stream(httpcore.NetworkStream):
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            self._connection.settimeout(timeout)
            return self._connection.recv(max_bytes)
        except OSError as error:
            kind = httpcore.ReadTimeout if isinstance(error, TimeoutError) else httpcore.ReadError
            raise kind(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._connection.settimeout(timeout)
            self._connection.sendall(buffer)
        except OSError as error:
            kind = httpcore.WriteTimeout if isinstance(error, TimeoutError) else httpcore.WriteError
            raise kind(str(error)) from error

    def close(self) -> None:
        self._connection.close()

    def get_extra_info(self, info: str) -> Any:
        return self._is_readable() if info == "is_readable" else None

    def _is_readable(self) -> bool:
        """Whether there is something to read, the end of the connection included."""
        try:
            self._connection.settimeout(0)
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True
