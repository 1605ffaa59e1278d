"""From a host's name to a connection: names are looked up once, and what was checked is what is connected to."""

import asyncio
import functools
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from warmcell.sandbox.models import NetworkPolicy
from warmcell.sandbox.network import addresses, socks
from warmcell.sandbox.network.addresses import Address
from warmcell.sandbox.network.names import AskedServers
from warmcell.sandbox.network.rules import Rules
from warmcell.sandbox.network.socks import SocksError, Through

LOOKUP_S: Final = 10.0
CONNECT_S: Final = 15.0
TRIED_MAX: Final = 4
"""Addresses of one host that are tried."""
LOOKUPS_MAX: Final = 32
"""At a time, of all sandboxes: each has a thread, whose time is the name server's."""
BUFFER_BYTES: Final = 64 * 1024


class Refused(Exception):
    """A request that the proxy answers itself."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


class Resolver(Protocol):
    """Looks up names."""

    async def __call__(self, name: str) -> Sequence[str]:
        """The addresses of a name, best first; none where there is no such name."""


class SystemResolver:
    """As every program of the host looks up names."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS_MAX, "lookup")  # Those of the loop are for the keeper's own work.

    async def __call__(self, name: str) -> Sequence[str]:
        look = functools.partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, look)
        except (socket.gaierror, UnicodeError):
            return ()
        return tuple(dict.fromkeys(str(each[4][0]) for each in found))


class Connector:
    """Connects to hosts, for all sandboxes whose policies say nothing else of how."""

    def __init__(
        self,
        resolver: Resolver,
        *,
        asked: Resolver | None = None,
        own: frozenset[str] = frozenset(),
        private: frozenset[tuple[str, int]] = frozenset(),
        through: Through | None = None,
    ) -> None:
        """Connect nowhere yet.

        Args:
            resolver: Looks up names as the host does.
            asked: Looks up those that are not the operator's own. None: the host's resolver does.
            own: Names of the operator's own. Nobody else says where they lead: a host with a private address, or a
                password, is trusted by its name.
            private: Hosts and ports of the operator's own that may have private addresses.
            through: A proxy through which all others are connected to.
        """
        self._resolver = resolver
        self._asked = asked or resolver
        self._own = own
        self._private = private
        self._through = through

    def of(self, policy: NetworkPolicy) -> "Connector":
        """One that asks the name servers of a policy and goes through its proxy; raises InvalidRequestError."""
        if not policy.name_servers and policy.through is None:
            return self
        asked = AskedServers(policy.name_servers) if policy.name_servers else None
        through = None if policy.through is None else Through.read(policy.through)
        return Connector(self._resolver, asked=asked, own=self._own, private=self._private, through=through)

    async def connect(
        self,
        host: str | Address,
        port: int,
        rules: Rules,
        lookups: asyncio.Semaphore,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to a host that the rules allow.

        Args:
            host: As in the request.
            port: Of it.
            rules: What the sandbox may.
            lookups: Held while a name is looked up, so that one sandbox leaves room for others.
            tls: Speak TLS as that says, with whoever proves to be that host.

        Raises:
            Refused: None of its addresses may be connected to, or can be.
        """
        private = (str(host), port) in self._private
        allowed = await self._allowed("the host", host, lookups, lambda one: rules.address_why_not(one, port), private)
        if self._through is not None and not private:
            first = min(allowed, key=lambda one: one.version)  # Not every proxy has IPv6.
            return await self._connect_through(self._through, first, port, lookups, tls=tls, name=str(host))
        problem = "no answer"
        try:
            async with asyncio.timeout(CONNECT_S):
                for address in allowed[:TRIED_MAX]:
                    try:
                        return await self._open(address, port, private=private, tls=tls, name=str(host))
                    except ssl.SSLCertVerificationError as error:
                        problem = _untrusted(error)
                    except OSError as error:
                        problem = _problem(error)
        except TimeoutError:
            pass
        raise Refused(502, f"the host cannot be connected to: {problem}")

    async def _connect_through(
        self,
        through: Through,
        address: Address,
        port: int,
        lookups: asyncio.Semaphore,
        *,
        tls: ssl.SSLContext | None,
        name: str,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The proxy gets the address that was checked: by a name it could be led to its own network's hosts.

        Raises:
            Refused: It does not connect.
        """
        if not through.known:
            raise Refused(403, "the egress proxy's password is not known any more: set the network again")
        private = (str(through.host), through.port) in self._private
        found = await self._allowed("the egress proxy", through.host, lookups, lambda one: None, private)
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await self._open(
                    found[0], through.port, private=private, tls=through.tls, name=through.server_name
                )
                await socks.connect(reader, writer, through, address, port)
                if tls is not None:
                    await writer.start_tls(tls, server_hostname=name)
                connected, writer = writer, None
                return reader, connected
        except SocksError as error:
            raise Refused(502, f"the egress proxy {error}") from None
        except ssl.SSLCertVerificationError as error:
            who = "the egress proxy" if writer is None else "the host"
            raise Refused(502, f"{who} cannot be connected to: {_untrusted(error)}") from None
        except (OSError, TimeoutError) as error:
            raise Refused(502, f"the egress proxy cannot be connected to: {_problem(error)}") from None
        finally:
            if writer is not None:
                writer.close()

    async def _allowed(
        self,
        who: str,
        host: str | Address,
        lookups: asyncio.Semaphore,
        why_not: Callable[[Address], str | None],
        private: bool,
    ) -> list[Address]:
        """The addresses of a host that may be connected to; raises Refused where there are none."""
        found = await self._addresses(host, lookups)
        refusal = "no address"
        allowed: list[Address] = []
        for address in found:
            why = addresses.why_not(address, private=private) or why_not(address)
            if why is None:
                allowed.append(address)
            else:
                refusal = why
        if not allowed:
            raise Refused(403 if found else 502, f"{who} has {refusal}")
        return allowed

    async def _addresses(self, host: str | Address, lookups: asyncio.Semaphore) -> list[Address]:
        if not isinstance(host, str):
            return [host]
        try:
            async with asyncio.timeout(LOOKUP_S), lookups:
                texts = await (self._resolver if host in self._own else self._asked)(host)
        except TimeoutError:
            raise Refused(504, "the host's address was not found in time") from None
        found = []
        for text in texts:
            try:
                found.append(ipaddress.ip_address(text))
            except ValueError:
                continue
        return found

    @staticmethod
    async def _open(
        address: Address, port: int, *, private: bool, tls: ssl.SSLContext | None, name: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(
            str(address), port, limit=BUFFER_BYTES, ssl=tls, server_hostname=None if tls is None else name
        )
        here, there = writer.get_extra_info("sockname"), writer.get_extra_info("peername")
        if not private and here and there and here[0] == there[0]:  # By a public address of its own.
            writer.close()
            raise Refused(403, "the host is this machine")
        return reader, writer


def _untrusted(error: ssl.SSLCertVerificationError) -> str:
    return f"its certificate is not to be trusted: {error.verify_message}"


def _problem(error: OSError) -> str:
    if isinstance(error, TimeoutError) and not error.errno:
        return "no answer"
    return os.strerror(error.errno) if error.errno else type(error).__name__
