"""A Unix socket for httpx, with a loop and without.

Its own way without one leaves the socket open when nobody listens. With one it is anyio's, which has an accident in the
loop (`Future.set_result(None)`, invalid state) where a request is cancelled in the moment in which its answer comes.
"""

import asyncio
import select
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


class AsyncUnixTransport(httpx.AsyncHTTPTransport):
    """Requests over the socket at `path`, in the running loop."""

    def __init__(self, path: str) -> None:
        super().__init__(verify=_api.no_certificates())
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=_api.no_certificates(),
            max_connections=_api.LIMITS.max_connections,
            max_keepalive_connections=_api.LIMITS.max_keepalive_connections,
            keepalive_expiry=_api.LIMITS.keepalive_expiry,
            uds=path,
            network_backend=_AsyncBackend(),
        )


class _AsyncBackend(httpcore.AsyncNetworkBackend):
    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_unix_connection(path)
        except OSError as error:
            kind = httpcore.ConnectTimeout if isinstance(error, TimeoutError) else httpcore.ConnectError
            raise kind(str(error)) from error
        return _AsyncStream(reader, writer)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            async with asyncio.timeout(timeout):
                return await self._reader.read(max_bytes)
        except OSError as error:
            kind = httpcore.ReadTimeout if isinstance(error, TimeoutError) else httpcore.ReadError
            raise kind(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            async with asyncio.timeout(timeout):
                self._writer.write(buffer)
                await self._writer.drain()
        except OSError as error:
            kind = httpcore.WriteTimeout if isinstance(error, TimeoutError) else httpcore.WriteError
            raise kind(str(error)) from error

    async def aclose(self) -> None:
        self._writer.transport.abort()  # Who reads no more is not waited for.
        await asyncio.sleep(0)  # It is closed by then.

    def get_extra_info(self, info: str) -> Any:
        return self._is_readable() if info == "is_readable" else None

    def _is_readable(self) -> bool:
        """Whether there is something to read, the end of the connection included, heard of by the loop or not yet."""
        if self._writer.is_closing() or self._reader.at_eof() or self._reader.exception() is not None:
            return True
        look = select.poll()
        look.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(look.poll(0))
