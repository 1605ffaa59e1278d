"""A proxy as the keeper has it, with real connections on loopback: names of `.test` are looked up in a table."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trustme

from warmcell.sandbox.models import NetworkPolicy
from warmcell.sandbox.network.egress import Door, Egress, EgressBounds
from warmcell.sandbox.network.exchange import Exchange
from warmcell.sandbox.network.index import Index
from warmcell.sandbox.network.streams import Plain, Tally
from warmcell.sandbox.wire import Secret

PATIENCE_S = 60.0
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Names:
    """Looks up names in a table, and counts."""

    def __init__(self, **addresses: Sequence[str]) -> None:
        self.addresses: dict[str, list[Sequence[str]]] = {}
        self.asked: list[str] = []
        for name, found in addresses.items():
            self.addresses[name.replace("_", ".")] = [found]

    async def __call__(self, name: str) -> Sequence[str]:
        """The addresses of a name: of several answers the next one, the last for ever."""
        self.asked.append(name)
        answers = self.addresses.get(name, [()])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@dataclass
class Host:
    """A server on loopback that answers as it was told, and what it has heard."""

    answer: bytes | Answer = OK
    heard: list[bytes] = field(default_factory=list)
    port: int = 0
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if isinstance(self.answer, bytes):
                self.heard.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(self.answer)
                await writer.drain()
            else:
                await self.answer(reader, writer)
        writer.close()


@contextlib.asynccontextmanager
async def running(host: Host, tls: ssl.SSLContext | None = None) -> AsyncIterator[Host]:
    """The server, as long as that takes."""
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=tls)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()
        await server.wait_closed()


@dataclass
class Proxy:
    """One sandbox's, with its door."""

    door: Door
    port: int
    names: Names
    authority: Any

    @property
    def tally(self) -> Tally:
        return self.door.tally

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with it, as a program in the sandbox has one."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes, *, end: bool = False) -> bytes:
        """All that it answers to these bytes until it hangs up."""
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await self.open()
            with contextlib.suppress(ConnectionError):
                writer.write(request)
                if end:
                    writer.write_eof()
                await writer.drain()
            try:
                return await reader.read()
            except ConnectionError:
                return b""
            finally:
                writer.close()

    async def get(self, url: str) -> bytes:
        """What it answers to a GET."""
        return await self.ask(f"GET {url} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())

    async def tunnel(self, place: str) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        """The head of what it answers to CONNECT, and the connection."""
        reader, writer = await self.open()
        writer.write(f"CONNECT {place} HTTP/1.1\r\nhost: {place}\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            return await reader.readuntil(b"\r\n\r\n"), reader, writer

    async def tls(self, place: str, name: str, trust: ssl.SSLContext) -> tuple[Any, Any]:
        """TLS within a tunnel, begun for that name."""
        head, reader, writer = await self.tunnel(place)
        assert head.startswith(b"HTTP/1.1 200"), head
        async with asyncio.timeout(PATIENCE_S):
            await writer.start_tls(trust, server_hostname=name)
        return reader, writer


@contextlib.asynccontextmanager
async def proxy(
    names: Names,
    *,
    own: Sequence[str] = (),
    authority: trustme.CA | None = None,
    headers: Mapping[str, Mapping[str, str]] | None = None,
    **policy: Any,
) -> AsyncIterator[Proxy]:
    """A sandbox's proxy.

    Args:
        names: What it takes names for.
        own: Hosts of the operator's own, which may be on loopback.
        authority: Whom it trusts.
        headers: What it adds, by host.
        policy: The rest of the policy.
    """
    trust = None
    if authority is not None:
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
    index = Index(urls=("https://index.test/simple",), hosts=tuple(own), private=True)
    egress = Egress(EgressBounds(index=index), resolver=names, tls=trust)
    secret = {host: {name: Secret(value) for name, value in each.items()} for host, each in (headers or {}).items()}
    asked = NetworkPolicy(packages=bool(own), headers=secret, **policy)
    door = egress.door("box", egress.check(asked, principal=None), Tally())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await Exchange(door, Plain(reader, writer)).serve()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2**16)
    try:
        yield Proxy(door, server.sockets[0].getsockname()[1], names, door.authority)
    finally:
        server.close()
        await server.wait_closed()
