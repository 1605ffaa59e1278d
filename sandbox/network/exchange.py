"""One connection of a sandbox with its proxy: request after request, each held against the rules anew."""

import asyncio
import contextlib
import ssl
from typing import TYPE_CHECKING, Final, Protocol

import h11

from warmcell.sandbox.network import rules as rules_of
from warmcell.sandbox.network.addresses import Address
from warmcell.sandbox.network.connecting import Connector, Refused
from warmcell.sandbox.network.hello import NotTls, server_name
from warmcell.sandbox.network.http import (
    HEAD_S,
    Peer,
    Target,
    read_authority,
    read_inner_target,
    read_target,
    request_headers,
    response_headers,
)
from warmcell.sandbox.network.rules import USUAL_PORTS, Rules
from warmcell.sandbox.network.streams import Counted, Plain, Stream, Tally, Tls, join

if TYPE_CHECKING:
    from warmcell.sandbox.network.authority import Authority

IDLE_S: Final = 900.0
"""In which nothing moves, after which a connection is over. Answers of large models take minutes."""

BROKEN = (ConnectionError, TimeoutError, h11.ProtocolError, ssl.SSLError)
"""What ends a connection without a word: one of its sides has gone, or speaks nonsense in the middle of it."""


class Door(Protocol):
    """The sandbox's, as an exchange sees it."""

    rules: Rules
    tally: Tally
    connector: Connector
    lookups: asyncio.Semaphore
    """Held for each name that is looked up."""
    authority: "Authority | None"

    @property
    def tls(self) -> ssl.SSLContext:
        """To speak with hosts whose requests are read."""

    @property
    def max_bytes(self) -> int | None: ...

    def note(self, method: str, host: str, port: int, path: str, refused: str | None) -> None:
        """Count a decision and write it down."""


