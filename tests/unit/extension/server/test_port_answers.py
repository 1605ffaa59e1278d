"""What listens on a port of a sandbox may answer anything: it is passed on, or is said to be none."""

import asyncio
import tracemalloc
from types import SimpleNamespace
from typing import Any

import httpcore
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError

from tests.anything import CUTS, LENGTHS, give_anything, pieces
from warmcell.extension.server.e2b.body import Body
from warmcell.extension.server.ports import passing
from warmcell.extension.server.ports.headers import Place
from warmcell.sandbox.errors import TransportError

PLACE = Place(port=8000, scheme="http", host="here.test", prefix="/warmcell/ports/8000-box/ticket")
SOUND = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nset-cookie: a=b\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
MEMORY_MAX = 8 * 2**20

WORDS = [
    *(b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/2 ", b"200 ", b"204 ", b"304 ", b"100 ", b"101 ", b"999 ", b"-1 ", b"OK"),
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\0", b": ", b"\xff\xfe", b"x" * 70_000, b"A: b\r\n" * 3_000),
    *(b"content-length: 2\r\n", b"content-length: -1\r\n", b"content-length: 99999999999999999999\r\n"),
    *(
        b"transfer-encoding: chunked\r\n",
        b"2\r\nok\r\n",
        b"0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"location: http://[\r\n",
    ),
    *(b"connection: upgrade\r\nupgrade: websocket\r\n", b"content-encoding: gzip\r\n", b"trailer: a\r\n"),
]
ANSWERS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map(b"".join),
    st.lists(st.sampled_from(WORDS), max_size=5).map(lambda some: b"HTTP/1.1 200 OK\r\n" + b"".join(some)),
    st.binary(max_size=200),
    st.sampled_from((SOUND, CHUNKED)),
)


class Port(httpcore.AsyncNetworkStream):
    """What is said by it, in pieces."""

    def __init__(self, said: list[bytes]) -> None:
        self._said = said

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self._said:
            return b""
        piece = self._said.pop(0)
        if len(piece) > max_bytes:
            self._said.insert(0, piece[max_bytes:])
        return piece[:max_bytes]

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Nobody looks at it."""

    async def aclose(self) -> None:
        """There is nothing to let go of."""

    def get_extra_info(self, info: str) -> Any:
        return None


class Gone:
    """A browser that has gone when its WebSocket opens."""

    def set_nodelay(self, value: bool) -> None:
        """As of a stream."""

    def write(self, data: bytes) -> None:
        raise StreamClosedError

    def close(self) -> None:
        """As of a stream."""


class Asked:
    """A browser's request, and what it gets."""

    def __init__(self) -> None:
        self.request = SimpleNamespace(method="GET", headers=HTTPHeaders({"Host": "here.test"}))
        self.body_stream = Body()
        self.headers = HTTPHeaders()
        self.status = 0
        self.passed = 0
        self.finished = False

    def add_header(self, name: str, value: str) -> None:
        self.headers.add(name, value)

    def set_status(self, status_code: int, reason: str | None = None) -> None:
        self.status = status_code

    def write(self, chunk: bytes) -> None:
        self.passed += len(chunk)

    def flush(self) -> "asyncio.Future[None]":
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def detach(self) -> "Gone":
        self.status = 101
        return Gone()

    def finish_plainly(self) -> None:
        self.finished = True

    def forget_headers(self) -> None:
        self.headers = HTTPHeaders()


def answered(said: list[bytes]) -> Asked:
    """What a browser gets of it; raises as `pass_on`."""

    async def exchange() -> Asked:
        asked = Asked()
        await asked.body_stream.put(None)
        with passing.breaking_off(PLACE, "box"):
            await passing._exchange(asked, PLACE, "/", Port(said))  # type: ignore[arg-type]
        return asked

    return asyncio.run(exchange())


@LENGTHS
def test_any_answer_is_passed_on_or_said_to_be_none(examples: int) -> None:
    """However it is cut: no cookie, nothing that is longer than what came, and one error for what is no answer."""

    def take(drawn: tuple[bytes, list[int]]) -> None:
        data, cuts = drawn
        asked = answered([*pieces(data[:500], cuts), data[500:]] if len(data) > 500 else pieces(data, cuts))
        assert asked.passed <= len(data)
        assert "Set-Cookie" not in asked.headers
        assert asked.status == 101 or asked.finished

    give_anything(
        st.tuples(ANSWERS, CUTS),
        take,
        refusals=TransportError,
        examples=examples,
        memory_max=MEMORY_MAX,
        sound=[(SOUND, [7]), (CHUNKED, [1])],
        broken=[(b"no HTTP", [3]), (b"", [1]), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nless", [50])],
    )


def test_an_answer_that_has_no_end_takes_bounded_memory() -> None:
    """A head of 14 MiB is no answer; a body of as much goes through."""
    for data in (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 2_000_000, b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2**24):
        tracemalloc.start()
        try:
            asked = answered([data])
        except TransportError:
            asked = None
        finally:
            taken = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert asked is None or asked.passed == 2**24
        assert taken < 2 * len(data) + MEMORY_MAX, taken
