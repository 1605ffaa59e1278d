"""Talk to the user's keeper over its Unix socket: REST, the same for everyone (docs: the keeper's API)."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from warmcell.sandbox.client import _api
from warmcell.sandbox.client._unix import UnixTransport
from warmcell.sandbox.client.start import LISTENS_S, ensure_keeper, is_listening
from warmcell.sandbox.client.starting import keeper_listens
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths

CONNECT_ATTEMPTS = 3
LOOKS = "Warmcell-Looks"
"""A header of requests by those who look now and then, and for whom no keeper is to stay."""


def _no_keeper() -> TransportError:
    return TransportError(
        "No keeper is running", hint="It starts with the first kernel, or with `warmcell doctor --start`."
    )


async def _answers(paths: Paths) -> bool:
    """Whether somebody accepts connections. Without a thread: an interpreter that ends has none any more to give."""
    try:
        async with asyncio.timeout(LISTENS_S):
            _, writer = await asyncio.open_unix_connection(paths.keeper_socket)
    except OSError:
        return False
    writer.close()
    return True


class KeeperClient:
    """An asynchronous connection to the keeper. Paths are relative to `/warmcell/api/v1`."""

    def __init__(self, paths: Paths, *, looks: bool = False) -> None:
        """Prefer `connect`, which makes sure that somebody answers."""
        self.paths = paths
        transport = httpx.AsyncHTTPTransport(
            uds=str(paths.keeper_socket), limits=_api.LIMITS, verify=_api.no_certificates()
        )
        self._http = httpx.AsyncClient(
            transport=transport,
            base_url=_api.BASE_URL,
            headers={LOOKS: "1"} if looks else {},
            timeout=_api.TIMEOUT,
            trust_env=False,
        )

    @classmethod
    async def connect(
        cls,
        *,
        paths: Paths | None = None,
        start: bool = True,
        patience_s: float | None = None,
        looks: bool = False,
    ) -> Self:
        """Find the keeper, or start it.

        Args:
            paths: Where it listens.
            start: Start one where none listens.
            patience_s: Do not wait longer for one that comes up. It still comes: ask again. None: wait for it.
            looks: It does not stay for this connection: whoever has it only looks now and then.

        Raises:
            TransportError: It is not there and `start` is false, or it did not come up.
        """
        paths = paths or Paths.default()
        if not start and not await _answers(paths):
            raise _no_keeper()
        for attempt in range(CONNECT_ATTEMPTS):
            if start:
                await keeper_listens(paths, patience_s=patience_s)
            client = cls(paths, looks=looks)
            try:
                await client.get("/status", timeout=_api.CONNECT_TIMEOUT_S)
            except BaseException as error:
                await client.close()
                going = isinstance(error, TransportError)  # it was just going away
                if not going or attempt == CONNECT_ATTEMPTS - 1:
                    raise
            else:
                return client
        raise _no_keeper()

    async def get(self, path: str, *, timeout: float | None = _api.READ_TIMEOUT_S) -> Any:
        """GET; `timeout` in seconds, None for as long as it takes.

        Raises:
            WarmcellError: What the keeper answers, or `TransportError` where it is gone.
        """
        return await self._request("GET", path, None, timeout)

    async def post(self, path: str, body: Any = None, *, timeout: float | None = _api.READ_TIMEOUT_S) -> Any:
        """POST a JSON body; as `get`."""
        return await self._request("POST", path, {} if body is None else body, timeout)

    async def delete(self, path: str, *, timeout: float | None = _api.READ_TIMEOUT_S) -> Any:
        """DELETE; as `get`."""
        return await self._request("DELETE", path, None, timeout)

    async def patch(self, path: str, body: Any, *, timeout: float | None = _api.READ_TIMEOUT_S) -> Any:
        """PATCH with a JSON body; as `get`."""
        return await self._request("PATCH", path, body, timeout)

    async def download(self, path: str) -> AsyncGenerator[bytes, None]:
        """GET what is not JSON, piece by piece, each within the usual time; raises as `get`."""
        try:
            async with self._http.stream("GET", path) as response:
                if not response.is_success:
                    raise _api.failure(response.status_code, await response.aread())
                async for piece in response.aiter_raw():
                    yield piece
        except httpx.TimeoutException as error:
            raise _api.too_slow("GET", path, _api.READ_TIMEOUT_S) from error
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error

    async def upload(self, path: str, pieces: AsyncIterator[bytes]) -> Any:
        """POST what is not JSON, and wait for the answer as long as it takes; raises as `get`."""
        try:
            response = await self._http.post(path, content=pieces, timeout=_api.timeout(None))
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error
        return _api.read(response)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        json: Any = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        timeout: float | None = _api.READ_TIMEOUT_S,
        checked: bool = True,
    ) -> AsyncGenerator[httpx.Response, None]:
        """One request of any kind; its answer, good, is read by the caller, in pieces if it likes. Raises as `get`.

        `timeout` is that of each wait, in seconds; None for as long as it takes. Unless `checked`, an answer that is an
        error is given like any other.
        """
        how: dict[str, Any] = {"headers": headers, "params": params, "json": json, "content": content}
        try:
            async with self._http.stream(method, path, timeout=_api.timeout(timeout), **how) as response:
                if checked and not response.is_success:
                    raise _api.failure(response.status_code, await response.aread())
                yield response
        except httpx.TimeoutException as error:
            raise _api.too_slow(method, path, timeout) from error
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error

    async def events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Name and data of each event, `hello` first, until the keeper closes.

        Raises:
            TransportError: The keeper is gone.
        """
        try:
            async with self._http.stream("GET", "/events", timeout=_api.timeout(None)) as response:
                if not response.is_success:
                    raise _api.failure(response.status_code, await response.aread())
                name = "message"
                async for line in response.aiter_lines():
                    field, _, value = line.partition(": ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        yield name, json.loads(value)
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error

    async def close(self) -> None:
        """Drop the connections."""
        await self._http.aclose()

    async def _request(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        try:
            response = await self._http.request(method, path, json=body, timeout=_api.timeout(timeout))
        except httpx.TimeoutException as error:
            raise _api.too_slow(method, path, timeout) from error
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error
        return _api.read(response)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class SyncKeeperClient:
    """`KeeperClient` for code without a loop: the CLI, the magic."""

    def __init__(self, paths: Paths) -> None:
        """Prefer `connect`, which makes sure that somebody answers."""
        self.paths = paths
        transport = UnixTransport(str(paths.keeper_socket))
        self._http = httpx.Client(transport=transport, base_url=_api.BASE_URL, timeout=_api.TIMEOUT, trust_env=False)

    @classmethod
    def connect(cls, *, paths: Paths | None = None, start: bool = True) -> Self:
        """Find the keeper, or start it; raises as `KeeperClient.connect`."""
        paths = paths or Paths.default()
        if not start and not is_listening(paths):
            raise _no_keeper()
        for attempt in range(CONNECT_ATTEMPTS):
            if start:
                ensure_keeper(paths)
            client = cls(paths)
            try:
                client.get("/status", timeout=_api.CONNECT_TIMEOUT_S)
            except BaseException as error:
                client.close()
                going = isinstance(error, TransportError)  # it was just going away
                if not going or attempt == CONNECT_ATTEMPTS - 1:
                    raise
            else:
                return client
        raise _no_keeper()

    def get(self, path: str, *, timeout: float | None = _api.READ_TIMEOUT_S) -> Any:
        """GET; raises as `KeeperClient.get`."""
        return self._request("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, *, timeout: float | None = _api.READ_TIMEOUT_S) -> Any:
        """POST a JSON body."""
        return self._request("POST", path, {} if body is None else body, timeout)

    def delete(self, path: str, *, timeout: float | None = _api.READ_TIMEOUT_S) -> Any:
        """DELETE."""
        return self._request("DELETE", path, None, timeout)

    def download(self, path: str) -> Iterator[bytes]:
        """GET what is not JSON, piece by piece, each within the usual time; raises as `get`."""
        try:
            with self._http.stream("GET", path) as response:
                if not response.is_success:
                    raise _api.failure(response.status_code, response.read())
                yield from response.iter_raw()
        except httpx.TimeoutException as error:
            raise _api.too_slow("GET", path, _api.READ_TIMEOUT_S) from error
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error

    def upload(self, path: str, pieces: Iterable[bytes]) -> Any:
        """POST what is not JSON, and wait for the answer as long as it takes; raises as `get`."""
        try:
            response = self._http.post(path, content=pieces, timeout=_api.timeout(None))
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error
        return _api.read(response)

    def lines(self, path: str, body: Any) -> Generator[dict[str, Any]]:
        """POST a JSON body; the answer is JSON line by line, each as it comes. Raises as `KeeperClient.get`."""
        try:
            with self._http.stream("POST", path, json=body, timeout=_api.timeout(None)) as response:
                if not response.is_success:
                    raise _api.failure(response.status_code, response.read())
                for line in response.iter_lines():
                    yield json.loads(line)
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error

    def close(self) -> None:
        """Drop the connections."""
        self._http.close()

    def _request(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        try:
            response = self._http.request(method, path, json=body, timeout=_api.timeout(timeout))
        except httpx.TimeoutException as error:
            raise _api.too_slow(method, path, timeout) from error
        except httpx.TransportError as error:
            raise _api.unreachable(error) from error
        return _api.read(response)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
