"""How a sandbox's proxy reaches what it may: by name servers, and through a SOCKS5 proxy, that its policy names."""

import asyncio
import contextlib
import ipaddress
import random
import ssl
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

import pytest
import trustme

from tests.unit.sandbox.network.harness import Host, Names, proxy, running
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import EgressProxy, NetworkPolicy
from warmcell.sandbox.network import connecting, names
from warmcell.sandbox.network.egress import Egress, EgressBounds
from warmcell.sandbox.network.index import Index
from warmcell.sandbox.network.names import AskedServers, NoAnswerError
from warmcell.sandbox.wire import Secret

PUBLIC = "93.184.216.34"
PASSWORD = "hunter2-of-the-proxy"


# Names


@dataclass
class NameServer(asyncio.DatagramProtocol):
    """Answers from a table; what is `long` by a stream alone, and where it `lies` first under a wrong number."""

    table: dict[tuple[str, int], list[str]]
    long: bool = False
    lies: bool = False
    silent: int = 0
    """About this kind it says nothing."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        assert self.transport is not None
        if self.name(data)[1] == self.silent:
            return
        if self.lies:
            wrong = bytes((data[0] ^ 1,)) + data[1:]
            self.transport.sendto(self.answer(wrong, ["6.6.6.6"]), addr)
        self.transport.sendto(self.answer(data) if not self.long else data[:2] + b"\x83\x80" + data[4:], addr)
        self.asked.append((self.name(data)[0], "datagram"))

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        data = await reader.readexactly(size)
        answer = self.answer(data)
        writer.write(struct.pack("!H", len(answer)) + answer)
        self.asked.append((self.name(data)[0], "stream"))
        writer.close()

    @staticmethod
    def name(data: bytes) -> tuple[str, int]:
        labels, at = [], 12
        while data[at]:
            labels.append(data[at + 1 : at + 1 + data[at]].decode())
            at += data[at] + 1
        return ".".join(labels), struct.unpack_from("!H", data, at + 1)[0]

    def answer(self, data: bytes, found: list[str] | None = None) -> bytes:
        name, kind = self.name(data)
        known = found or self.table.get((name, kind))
        exists = any(name == each for each, _ in self.table)
        # An alias comes first, as it does where names are aliases; its data is no address.
        records = [b"\xc0\x0c" + struct.pack("!HHIH", 5, 1, 60, 4) + b"\x01a\xc0\x0c"] if known else []
        for address in known or ():
            packed = ipaddress.ip_address(address).packed
            records.append(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 60, len(packed)) + packed)
        head = data[:2] + struct.pack("!HHHHH", 0x8180 if exists else 0x8183, 1, len(records), 0, 0)
        return head + data[12:] + b"".join(records)


@contextlib.asynccontextmanager
async def serving(server: NameServer) -> AsyncIterator[int]:
    """Its port, of both kinds."""
    streams = await asyncio.start_server(server.stream, "127.0.0.1", 0)
    port = streams.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=("127.0.0.1", port))
    try:
        yield port
    finally:
        transport.close()
        streams.close()
        await streams.wait_closed()


@pytest.mark.parametrize("long", [False, True])
async def test_names_are_asked_of_the_servers_that_are_named(long: bool) -> None:
    """Addresses of both kinds, past a server that is not there and an answer under a wrong number; long ones whole."""
    server = NameServer({("a.test", names.A): ["192.0.2.1"], ("a.test", names.AAAA): ["2001:db8::1"]}, long, lies=True)
    async with serving(server) as port:
        asked = AskedServers(["127.0.0.2", "127.0.0.1"], port=port)
        assert set(await asked("a.test")) == {"192.0.2.1", "2001:db8::1"}
        assert await asked("none.test") == ()
    assert ("a.test", "stream" if long else "datagram") in server.asked
    assert await AskedServers(["127.0.0.1"], port=port)("a.test") == ()


async def test_a_server_that_says_nothing_of_one_kind_holds_nobody_up() -> None:
    """Some never answer about IPv6: what is known of the other kind is gone on with; without any it is waited for."""
    server = NameServer({("a.test", names.A): ["192.0.2.1"]}, silent=names.AAAA)
    loop = asyncio.get_running_loop()
    async with serving(server) as port:
        began = loop.time()
        assert await AskedServers(["127.0.0.1"] * 3, port=port)("a.test") == ("192.0.2.1",)
        assert loop.time() - began < names.ANSWER_S
    late = NameServer({("a.test", names.AAAA): ["2001:db8::1"]}, silent=names.A)
    async with serving(late) as port:
        assert await AskedServers(["127.0.0.1"], port=port)("a.test") == ("2001:db8::1",)


async def test_a_name_that_is_not_there_is_not_waited_for() -> None:
    """It is of no kind, whatever the server says of the other one."""
    async with serving(NameServer({("a.test", names.A): ["192.0.2.1"]}, silent=names.AAAA)) as port:
        began = asyncio.get_running_loop().time()
        assert await AskedServers(["127.0.0.1"], port=port)("none.test") == ()
        assert asyncio.get_running_loop().time() - began < names.ANSWER_S


async def test_who_has_answered_is_asked_first() -> None:
    """A server that says nothing at all is waited for once, not for each name."""
    async with serving(NameServer({})) as port:
        loop = asyncio.get_running_loop()
        mute, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.2", port))
        asked = AskedServers(["127.0.0.2", "127.0.0.1"], port=port)
        began = loop.time()
        await asked("a.test")
        first = loop.time() - began
        assert first >= names.ANSWER_S
        await asked("b.test")
        assert loop.time() - began - first < names.ANSWER_S
        mute.close()


async def test_nobody_else_says_where_the_operators_own_hosts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have private addresses and get the operator's password, so the policy's servers are not asked there."""
    theirs = Names(pypi_corp_test=["127.0.0.9"], b_test=["127.0.0.9"])
    monkeypatch.setattr(connecting, "AskedServers", lambda servers: theirs)
    host, own = Host(), Names(pypi_corp_test=["127.0.0.1"])
    async with running(host):
        index = Index(urls=(f"http://pypi.corp.test:{host.port}/simple",), private=True)
        egress = Egress(EgressBounds(principals=("*",), index=index), resolver=own)
        policy = egress.check(
            NetworkPolicy(packages=True, allow=("b.test",), name_servers=("8.8.8.8",)), principal="mallory"
        )
        connector, rules, lookups = egress.connector.of(policy), egress.rules(policy), asyncio.Semaphore(4)
        _, writer = await connector.connect("pypi.corp.test", host.port, rules, lookups)
        assert writer.get_extra_info("peername")[0] == "127.0.0.1"
        writer.close()
        await writer.wait_closed()
        with pytest.raises(connecting.Refused):
            await connector.connect("b.test", host.port, rules, lookups)
    assert (theirs.asked, own.asked) == (["b.test"], ["pypi.corp.test"])


