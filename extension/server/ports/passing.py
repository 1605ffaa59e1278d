"""One request to a web port of a sandbox and its answer, or a WebSocket: through the keeper and the guest channel."""

import asyncio
import contextlib
import dataclasses
import functools
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol

import httpcore
from tornado import httputil
from tornado.iostream import IOStream, StreamClosedError

from warmcell.extension.keeper.agents.urls_api import HOST_HEADER, PIECE_BYTES, PROTOCOL, TLS_HEADER
from warmcell.extension.server.e2b.body import Body
from warmcell.extension.server.keeper_link import KeeperLink
from warmcell.extension.server.ports.headers import Place, bare_query, from_port, to_port
from warmcell.sandbox.client import _api
from warmcell.sandbox.errors import NotFoundError, TransportError

STATUS_SWITCHING = 101
HANDSHAKE_S = 30.0


class Asked(Protocol):
    """A handler's request whose body still comes."""

    request: httputil.HTTPServerRequest
    body_stream: Body

    @property
    def link(self) -> KeeperLink: ...
    def add_header(self, name: str, value: str) -> None: ...
    def set_status(self, status_code: int, reason: str | None = None) -> None: ...
    def write(self, chunk: bytes) -> None: ...
    def flush(self) -> "asyncio.Future[None]": ...
    def detach(self) -> IOStream: ...
    def finish_plainly(self) -> None: ...
    def forget_headers(self) -> None: ...


class PortClosedError(NotFoundError):
    """Nothing listens on that port of a sandbox."""

    code = "port_closed"


async def pass_on(
    asked: Asked, place: Place, sandbox_id: str, target: str, *, proof: Mapping[str, str], secrets: tuple[str, ...] = ()
) -> None:
    """Send a request to the port and its answer back, piece by piece.

    Args:
        asked: The request.
        place: Where the browser sees the port.
        sandbox_id: Whose port it is.
        target: Path and query as what listens there is to see them.
        proof: Headers that tell the keeper who asks.
        secrets: Values of credentials that a query may have by mistake.

    Raises:
        PortClosedError: Nothing listens there.
        TransportError: What listens there broke off before it had answered.
        WarmcellError: As the keeper says: there is no such sandbox, or whoever asks may not.
    """
    path = f"/sandboxes/{sandbox_id}/ports/{place.port}/tunnel"
    headers = {**proof, "Connection": "Upgrade", "Upgrade": PROTOCOL}
    async with asked.link.stream("GET", path, headers=headers, timeout=None, checked=False) as response:
        if response.status_code != STATUS_SWITCHING:
            error = _api.failure(response.status_code, await response.aread())
            if type(error) is NotFoundError:
                raise PortClosedError(
                    f"The port is not open: nothing listens on {place.port} of sandbox {sandbox_id}",
                    hint="Start the server in the sandbox, on 127.0.0.1 or 0.0.0.0, and load the page again.",
                )
            raise error
        stream: httpcore.AsyncNetworkStream = response.extensions["network_stream"]
        seen_as, tls = response.headers.get(HOST_HEADER, ""), TLS_HEADER in response.headers
        place = dataclasses.replace(place, seen_as=seen_as, tls=tls)
        with breaking_off(place, sandbox_id):
            if tls:
                stream = await stream.start_tls(_anybody(), server_hostname="localhost", timeout=HANDSHAKE_S)
            await _exchange(asked, place, _bare(target, secrets), stream)


@contextlib.contextmanager
def breaking_off(place: Place, sandbox_id: str) -> Iterator[None]:
    """Around what is said by a port; raises TransportError where that is no answer."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
        raise TransportError(
            f"What listens on port {place.port} of sandbox {sandbox_id} does not speak "
            f"{'TLS' if place.tls else 'HTTP'}, or has broken off",
            hint="Look at what it says: it may have ended.",
        ) from error


@functools.cache
def _anybody() -> ssl.SSLContext:
    """For a port of a sandbox: its certificate is of its own making, and the way there is the guest's channel."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def _exchange(asked: Asked, place: Place, target: str, stream: httpcore.AsyncNetworkStream) -> None:
    headers = asked.request.headers
    websocket = headers.get("Upgrade", "").lower() == "websocket"
    sends = "Content-Length" in headers or "Transfer-Encoding" in headers
    passed = to_port(list(headers.get_all()), place, websocket=websocket)
    if sends and "Content-Length" not in headers:
        passed.append((b"Transfer-Encoding", b"chunked"))
    request = httpcore.Request(
        method=str(asked.request.method).encode("latin-1"),
        url=httpcore.URL(
            scheme=b"https" if place.tls else b"http",
            host=b"localhost",
            port=place.port,
            target=target.encode("latin-1"),
        ),
        headers=passed,
        content=asked.body_stream.pieces() if sends else b"",
    )
    connection = httpcore.AsyncHTTP11Connection(origin=request.url.origin, stream=stream)
    answer = await connection.handle_async_request(request)
    try:
        if not sends:  # tornado ends a connection on which it answers before it has seen the request's end
            await asked.body_stream.drain()
        if answer.status == STATUS_SWITCHING:
            opened = answer.extensions["network_stream"]
            await _join(asked.detach(), answer.headers, opened)
            return
        asked.forget_headers()
        asked.set_status(answer.status, answer.extensions.get("reason_phrase", b"").decode("latin-1") or "Unknown")
        for name, value in from_port(answer.headers, place):
            asked.add_header(name, value)
        body: AsyncIterator[bytes] = answer.aiter_stream()
        await asked.flush()
        async for piece in body:
            asked.write(piece)
            await asked.flush()
        asked.finish_plainly()
    finally:
        await answer.aclose()


async def _join(client: IOStream, headers: list[tuple[bytes, bytes]], port: Any) -> None:
    """A WebSocket is bytes from here on, either way, until one end is closed."""
    kept = [(name, value) for name, value in headers if name.lower().startswith(b"sec-websocket-")]
    lines = [b"HTTP/1.1 101 Switching Protocols", b"Connection: Upgrade", b"Upgrade: websocket"]
    lines += [name + b": " + value for name, value in kept]

    async def there() -> None:
        while True:
            await port.write(await client.read_bytes(PIECE_BYTES, partial=True))

    async def back() -> None:
        while piece := await port.read(PIECE_BYTES):
            await client.write(piece)

    ways: list[asyncio.Task[None]] = []
    try:
        client.set_nodelay(True)
        await client.write(b"\r\n".join(lines) + b"\r\n\r\n")
        ways = [asyncio.create_task(there()), asyncio.create_task(back())]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    except StreamClosedError:
        return
    finally:
        for way in ways:
            way.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*ways, return_exceptions=True)
        client.close()


def _bare(target: str, secrets: tuple[str, ...]) -> str:
    path, mark, query = target.partition("?")
    kept = bare_query(query, *secrets)
    return f"{path}?{kept}" if mark and kept else path
