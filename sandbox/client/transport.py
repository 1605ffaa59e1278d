"""Two ways to send requests that look the same to what is built on them: with a loop, and without.

What is built on them is written once, with `async def`. Without a loop nothing in it ever waits for one: the transport
blocks instead, and `now` runs such a coroutine to its end at once.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx

from warmcell.sandbox.client import _api
from warmcell.sandbox.client._unix import UnixTransport
from warmcell.sandbox.client.start import ensure_keeper
from warmcell.sandbox.client.starting import keeper_listens
from warmcell.sandbox.errors import ConflictError, InvalidRequestError, UnsupportedOperationError
from warmcell.sandbox.paths import Paths

API = "/warmcell/api/v1"
URL_VARIABLE, TOKEN_VARIABLE = "WARMCELL_URL", "WARMCELL_TOKEN"

Done = TypeVar("Done")
Content = bytes | Callable[[], Iterator[bytes]]
"""Of a request: bytes, or what makes its pieces anew for each time that it is sent."""


@dataclass(frozen=True, slots=True)
class Where:
    """Whom to ask: the user's keeper, or a server by URL."""

    url: str | None = None
    token: str | None = None
    paths: Paths | None = None

    @classmethod
    def find(cls, url: str | None, token: str | None) -> "Where":
        """What the caller says, else the environment, else the user's keeper; raises InvalidRequestError."""
        url = url or os.environ.get(URL_VARIABLE) or None
        token = token or os.environ.get(TOKEN_VARIABLE) or None
        if url is None:
            return cls(None, None, Paths.default())
        _check(url, token)
        return cls(url, token, None)

    @property
    def who(self) -> _api.Who:
        """As errors name it."""
        return _api.KEEPER if self.url is None else _api.server(self.url)

    def base_url(self) -> str:
        """Where paths of the API begin."""
        return _api.BASE_URL if self.url is None else self.url.rstrip("/") + API

    def absolute(self, path: str, host: str | None = None) -> str:
        """A URL for browsers, from what a server calls it.

        Args:
            path: After the server's own URL, or after the host.
            host: One that is only for this, with a port if that is another than the server's.

        Raises:
            UnsupportedOperationError: The user's keeper listens on no address that a browser knows.
        """
        if self.url is None:
            raise UnsupportedOperationError(
                "URLs are of a server, and this sandbox is had without one",
                hint="Run `warmcell serve`, or JupyterLab, and give Sandbox its url and a token.",
            )
        if host is None:
            return self.url.rstrip("/") + path
        server = urlsplit(self.url)
        port = "" if ":" in host or server.port is None else f":{server.port}"
        return f"{server.scheme}://{host}{port}{path}"

    def headers(self) -> dict[str, str]:
        """Sent with each request."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


def _check(url: str, token: str | None) -> None:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:
        sound = False
    if not sound:
        raise InvalidRequestError(f"{url!r} is no URL of a server", hint='As in url="http://127.0.0.1:8890".')
    if token is not None and not (token.isascii() and token.isprintable()):
        raise InvalidRequestError("That is no token", hint="Give it as `warmcell token create` has printed it.")


class Stream(Protocol):
    """An answer that comes piece by piece."""

    status: int

    def lines(self) -> AsyncIterator[str]: ...
    def pieces(self) -> AsyncIterator[bytes]: ...
    async def read(self) -> bytes: ...


class Transport(Protocol):
    """Sends requests. What goes wrong on the way is raised as httpx has it."""

    where: Where

    async def request(self, method: str, path: str, **how: Any) -> httpx.Response: ...
    def stream(self, method: str, path: str, **how: Any) -> contextlib.AbstractAsyncContextManager[Stream]: ...
    async def ensure(self) -> None: ...
    async def sleep(self, seconds: float) -> None: ...
    async def off_loop(self, work: Callable[[], Done]) -> Done: ...
    async def close(self) -> None: ...


def now(work: Coroutine[Any, Any, Done]) -> Done:
    """Run a coroutine that never waits for a loop."""
    try:
        work.send(None)
    except StopIteration as done:
        result: Done = done.value
        return result
    work.close()
    raise RuntimeError("This needs an event loop: use AsyncSandbox")


class SyncTransport:
    """Blocks."""

    def __init__(self, where: Where) -> None:
        self.where = where
        paths = where.paths
        self._http = httpx.Client(
            transport=None if paths is None else UnixTransport(str(paths.keeper_socket)),
            base_url=where.base_url(),
            headers=where.headers(),
            timeout=_api.TIMEOUT,
            trust_env=paths is None,
        )

    async def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        """One request with its whole answer."""
        with _sendable(self._http):
            request = self._http.build_request(method, path, **_with_content(how, _pieces))
        return self._http.send(request)

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **how: Any) -> AsyncGenerator[Stream]:
        """One request whose answer comes piece by piece."""
        with _sendable(self._http):
            request = self._http.build_request(method, path, **how)
        with contextlib.closing(self._http.send(request, stream=True)) as response:
            yield _SyncStream(response)

    async def ensure(self) -> None:
        """Have somebody listen, where that is the user's own keeper."""
        if self.where.paths is not None:
            ensure_keeper(self.where.paths)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251 - nothing else could go on meanwhile.

    async def off_loop(self, work: Callable[[], Done]) -> Done:
        """Do what may take long."""
        return work()

    async def close(self) -> None:
        """Drop the connections."""
        self._http.close()