def test_what_is_no_answer_is_refused() -> None:
    """Whatever a server says, cut short or changed anywhere, gives addresses or the one error."""
    seen = random.Random(65)
    asked = names.question("a.test", names.A)
    good = NameServer({("a.test", names.A): ["192.0.2.1"]}).answer(asked)
    assert names.addresses(good, asked) == ["192.0.2.1"]
    refused = 0
    for _ in range(10_000):
        told = bytearray(good[: seen.randrange(len(good) + 1)] if seen.random() < 0.5 else good)
        for _ in range(seen.randrange(4) if told else 0):
            told[seen.randrange(len(told))] = seen.randrange(256)
        try:
            for address in names.addresses(bytes(told), asked):
                ipaddress.ip_address(address)
        except NoAnswerError:
            refused += 1
    assert refused > 1000


# A proxy of somebody's


@dataclass
class Socks:
    """A SOCKS5 proxy that wants a name and a password; all that it connects to is one server on loopback."""

    to: Host
    password: str = PASSWORD
    code: int = 0
    asked: list[tuple[str, int]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, count = await reader.readexactly(2)
        assert 2 in await reader.readexactly(count)
        writer.write(b"\x05\x02")
        await reader.readexactly(1)
        words = [(await reader.readexactly((await reader.readexactly(1))[0])).decode() for _ in range(2)]
        right = words == ["ann", self.password]
        writer.write(bytes((1, not right)))
        if not right:
            return
        _, _, _, kind = await reader.readexactly(4)
        address = ipaddress.ip_address(await reader.readexactly(4 if kind == 1 else 16))
        (port,) = struct.unpack("!H", await reader.readexactly(2))
        self.asked.append((str(address), port))
        writer.write(bytes((5, self.code, 0, 1)) + bytes(6))
        if self.code:
            return
        other, there = await asyncio.open_connection("127.0.0.1", self.to.port)

        async def back() -> None:
            while data := await other.read(65536):
                writer.write(data)
            writer.close()

        work = asyncio.create_task(back())
        while data := await reader.read(65536):
            there.write(data)
        there.close()
        await work


def through(port: int, password: str = PASSWORD, **more: object) -> EgressProxy:
    said = {"address": f"socks.test:{port}", "username": "ann", "password": Secret(password), **more}
    return EgressProxy(**said)  # type: ignore[arg-type]


async def test_all_goes_through_the_proxy_that_is_named() -> None:
    """Requests and tunnels, by the address that was checked; what may not be reached it never hears of."""
    known = Names(a_test=[PUBLIC], inside_test=["10.0.0.1"], socks_test=["127.0.0.1"])
    async with running(Host()) as host:
        socks = Socks(host)
        async with running(Host(answer=socks.serve)) as server:
            where = {"own": [f"socks.test:{server.port}"], "allow": ("a.test", "inside.test", "a.test:22")}
            async with proxy(known, **where, through=through(server.port)) as one:  # type: ignore[arg-type]
                assert (await one.get("http://a.test/")).endswith(b"ok")
                head, _, writer = await one.tunnel("a.test:22")
                assert head.startswith(b"HTTP/1.1 200"), head
                writer.close()
                assert b"a private address" in await one.get("http://inside.test/")
                assert b"not allowed" in await one.get("http://b.test/")
            assert socks.asked == [(PUBLIC, 80), (PUBLIC, 22)]


@pytest.mark.parametrize(
    ("password", "code", "why"),
    [
        ("wrong", 0, b"refuses the name and password"),
        (PASSWORD, 2, b"does not allow it"),
        ("***", 0, b"set the network"),
    ],
)
async def test_what_the_proxy_refuses_is_told_and_goes_no_other_way(password: str, code: int, why: bytes) -> None:
    """In words without its password."""
    async with running(Host()) as host:
        socks = Socks(host, code=code)
        async with running(Host(answer=socks.serve)) as server:
            known = Names(a_test=[PUBLIC], socks_test=["127.0.0.1"])
            where = {"own": [f"socks.test:{server.port}"], "allow": ("a.test",)}
            async with proxy(known, **where, through=through(server.port, password)) as one:  # type: ignore[arg-type]
                said = await one.get("http://a.test/")
                assert why in said
                assert said.startswith(b"HTTP/1.1 403" if password == "***" else b"HTTP/1.1 502")
                assert PASSWORD.encode() not in said
        assert host.heard == []
        known = Names(a_test=[PUBLIC], socks_test=["127.0.0.1"])  # Nobody listens there now.
        async with proxy(known, **where, through=through(server.port)) as one:  # type: ignore[arg-type]
            assert b"the egress proxy cannot be connected to" in await one.get("http://a.test/")


async def test_a_proxy_with_tls_proves_itself_and_tls_goes_within() -> None:
    """To the authority that the policy names, and to no other; hosts whose requests are read have TLS of their own."""
    authority, stranger = trustme.CA(), trustme.CA()
    of_proxy, of_host = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    authority.issue_cert("socks.test").configure_cert(of_proxy)
    authority.issue_cert("a.test").configure_cert(of_host)
    known = Names(a_test=[PUBLIC], socks_test=["127.0.0.1"])
    async with running(Host(), of_host) as host:
        socks = Socks(host)
        async with running(Host(answer=socks.serve), of_proxy) as server:
            for trusted, good in ((authority, True), (stranger, False)):
                pem = trusted.cert_pem.bytes().decode()
                where = {"own": [f"socks.test:{server.port}"], "authority": authority}
                way = through(server.port, tls=True, certificates=pem)
                headers = {"a.test": {"x-secret": "told"}}
                async with proxy(known, **where, headers=headers, through=way) as one:  # type: ignore[arg-type]
                    inner = ssl.create_default_context(cadata=one.authority.pem.decode())
                    reader, writer = await one.tls("a.test:443", "a.test", inner)
                    writer.write(b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n")
                    said = await asyncio.wait_for(reader.read(), 60)
                    assert said.endswith(b"ok") == good
                    assert (b"the egress proxy cannot be connected to" in said) != good
    assert b"x-secret: told" in host.heard[0]
    assert len(host.heard) == 1


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"name_servers": ("1.1.1.1",)}, "egress_allowed"),
        ({"name_servers": ("9.9.9.9",)}, None),
        ({"name_servers": ("10.0.0.1",)}, "a private address"),
        ({"name_servers": ("169.254.169.254",)}, "not public"),
        ({"name_servers": ("dns.example.com",)}, "no name server"),
        ({"name_servers": ("9.9.9.9",) * 11}, "too many"),
        ({"through": EgressProxy(address="proxy.example.com:1080")}, None),
        ({"through": EgressProxy(address="proxy.elsewhere.test:1081")}, "egress_allowed"),
        ({"through": EgressProxy(address="elsewhere.test:1080")}, "egress_allowed"),
        ({"through": EgressProxy(address="proxy.example.com")}, "no address of a proxy"),
        ({"through": EgressProxy(address="*.example.com:1080")}, "no address of a proxy"),
        ({"through": EgressProxy(address="127.0.0.1:1080")}, "a private address"),
        ({"through": EgressProxy(address="proxy.example.com:1080", password=Secret("x"))}, "without a name"),
        ({"through": EgressProxy(address="proxy.example.com:1080", username="\ud800")}, "name or password"),
        ({"through": EgressProxy(address="proxy.example.com:0001080")}, "no host"),
        ({"through": EgressProxy(address="proxy.example.com:1" + "0" * 5000)}, "no host"),
        ({"through": EgressProxy(address="proxy.example.com:1080", tls=True, server_name=".")}, "no name of a server"),
        ({"through": EgressProxy(address="proxy.example.com:1080", username="x" * 256)}, "name or password"),
        ({"through": EgressProxy(address="proxy.example.com:1080", server_name="x")}, "Set tls"),
        ({"through": EgressProxy(address="proxy.example.com:1080", tls=True, certificates="x")}, "cannot be read"),
    ],
)
def test_ways_are_what_the_operator_lets_be_reached(policy: dict[str, object], why: str | None) -> None:
    """A name server, or a proxy, of one's own would be a way around what may be reached."""
    egress = Egress(
        EgressBounds(allowed=("a.example.com", "proxy.example.com:1080", "proxy.elsewhere.test:1080", "9.9.9.9:53"))
    )
    asked = NetworkPolicy(allow=("a.example.com",), **policy)  # type: ignore[arg-type]
    if why is None:
        assert egress.check(asked, principal=None) == asked
        return
    with pytest.raises(InvalidRequestError, match=why):
        egress.check(asked, principal=None)