class Exchange:
    """Of one connection."""

    def __init__(self, door: Door, stream: Stream) -> None:
        self._door = door
        self._stream = stream

    async def serve(self) -> None:
        """To its end, however that comes."""
        with contextlib.suppress(*BROKEN, Refused):
            await self._requests(self._stream, None)

    async def _requests(self, stream: Stream, within: tuple[str, int] | None) -> None:
        """Requests over a stream, one after another; `within`: those of TLS that was begun for that host."""
        peer = Peer(h11.SERVER, stream)
        while True:
            try:
                async with asyncio.timeout(HEAD_S):
                    request = await peer.next()
            except h11.RemoteProtocolError as error:
                await peer.refuse(error.error_status_hint, "the request is not HTTP")
                return
            if not isinstance(request, h11.Request):
                return
            method, host, port, path = request.method.decode(), "", 0, ""
            try:
                if request.method == b"CONNECT" and within is None:
                    found, port = read_authority(request.target.decode("latin-1"), None)
                    host = str(found)
                    await self._connect(peer, found, port)
                    return
                target = read_target(request) if within is None else read_inner_target(request, *within)
                host, port, path = str(target.host), target.port, target.shown
                await self._forward(peer, request, target)
            except Refused as refused:
                self._door.note(method, host, port, path, refused.why)
                await peer.refuse(refused.status, refused.why)
                return
            if peer.http.our_state is not h11.DONE or peer.http.their_state is not h11.DONE:
                return
            peer.http.start_next_cycle()

    def _check(self, host: str | Address, port: int) -> None:
        why = self._door.rules.why_not(host, port)
        if why is not None:
            raise Refused(403, why)
        most = self._door.max_bytes
        if most is not None and self._door.tally.bytes >= most:
            raise Refused(403, "the sandbox has used up its bytes")

    # Requests that are read

    async def _forward(self, peer: Peer, request: h11.Request, target: Target) -> None:
        door = self._door
        self._check(target.host, target.port)
        added = door.rules.headers(target.host, target.port) or {}
        if added and not target.tls:
            raise Refused(403, "headers are added to https alone")
        if not rules_of.known(added):
            raise Refused(403, "the headers for this host are not known any more: set them again")
        reader, writer = await door.connector.connect(
            target.host, target.port, door.rules, door.lookups, tls=door.tls if target.tls else None
        )
        try:
            door.note(request.method.decode(), str(target.host), target.port, target.shown, None)
            outside = Peer(h11.CLIENT, Counted(Plain(reader, writer), door.tally, lambda: door.max_bytes))
            headers = request_headers(request, target, added)
            async with asyncio.timeout(IDLE_S) as idle:
                await outside.send(h11.Request(method=request.method, target=target.path, headers=headers))
                await self._exchange(peer, outside, idle)
        finally:
            writer.close()

    @staticmethod
    async def _exchange(peer: Peer, outside: Peer, idle: asyncio.Timeout) -> None:
        """The request's body there and the answer back, at once: some answer before they have all of it."""
        loop = asyncio.get_running_loop()

        async def there() -> None:
            while True:
                event = await peer.next()
                idle.reschedule(loop.time() + IDLE_S)
                if isinstance(event, h11.EndOfMessage):
                    await outside.send(h11.EndOfMessage())
                    return
                if not isinstance(event, h11.Data):
                    raise ConnectionError("the sandbox has gone")
                await outside.send(event)

        sending = asyncio.ensure_future(there())
        try:
            while True:
                receiving = asyncio.ensure_future(outside.next())
                try:
                    waited = {receiving} if sending.done() else {receiving, sending}
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                    if sending.done():
                        sending.result()
                    event = await receiving
                finally:
                    receiving.cancel()
                idle.reschedule(loop.time() + IDLE_S)
                if isinstance(event, h11.InformationalResponse):
                    if event.status_code != 101:
                        await peer.send(
                            h11.InformationalResponse(status_code=event.status_code, headers=response_headers(event))
                        )
                elif isinstance(event, h11.Response):
                    await peer.send(
                        h11.Response(
                            status_code=event.status_code, headers=response_headers(event), reason=event.reason
                        )
                    )
                elif isinstance(event, h11.Data):
                    await peer.send(event)
                elif isinstance(event, h11.EndOfMessage):
                    await peer.send(h11.EndOfMessage())
                    return
                else:
                    raise ConnectionError("the host has gone")
        except h11.RemoteProtocolError:
            raise Refused(502, "the host does not speak HTTP") from None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    # Tunnels

    async def _connect(self, peer: Peer, host: str | Address, port: int) -> None:
        self._check(host, port)
        headers = self._door.rules.headers(host, port)
        if headers is not None and isinstance(host, str):
            if not rules_of.known(headers):
                raise Refused(403, "the headers for this host are not known any more: set them again")
            await self._read(peer, host, port)
            return
        reader, writer = await self._door.connector.connect(host, port, self._door.rules, self._door.lookups)
        outside = Counted(Plain(reader, writer), self._door.tally, lambda: self._door.max_bytes)
        try:
            first = await _agree(peer)
            if port in USUAL_PORTS:
                first = await self._hello(first, str(host))
                self._door.note("CONNECT", str(host), port, "", None)
                await join(self._stream, outside, first, idle_s=IDLE_S)
            else:  # Servers of other protocols may speak first.
                self._door.note("CONNECT", str(host), port, "", None)
                await join(_Named(self._stream, str(host), first), outside, b"", idle_s=IDLE_S)
        finally:
            writer.close()

    async def _read(self, peer: Peer, host: str, port: int) -> None:
        """End TLS here, for a host whose requests get headers added."""
        authority = self._door.authority
        assert authority is not None
        context = await asyncio.to_thread(authority.context, host)
        first = await self._hello(await _agree(peer), host)
        tls = Tls(self._stream, context, first)
        async with asyncio.timeout(HEAD_S):
            await tls.handshake()
        await self._requests(tls, (host, port))

    async def _hello(self, first: bytes, host: str) -> bytes:
        """All that has come up to the name that TLS is begun with, which must be the host's.

        Raises:
            Refused: It is another's, or no TLS.
        """
        async with asyncio.timeout(HEAD_S):
            while not _is_for(first, host):
                data = await self._stream.read()
                if not data:
                    raise ConnectionError("the sandbox has gone")
                first += data
        return first


class _Named:
    """What a sandbox sends to a host of whose protocol nothing is known; if it is TLS it must be for that host."""

    def __init__(self, below: Stream, host: str, first: bytes) -> None:
        self._below, self._host, self._first = below, host, first
        self._passed = False

    async def read(self) -> bytes:
        if self._passed:
            return await self._below.read()
        data, self._first = self._first or await self._below.read(), b""
        try:
            while data and not _is_for(data, self._host, only=False):
                more = await self._below.read()
                if not more:
                    break
                data += more
        finally:
            self._passed = True
        return data

    async def write(self, data: bytes) -> None:
        await self._below.write(data)

    async def end(self) -> None:
        await self._below.end()


def _is_for(first: bytes, host: str, *, only: bool = True) -> bool:
    """Whether enough has come to see that TLS is begun with that host's name.

    Raises:
        Refused: It is begun with another's; or it is no TLS, where `only` that may be.
    """
    try:
        name = server_name(first)
    except NotTls:
        if only:
            raise Refused(403, "only TLS passes on this port") from None
        return True
    if name is None:
        return False
    if name and name.removesuffix(".") != host:
        raise Refused(403, "TLS is begun for another host than the connection")
    return True


async def _agree(peer: Peer) -> bytes:
    """Answer that the tunnel is there; what has come in it already."""
    await peer.next()  # The end of the request.
    await peer.send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
    return bytes(peer.http.trailing_data[0])
