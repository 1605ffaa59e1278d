"""Whatever comes: each of the proxy's parsers answers, or refuses with a reason, in bounded memory."""

import asyncio
import io
import ipaddress
import ssl
import tracemalloc
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import EgressProxy, NetworkPolicy
from warmcell.sandbox.network.egress import Door, Egress
from warmcell.sandbox.network.exchange import Exchange
from warmcell.sandbox.network.hello import HELLO_MAX, NotTls, server_name
from warmcell.sandbox.network.rules import Pattern, read_host
from warmcell.sandbox.network.socks import SocksError, Through, connect
from warmcell.sandbox.network.streams import Tally
from warmcell.sandbox.wire import Secret

MEMORY_MAX = 8 * 2**20
"""Of all that one request makes, while it is handled."""

WORDS = [
    *(b"GET ", b"POST ", b"HEAD ", b"CONNECT ", b"http://", b"https://", b"a.test", b"b.test", b"127.0.0.1", b"[::1]"),
    *(b":", b":443", b":80", b"/", b"?", b"#", b"@", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\r\n\r\n", b"\n", b"\0"),
    *(b"Host: a.test", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Connection: close", b"Expect: x"),
    *(b"Content-Length: 99999999999999999999", b"5\r\nhello\r\n", b"0\r\n\r\n", b"\xff", b"x" * 70_000),
    *(b"\x16\x03\x01", b"\x01\x00\x00\x04", b"Upgrade: websocket", b"2130706433", b"0x7f.1"),
]
REQUESTS = st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(WORDS), max_size=14).map(b"".join))
HEAD = b"GET http://a.test/ HTTP/1.1\r\nHost: a.test\r\n"
BODIES = st.lists(st.sampled_from(WORDS), max_size=8).map(lambda words: HEAD + b"\r\n".join(words) + b"\r\n\r\n")


class Memory:
    """A stream of the sandbox's whose bytes are all there."""

    def __init__(self, data: bytes, size: int) -> None:
        first = min(len(data), 200)  # In small pieces; to have all so would take long.
        self._pieces = [data[at : min(at + size, first)] for at in range(0, first, size)]
        self._pieces += [data[at : at + 65_536] for at in range(first, len(data), 65_536)]
        self.written = b""

    async def read(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def write(self, data: bytes) -> None:
        self.written += data

    async def end(self) -> None:
        """Nothing more comes."""


async def nowhere(name: str) -> Sequence[str]:
    """No name leads anywhere, so that no byte leaves."""
    return ()


def door() -> Door:
    policy = NetworkPolicy(allow=("a.test",), headers={"b.test": {"X-Key": Secret("hush")}})
    egress = Egress(resolver=nowhere, tls=ssl.create_default_context())
    return egress.door("box", egress.check(policy, principal=None), Tally())


DOOR = door()


def serve(data: bytes, size: int) -> None:
    """One connection, to its end."""
    stream = Memory(data, size)
    asyncio.run(Exchange(DOOR, stream).serve())
    assert stream.written == b"" or stream.written.startswith(b"HTTP/1.1 "), stream.written
    assert b"hush" not in stream.written


def read_anything(data: bytes) -> None:
    """A name, or none; a host, or none."""
    try:
        name = server_name(data)
    except NotTls:
        name = ""
    assert name is None or len(name) <= HELLO_MAX
    text = data.decode("latin-1")
    for read, error in ((read_host, ValueError), (Pattern.read, InvalidRequestError)):
        try:
            assert read(text) is not None
        except error as refused:
            assert str(refused)


@LENGTHS
def test_any_bytes_are_answered_or_hung_up_on(examples: int) -> None:
    """However they are cut."""
    inputs = st.tuples(st.one_of(REQUESTS, BODIES), st.sampled_from([1, 7, 200]))
    give_anything(inputs, lambda one: serve(*one), examples=examples, memory_max=MEMORY_MAX)


SAID = b"\5\2" + b"\1\0" + b"\5\0\0\1\xc0\0\2\1\0\x50"
"""Of an egress proxy that wants a name and a password."""


def altered(sound: bytes) -> st.SearchStrategy[bytes]:
    """Like that, but for a few bytes, and cut or longer."""
    changes = st.dictionaries(st.integers(0, len(sound) - 1), st.integers(0, 255), max_size=3)
    cuts = st.one_of(st.just(len(sound)), st.integers(0, len(sound)))

    def alter(drawn: tuple[dict[int, int], int, bytes]) -> bytes:
        changed, cut, more = drawn
        return bytes(changed.get(at, one) for at, one in enumerate(sound))[:cut] + more

    return st.one_of(st.binary(max_size=60), st.tuples(changes, cuts, st.binary(max_size=20)).map(alter))


@LENGTHS
def test_any_bytes_of_an_egress_proxy_connect_or_are_said_to_be_wrong(examples: int) -> None:
    """And it was asked for that host."""
    way = Through.read(EgressProxy(address="proxy.example.com:1080", username="u", password=Secret("p")))
    host = ipaddress.ip_address("192.0.2.1")

    async def speak(said: bytes) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(said)
        reader.feed_eof()
        asked = io.BytesIO()
        await connect(reader, asked, way, host, 80)  # type: ignore[arg-type]
        assert asked.getvalue().endswith(host.packed + b"\0\x50")

    with asyncio.Runner() as runner:
        give_anything(
            altered(SAID),
            lambda said: runner.run(speak(said)),
            refusals=SocksError,
            examples=examples,
            sound=[SAID],
            broken=[b"", b"\4\0", SAID[:-6]],
        )


@LENGTHS
def test_any_bytes_are_a_name_or_none(examples: int) -> None:
    """Beginnings of TLS, hosts of requests, and hosts of policies."""
    hello = st.binary(max_size=60).map(lambda tail: b"\x16\x03\x01\x00\x40\x01\x00\x00\x3c" + tail)
    give_anything(st.one_of(REQUESTS, hello), read_anything, examples=examples, memory_max=MEMORY_MAX)


def test_what_comes_takes_bounded_memory() -> None:
    """Also where it is far longer than anything may be."""
    tracemalloc.start()
    try:
        for data in (b"x" * 3_000_000, HEAD + b"A: b\r\n" * 400_000, b"CONNECT " + b"a" * 3_000_000):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            stream = Memory(data, 200)
            held = tracemalloc.get_traced_memory()[0] - before
            asyncio.run(Exchange(DOOR, stream).serve())
            assert tracemalloc.get_traced_memory()[1] - before - held < MEMORY_MAX
    finally:
        tracemalloc.stop()
