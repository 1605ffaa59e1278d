"""HTTP as the proxy reads and writes it: targets, headers, events of h11 over streams."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import h11

from warmcell.sandbox.network.addresses import Address
from warmcell.sandbox.network.connecting import Refused
from warmcell.sandbox.network.rules import HOPS, read_host
from warmcell.sandbox.network.streams import Stream
from warmcell.sandbox.wire import Secret

HEAD_MAX: Final = 64 * 1024
"""Bytes of a request's or an answer's head."""
HEAD_S: Final = 60.0
"""Until a request's head has come, from the connection or the end of the request before."""
DRAINED_MAX, DRAINED_S = 2**20, 5.0
"""Of a refused request's body so much is taken, so that its sender comes to read the refusal."""

_ABSOLUTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(/[^#]*|\?[^#]*|)")

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is for."""

    host: str | Address
    port: int
    path: str
    """With its query, which may hold secrets, so only `shown` is written down."""
    tls: bool = False

    @property
    def shown(self) -> str:
        """The path without its query."""
        return self.path.partition("?")[0][:1024]

    @property
    def authority(self) -> str:
        """As a Host header has it."""
        host = str(self.host) if isinstance(self.host, str) or self.host.version == 4 else f"[{self.host}]"
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


def read_authority(text: str, port: int | None) -> tuple[str | Address, int]:
    """Host and port of "host:port"; `port` where none is named.

    Raises:
        Refused: It is none.
    """
    host, colon, digits = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, digits = text, ""
    try:
        if digits:
            if not re.fullmatch(r"[0-9]{1,5}", digits) or not 0 < int(digits) < 65536:
                raise ValueError
            port = int(digits)
        if port is None or (":" in host and not host.startswith("[")):
            raise ValueError
        return read_host(host), port
    except ValueError:
        raise Refused(400, "the target is no host and port") from None


def read_target(request: h11.Request) -> Target:
    """Of a request to a proxy.

    Raises:
        Refused: It is for nobody whom a proxy asks.
    """
    text = request.target.decode("latin-1")
    found = _ABSOLUTE.fullmatch(text)
    if found is None:
        raise Refused(400, "this is a proxy: the target must be a whole URL")
    scheme, authority, path = found[1].lower(), found[2], found[3]
    if scheme != "http":
        raise Refused(400, f"{scheme[:20]} goes through a proxy by CONNECT")
    if "@" in authority:
        raise Refused(400, "a user's name is no part of a target")
    host, port = read_authority(authority, 80)
    return Target(host, port, path if path.startswith("/") else f"/{path}")


def read_inner_target(request: h11.Request, host: str, port: int) -> Target:
    """Of a request within TLS, which must be for the host that TLS was begun with.

    Raises:
        Refused: It is for another.
    """
    path = request.target.decode("latin-1")
    if not path.startswith("/") and path != "*":
        raise Refused(400, "the target must be a path")
    named = [value.decode("latin-1") for name, value in request.headers if name == b"host"]
    if len(named) != 1 or read_authority(named[0], 443) != (host, port):
        raise Refused(421, "the request is for another host than the connection")
    return Target(host, port, path, tls=True)


def request_headers(request: h11.Request, target: Target, added: Mapping[str, Secret]) -> list[Header]:
    """Those that go on, with what is added in the place of what the sandbox says under the same names."""
    chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
    names = {name.encode() for name in added} | {b"host"} | ({b"content-length"} if chunked else set())
    kept = [(name, value) for name, value in _ends_here(request.headers) if name not in names]
    framing = [(b"transfer-encoding", b"chunked")] if chunked else []
    secrets = [(name.encode(), value.encode()) for name, value in added.items()]
    return [(b"host", target.authority.encode()), *kept, *framing, *secrets, (b"connection", b"close")]


def response_headers(response: "h11.Response | h11.InformationalResponse") -> list[Header]:
    """Those that go back; how the body is framed is h11's to say."""
    chunked = any(name == b"transfer-encoding" for name, _ in response.headers)
    return [each for each in _ends_here(response.headers) if not (chunked and each[0] == b"content-length")]


def _ends_here(headers: "h11._headers.Headers") -> list[Header]:
    """Without those that are for the next neighbour alone."""
    named = {one.strip().lower() for name, value in headers if name == b"connection" for one in value.split(b",")} - {
        b"host",
        b"content-length",
    }
    return [
        (name, value)
        for name, value in headers
        if name not in named and name.decode() not in HOPS and not name.startswith(b"proxy-")
    ]


class Peer:
    """One side of an HTTP conversation, over a stream."""

    def __init__(self, role: "type[h11.SERVER] | type[h11.CLIENT]", stream: Stream) -> None:
        self.http = h11.Connection(role, max_incomplete_event_size=HEAD_MAX)
        self._stream = stream
        self._method = b""

    async def next(self) -> "h11.Event | type[h11.PAUSED]":
        """The next event; raises h11.RemoteProtocolError and ConnectionError."""
        while True:
            event = self.http.next_event()
            if isinstance(event, h11.Request):
                self._method = event.method
            if event is h11.PAUSED or isinstance(event, h11.Event):
                return event
            self.http.receive_data(await self._stream.read())

    async def send(self, event: h11.Event) -> None:
        """Raises ConnectionError."""
        data = self.http.send(event)
        if data:
            await self._stream.write(data)

    async def refuse(self, status: int, why: str) -> None:
        """Answer a request ourselves, if it is not answered yet, and take what still comes of it."""
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        text = f"The sandbox's proxy: {why}.\n".encode()
        headers = [
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(text))),
            ("warmcell-refused", why),
            ("connection", "close"),
        ]
        # Of an answer to CONNECT programs show the first line alone.
        await self.send(h11.Response(status_code=status, headers=headers, reason=why.encode()))
        if self._method != b"HEAD":
            await self.send(h11.Data(data=text))
        await self.send(h11.EndOfMessage())
        await self._stream.end()
        try:
            async with asyncio.timeout(DRAINED_S):
                taken = 0
                while taken < DRAINED_MAX and (data := await self._stream.read()):
                    taken += len(data)
        except (TimeoutError, ConnectionError):
            pass
