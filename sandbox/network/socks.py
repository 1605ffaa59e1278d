"""Connections through somebody's SOCKS5 proxy: RFC 1928, and 1929 for who has a password."""

import asyncio
import ipaddress
import ssl
from dataclasses import dataclass
from typing import Final, Self

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import EgressProxy
from warmcell.sandbox.network import addresses
from warmcell.sandbox.network.addresses import Address
from warmcell.sandbox.network.rules import Pattern, read_host
from warmcell.sandbox.wire import HIDDEN

WORD_MAX: Final = 255
"""Bytes of a name or a password."""
CERTIFICATES_MAX: Final = 8192

_VERSION, _OF_PASSWORDS = 5, 1
_OPEN, _WITH_PASSWORD = 0, 2
_CONNECT = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4
_WHY: Final = {
    1: "failed",
    2: "does not allow it",
    3: "cannot reach the network",
    4: "cannot reach the host",
    5: "was refused by the host",
    6: "gave up",
}


class SocksError(Exception):
    """The proxy does not connect, in words that go after "the egress proxy"."""


@dataclass(frozen=True, slots=True)
class Through:
    """Such a proxy, read."""

    host: str | Address
    port: int
    username: bytes
    password: bytes
    known: bool
    """Whether its password is there, and does not merely stand for what was."""
    tls: ssl.SSLContext | None
    server_name: str

    @classmethod
    def read(cls, proxy: EgressProxy) -> Self:
        """What a policy says of it.

        Raises:
            InvalidRequestError: It is not of its form.
        """
        place = pattern(proxy)
        username, password = _word(proxy.username), _word(proxy.password or "")
        if password and not username:
            raise InvalidRequestError("The egress proxy has a password without a name", hint="Give a username, too.")
        host: str | Address = place.name or ipaddress.ip_address(place.host)
        if not isinstance(host, str) and (why := addresses.why_not(host)) is not None:
            raise InvalidRequestError(f"The egress proxy has {why}", hint="Name one of the public internet.")
        assert place.port is not None
        name = _host(proxy.server_name) if proxy.server_name else str(host)
        return cls(host, place.port, username, password, proxy.password != HIDDEN, _context(proxy), name)


def pattern(proxy: EgressProxy) -> Pattern:
    """Its place, as policies name places; raises InvalidRequestError."""
    found = Pattern.read(proxy.address)
    if not found.host or found.port is None:
        raise InvalidRequestError(
            f"{proxy.address[:80]!r} is no address of a proxy", hint="Write it as proxy.example.com:1080."
        )
    return found


def _word(text: str) -> bytes:
    try:
        word = text.encode()
    except UnicodeEncodeError:
        word = bytes(WORD_MAX + 1)
    if len(word) > WORD_MAX:
        raise InvalidRequestError(
            "The egress proxy's name or password cannot be one", hint=f"{WORD_MAX} bytes of UTF-8 each at most."
        )
    return word


def _host(name: str) -> str:
    try:
        return str(read_host(name))
    except ValueError:
        raise InvalidRequestError(
            f"{name[:80]!r} is no name of a server", hint="Write it as its certificate has it: proxy.example.com."
        ) from None


async def connect(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, through: Through, address: Address, port: int
) -> None:
    """Have the proxy at the other end connect to an address.

    Raises:
        SocksError: It does not.
    """
    try:
        await _greet(reader, writer, through)
        kind = _IPV4 if address.version == 4 else _IPV6
        writer.write(bytes((_VERSION, _CONNECT, 0, kind)) + address.packed + port.to_bytes(2, "big"))
        version, code, _, kind = await reader.readexactly(4)
        if version != _VERSION:
            raise SocksError("does not speak SOCKS5")
        if code:
            raise SocksError(_WHY.get(code, f"answers with error {code}"))
        size = {_IPV4: 4, _IPV6: 16}.get(kind) or (await reader.readexactly(1))[0]
        await reader.readexactly(size + 2)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise SocksError("has hung up") from None


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, through: Through) -> None:
    ways = bytes((_OPEN, _WITH_PASSWORD)) if through.username else bytes((_OPEN,))
    writer.write(bytes((_VERSION, len(ways))) + ways)
    version, way = await reader.readexactly(2)
    if version != _VERSION:
        raise SocksError("does not speak SOCKS5")
    if way == _WITH_PASSWORD and through.username:
        words = b"".join(bytes((len(word),)) + word for word in (through.username, through.password))
        writer.write(bytes((_OF_PASSWORDS,)) + words)
        _, refused = await reader.readexactly(2)
        if refused:
            raise SocksError("refuses the name and password")
    elif way != _OPEN:
        raise SocksError("wants a name and password")


def _context(proxy: EgressProxy) -> ssl.SSLContext | None:
    if not proxy.tls:
        if proxy.server_name or proxy.certificates:
            raise InvalidRequestError(
                "The egress proxy has a name or certificates for TLS and is spoken to without", hint="Set tls, too."
            )
        return None
    if len(proxy.certificates) > CERTIFICATES_MAX:
        raise InvalidRequestError(
            "The egress proxy's certificates are too long", hint=f"Give {CERTIFICATES_MAX} bytes at most."
        )
    try:
        return ssl.create_default_context(cadata=proxy.certificates or None)
    except (ssl.SSLError, ValueError):
        raise InvalidRequestError(
            "The egress proxy's certificates cannot be read", hint="Give certificates in PEM."
        ) from None
