"""The proxy with real connections on both sides: what passes, what does not, and what is written down of it."""

import asyncio
import json
import logging
import ssl
from typing import Any

import httpx
import pytest
import trustme

from tests.unit.sandbox.network.harness import OK, PATIENCE_S, Host, Names, proxy, running

LOOPBACK = ["127.0.0.1"]
CA = trustme.CA()
"""Of the outside's servers. Made once: that takes a while."""


def names(**more: Any) -> Names:
    return Names(host_test=LOOPBACK, other_test=LOOPBACK, **more)


def certified(name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert(name).configure_cert(context)
    return context


def trusting(*pems: bytes) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for pem in pems:
        context.load_verify_locations(cadata=pem.decode())
    return context


async def test_plain_requests_reach_an_allowed_host_by_its_path() -> None:
    """With its own Host, whatever the sandbox says there, and nothing of what was for the proxy."""
    async with running(Host()) as host, proxy(names(), own=[f"host.test:{host.port}"]) as ours:
        said = await ours.ask(
            f"GET http://HOST.test:{host.port}/a?b=c HTTP/1.1\r\nHost: evil.test\r\nProxy-Authorization: Basic eA==\r\n"
            "Connection: close, x-hop\r\nX-Hop: 1\r\nX-Kept: 2\r\n\r\n".encode()
        )
    assert said.startswith(b"HTTP/1.1 200 OK")
    assert said.endswith(b"ok")
    head = host.heard[0].decode().lower().splitlines()
    assert head[0] == "get /a?b=c http/1.1"
    assert sorted(line for line in head[1:] if line) == [
        "connection: close",
        f"host: host.test:{host.port}",
        "x-kept: 2",
    ]
    assert (ours.tally.allowed, ours.tally.refused) == (1, 0)
    assert (ours.tally.sent_bytes, ours.tally.received_bytes) == (len(host.heard[0]), len(OK))


async def test_bodies_pass_both_ways_chunked_or_not_and_connections_are_used_again() -> None:
    """A real client, with streamed bodies of several sizes over one connection."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = b""
        if b"transfer-encoding: chunked" in head:
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        else:
            length = next(line for line in head.splitlines() if line.startswith(b"content-length:"))
            body = await reader.readexactly(int(length.partition(b":")[2]))
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for at in range(0, len(body), 50_000):
            piece = body[at : at + 50_000]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def pieces(data: bytes) -> Any:
        yield data

    async with (
        running(Host(echo)) as host,
        proxy(names(), own=[f"host.test:{host.port}"]) as ours,
        httpx.AsyncClient(proxy=f"http://127.0.0.1:{ours.port}", trust_env=False) as client,
    ):
        for size in (1, 70_000, 3_000_000):
            data = bytes(range(256)) * (size // 256 + 1)
            for content in (data, pieces(data)):
                answer = await client.post(f"http://host.test:{host.port}/", content=content, timeout=PATIENCE_S)
                assert answer.content == data
    assert ours.tally.sent_bytes > 6_000_000
    assert ours.tally.received_bytes > 6_000_000


@pytest.mark.parametrize(
    ("url", "status", "why"),
    [
        ("http://elsewhere.test/", 403, "the host is not allowed"),
        ("http://host.test:1/", 403, "port 1 is not allowed"),
        ("http://2130706433/", 400, "no host"),
        ("http://0x7f.1/", 400, "no host"),
        ("http://[::1]/", 403, "the host is not allowed"),
        ("http://user@host.test/", 400, "name"),
        ("https://host.test/", 400, "CONNECT"),
        ("ftp://host.test/", 400, "CONNECT"),
        ("/only/a/path", 400, "whole URL"),
        ("http://gone.test/", 502, "no address"),
    ],
)
async def test_other_requests_are_answered_with_why_not(url: str, status: int, why: str) -> None:
    """By the proxy itself, before anything is looked up or connected to that need not be."""
    async with proxy(names(), allow=["host.test", "gone.test"]) as ours:
        said = await ours.get(url)
    assert said.startswith(f"HTTP/1.1 {status} ".encode()), said
    assert why.encode() in said
    assert set(ours.names.asked) <= {"gone.test"}
    assert (ours.tally.allowed, ours.tally.refused) == (0, 1)


@pytest.mark.parametrize("allow", ["*", "host.test"])
@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "100.64.0.1", "0.0.0.0"],
)
async def test_names_that_lead_to_private_addresses_lead_nowhere(allow: str, address: str) -> None:
    """A server listens there, and nobody comes: neither by HTTP nor through a tunnel."""
    async with (
        running(Host()) as host,
        proxy(Names(host_test=[address]), allow=[allow, f"host.test:{host.port}"]) as ours,
    ):
        assert (await ours.get(f"http://host.test:{host.port}/")).startswith(b"HTTP/1.1 403 ")
        head, _, writer = await ours.tunnel(f"host.test:{host.port}")
        writer.close()
    assert head.startswith(b"HTTP/1.1 403 the host has a")
    assert host.connections == 0


async def test_literal_addresses_are_held_to_the_same() -> None:
    """Also where everything is allowed, and in every form of them."""
    async with running(Host()) as host, proxy(names(), allow=["*", f"*:{host.port}"]) as ours:
        for text in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254", "2130706433"):
            said = await ours.get(f"http://{text}:{host.port}/")
            assert said.split()[1] in (b"403", b"400"), said
    assert host.connections == 0


async def test_the_operators_own_host_may_be_an_address() -> None:
    """That one alone, on that port alone."""
    async with (
        running(Host()) as host,
        running(Host()) as other,
        proxy(names(), own=[f"127.0.0.1:{host.port}"]) as ours,
    ):
        assert (await ours.get(f"http://127.0.0.1:{host.port}/")).startswith(b"HTTP/1.1 200 ")
        assert (await ours.get(f"http://127.0.0.1:{other.port}/")).startswith(b"HTTP/1.1 403 ")
        assert "127.0.0.1" not in ours.door.environment("/run/warmcell")["NO_PROXY"]


async def test_a_name_is_looked_up_anew_for_each_request_and_once() -> None:
    """What was public a moment ago is checked again, and what was checked is what is connected to."""
    async with running(Host()) as host:
        table = names(own_test=LOOPBACK)
        table.addresses["host.test"] = [LOOPBACK, ["169.254.169.254"]]
        async with proxy(table, own=[f"host.test:{host.port}"]) as ours:
            first = await ours.get(f"http://host.test:{host.port}/")
            second = await ours.get(f"http://host.test:{host.port}/")
    assert (first.split()[1], second.split()[1]) == (b"200", b"403")
    assert table.asked == ["host.test", "host.test"]
    assert host.connections == 1


async def test_redirects_are_the_clients_to_follow_and_are_checked_as_any_request() -> None:
    """To a place that it may not reach."""
    moved = Host(b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/latest\r\ncontent-length: 0\r\n\r\n")
    async with (
        running(moved) as host,
        proxy(names(), own=[f"host.test:{host.port}"], allow=["*"]) as ours,
        httpx.AsyncClient(proxy=f"http://127.0.0.1:{ours.port}", trust_env=False) as client,
    ):
        answer = await client.get(f"http://host.test:{host.port}/", follow_redirects=True, timeout=PATIENCE_S)
    assert answer.status_code == 403
    assert answer.headers["warmcell-refused"] == "the host has an address that is not public"


async def test_tunnels_pass_tls_untouched() -> None:
    """The certificate is the host's own, which the sandbox checks itself."""
    async with running(Host(), certified("host.test")) as host, proxy(names(), own=[f"host.test:{host.port}"]) as ours:
        reader, writer = await ours.tls(f"host.test:{host.port}", "host.test", trusting(CA.cert_pem.bytes()))
        writer.write(b"GET / HTTP/1.1\r\nhost: host.test\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    assert host.heard == [b"GET / HTTP/1.1\r\nhost: host.test\r\n\r\n"]


async def test_tls_for_another_host_than_the_tunnels_does_not_pass() -> None:
    """Both are served at the same address and allowed, but who says one means one."""
    async with (
        running(Host(), certified("other.test")) as host,
        proxy(names(), own=[f"host.test:{host.port}", f"other.test:{host.port}"]) as ours,
    ):
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await ours.tls(f"host.test:{host.port}", "other.test", trusting(CA.cert_pem.bytes()))
        assert ours.tally.refused == 1
    assert host.heard == []


async def test_on_the_usual_ports_nothing_but_tls_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain HTTP through a tunnel would be held against no rule."""
    async with running(Host()) as host, proxy(names(), own=[f"host.test:{host.port}"]) as ours:
        monkeypatch.setattr("warmcell.sandbox.network.exchange.USUAL_PORTS", (host.port,))
        _, reader, writer = await ours.tunnel(f"host.test:{host.port}")
        writer.write(b"GET / HTTP/1.1\r\nhost: evil.test\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()
    assert host.heard == []
    assert ours.tally.refused == 1


async def test_other_protocols_pass_on_ports_that_are_named_and_halves_end_one_by_one() -> None:
    """A server that speaks first, a client that ends its half, and the rest that comes after that."""

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        said = await reader.read()
        writer.write(b"you said " + said)

    async with running(Host(late)) as host, proxy(names(), own=[f"host.test:{host.port}"]) as ours:
        head, reader, writer = await ours.tunnel(f"host.test:{host.port}")
        assert head.startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.readline() == b"220 hello\r\n"
            writer.write(b"bye")
            writer.write_eof()
            assert await reader.read() == b"you said bye"
        writer.close()


async def test_headers_are_added_within_tls_for_that_host_alone() -> None:
    """The sandbox never has the secret, and what it says under that name is not heard."""
    async with running(Host(), certified("host.test")) as host:
        place = f"host.test:{host.port}"
        wanted = {place: {"Authorization": "Bearer hush"}}
        async with proxy(names(), own=[place], headers=wanted, authority=CA) as ours:
            trust = trusting(ours.authority.pem)
            for _ in range(2):
                reader, writer = await ours.tls(place, "host.test", trust)
                writer.write(f"GET /x?y HTTP/1.1\r\nHost: {place}\r\nauthorization: mine\r\n\r\n".encode())
                async with asyncio.timeout(PATIENCE_S):
                    answer = await reader.readuntil(b"ok")
                writer.close()
                assert answer.startswith(b"HTTP/1.1 200")
                assert b"hush" not in answer
    head = host.heard[0].lower()
    assert b"get /x?y http/1.1\r\n" in head
    assert head.count(b"authorization:") == 1
    assert b"authorization: bearer hush\r\n" in head


async def test_a_secret_goes_to_its_host_alone() -> None:
    """Not to whom the Host header names, not without TLS, and not to a server that cannot prove to be it."""
    async with running(Host(), certified("other.test")) as host:
        place = f"host.test:{host.port}"
        async with proxy(names(), own=[place], headers={place: {"X-Key": "hush"}}, authority=CA) as ours:
            assert (await ours.get(f"http://{place}/")).startswith(b"HTTP/1.1 403 ")
            for named, status in ((f"other.test:{host.port}", b"421"), (place, b"502")):
                reader, writer = await ours.tls(place, "host.test", trusting(ours.authority.pem))
                writer.write(f"GET / HTTP/1.1\r\nHost: {named}\r\n\r\n".encode())
                async with asyncio.timeout(PATIENCE_S):
                    assert (await reader.readline()).split()[1] == status
                writer.close()
    assert host.heard == []


async def test_headers_that_were_lost_are_said_to_be() -> None:
    """A sandbox that came back from disk has their names alone; nothing is sent without them."""
    async with running(Host(), certified("host.test")) as host:
        place = f"host.test:{host.port}"
        async with proxy(names(), own=[place], headers={place: {"X-Key": "***"}}, authority=CA) as ours:
            head, _, writer = await ours.tunnel(place)
            writer.close()
    assert b"set them again" in head
    assert host.connections == 0


async def test_what_has_used_up_its_bytes_reaches_nothing_more() -> None:
    """Neither in the middle of an answer nor afterwards."""
    large = b"HTTP/1.1 200 OK\r\ncontent-length: 5000000\r\n\r\n" + b"x" * 5_000_000
    async with running(Host(large)) as host, proxy(names(), own=[f"host.test:{host.port}"], max_bytes=300_000) as ours:
        cut = await ours.get(f"http://host.test:{host.port}/")
        after = await ours.get(f"http://host.test:{host.port}/")
    assert len(cut) < 500_000
    assert b"used up its bytes" in after
    assert ours.tally.bytes < 500_000
    assert host.connections == 1


async def test_hosts_that_break_off_or_speak_nonsense_do_no_harm() -> None:
    """A cut before, within and after the head; the next connection is served."""
    answers = [b"", b"HTTP/1.1 200 OK\r\nconte", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab", b"\xff\0" * 99]
    for answer in answers:
        async with running(Host(answer)) as host, proxy(names(), own=[f"host.test:{host.port}"]) as ours:
            said = await ours.get(f"http://host.test:{host.port}/")
            assert said == b"" or said.startswith((b"HTTP/1.1 502 ", b"HTTP/1.1 200 "))
            assert b"403" in await ours.get("http://elsewhere.test/")


async def test_endless_heads_and_slow_clients_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head may be 64 KiB long and come within its time, and not more."""
    async with proxy(names(), allow=["host.test"]) as ours:
        said = await ours.ask(b"GET http://host.test/ HTTP/1.1\r\nX: " + b"x" * 10_000_000)
        assert said == b"" or said.startswith(b"HTTP/1.1 431 ")
        monkeypatch.setattr("warmcell.sandbox.network.exchange.HEAD_S", 0.05)
        assert await ours.ask(b"GET http://host.test/ HT") == b""


async def test_decisions_are_written_down_without_queries(caplog: pytest.LogCaptureFixture) -> None:
    """One line of JSON each, no more than some a second, and none has a line's end of the sandbox's in it."""
    caplog.set_level(logging.INFO, "warmcell.egress")
    async with running(Host()) as host, proxy(names(), own=[f"host.test:{host.port}"]) as ours:
        await ours.get(f"http://host.test:{host.port}/path?token=hush")
        await ours.get("http://elsewhere.test/a?token=hush")
        for _ in range(50):
            ours.door.note("GET", "x\ny", 1, "/", "no")
    lines = [record.getMessage() for record in caplog.records if record.name == "warmcell.egress"]
    assert "hush" not in "".join(lines)
    assert not any("\n" in line for line in lines)
    told = [json.loads(line) for line in lines]
    assert [(one["decision"], one["host"], one["path"], one["why"]) for one in told[:2]] == [
        ("allowed", "host.test", "/path", ""),
        ("refused", "elsewhere.test", "/a", "the host is not allowed"),
    ]
    assert len(told) <= 60
    assert ours.tally.refused == 51