class AsyncTransport:
    """Waits in the running loop."""

    def __init__(self, where: Where) -> None:
        self.where = where
        paths = where.paths
        transport = None
        if paths is not None:
            transport = httpx.AsyncHTTPTransport(
                uds=str(paths.keeper_socket), limits=_api.LIMITS, verify=_api.no_certificates()
            )
        self._http = httpx.AsyncClient(
            transport=transport,
            base_url=where.base_url(),
            headers=where.headers(),
            timeout=_api.TIMEOUT,
            limits=httpx.Limits(max_connections=None),
            trust_env=paths is None,
        )

    async def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        """One request with its whole answer."""
        with _sendable(self._http):
            request = self._http.build_request(method, path, **_with_content(how, _async_pieces))
        return await self._http.send(request)

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **how: Any) -> AsyncGenerator[Stream]:
        """One request whose answer comes piece by piece."""
        with _sendable(self._http):
            request = self._http.build_request(method, path, **how)
        response = await self._http.send(request, stream=True)
        try:
            yield _AsyncStream(response)
        finally:
            await response.aclose()

    async def ensure(self) -> None:
        """As of `SyncTransport`."""
        if self.where.paths is not None:
            await keeper_listens(self.where.paths)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def off_loop(self, work: Callable[[], Done]) -> Done:
        """Do what may take long, in a thread."""
        return await asyncio.to_thread(work)

    async def close(self) -> None:
        """Drop the connections."""
        await self._http.aclose()


class _SyncStream:
    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code

    async def lines(self) -> AsyncIterator[str]:
        for line in self._response.iter_lines():
            yield line

    async def pieces(self) -> AsyncIterator[bytes]:
        for piece in self._response.iter_raw():
            yield piece

    async def read(self) -> bytes:
        return self._response.read()


class _AsyncStream:
    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code

    def lines(self) -> AsyncIterator[str]:
        return self._response.aiter_lines()

    def pieces(self) -> AsyncIterator[bytes]:
        return self._response.aiter_raw()

    async def read(self) -> bytes:
        return await self._response.aread()


@contextlib.contextmanager
def _sendable(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    """Around the making of a request.

    Raises:
        ConflictError: Whoever asks was closed.
        InvalidRequestError: What it is made of is no JSON, or no text.
    """
    if http.is_closed:
        raise ConflictError(
            "This object was closed, as `with` does at its end", hint="Sandbox.connect(id) finds one that still lives."
        )
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{error.object!r:.80} is no text that can be sent", hint="Give Unicode, without lone surrogates."
        ) from error
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"It cannot be asked for: {error}", hint="Numbers are finite, and what is text is given as text."
        ) from error


def _with_content(how: Mapping[str, Any], pieces: Callable[[Callable[[], Iterator[bytes]]], Any]) -> dict[str, Any]:
    content = how.get("content")
    return {**how, "content": pieces(content) if callable(content) else content}


def _pieces(make: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
    return make()


async def _async_pieces(make: Callable[[], Iterator[bytes]]) -> AsyncIterator[bytes]:
    pieces = make()
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
