"""Uploads in their forms, in any pieces: whole files, or a typed error."""

import asyncio
import gzip
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from warmcell.extension.server.e2b.uploads import PIECE_BYTES, each_file, unzipped
from warmcell.sandbox.errors import InvalidRequestError, SandboxFileNotFoundError

TYPE = "multipart/form-data; boundary=b0undary"


async def sent(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def form(files: list[tuple[str, bytes]]) -> bytes:
    parts = b""
    for name, content in files:
        parts += b'--b0undary\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n' % name.encode()
        parts += content + b"\r\n"
    return parts + b"--b0undary--\r\n"


async def take(name: str, pieces: AsyncIterator[bytes]) -> tuple[str, bytes]:
    return name, b"".join([piece async for piece in pieces])


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
async def test_files_of_a_form_come_whole(contents: list[bytes], size: int) -> None:
    """Whatever they hold, and however the body is cut."""
    files = [(f"dir/{number}.bin", content) for number, content in enumerate(contents)]
    assert await each_file(TYPE, sent(form(files), size), take) == files


WORDS = st.sampled_from(
    [
        *(b"--b0undary", b"\r\n", b"--", b"Content-Disposition: form-data", b'; name="file"', b'; filename="a"', b": "),
        *(b"\r\n\r\n", b"; filename*=utf-8''%ff", b'; filename="\xff', b"Content-Type: x", b"\0", b"x" * 9000),
        form([("a", b"1")]),
        form([("a", b"1")])[:-8],
    ]
)
FORMS = st.lists(st.one_of(WORDS, st.binary(max_size=40)), max_size=8).map(b"".join)
SIZES = st.sampled_from((1, 7, 60, 5000))


@LENGTHS
def test_any_body_is_files_or_a_typed_error(examples: int) -> None:
    """Junk, also after a good beginning, and in headers."""

    def read(drawn: tuple[bytes, int]) -> None:
        for name, _ in runner.run(each_file(TYPE, sent(*drawn), take)):
            name.encode()

    with asyncio.Runner() as runner:
        sound, broken = [(form([("a", b"1")]), 7)], [(b"--b0undary--", 7), (form([("a", b"1")])[:-8], 7)]
        give_anything(st.tuples(FORMS, SIZES), read, examples=examples, sound=sound, broken=broken)


@LENGTHS
def test_any_bytes_are_unzipped_or_refused(examples: int) -> None:
    """In pieces of a bounded size, however much they come to; what is not gzip, or not all of it, is refused."""
    zipped = st.sampled_from([gzip.compress(bytes(size), mtime=0) for size in (0, 100, 3_000_000)])
    broken = st.tuples(zipped, st.integers(0, 60), st.binary(max_size=20)).map(lambda one: one[0][: one[1]] + one[2])

    async def unzip(drawn: tuple[bytes, int]) -> None:
        async for piece in unzipped(sent(*drawn)):
            assert len(piece) <= PIECE_BYTES

    with asyncio.Runner() as runner:
        inputs = st.tuples(st.one_of(zipped, broken, st.binary(max_size=60)), SIZES)
        sound, broken = [(gzip.compress(b"x"), 1)], [(gzip.compress(b"x")[:-1], 1), (b"x", 1)]
        give_anything(inputs, lambda one: runner.run(unzip(one)), examples=examples, sound=sound, broken=broken)


async def test_one_that_cannot_be_written_ends_the_upload() -> None:
    """With its own error, though more would come."""

    async def refuse(name: str, pieces: AsyncIterator[bytes]) -> None:
        raise SandboxFileNotFoundError("no such directory")

    with pytest.raises(SandboxFileNotFoundError):
        await each_file(TYPE, sent(form([("a", b"x" * 3_000_000)]), 65536), refuse)


@given(st.binary(max_size=2000), st.integers(1, 500))
@settings(max_examples=100, deadline=None)
async def test_gzip_is_undone(content: bytes, size: int) -> None:
    """In any pieces, and of several parts all."""
    parts = gzip.compress(content) + gzip.compress(content[:3])
    assert b"".join([piece async for piece in unzipped(sent(parts, size))]) == content + content[:3]


async def test_gzip_grows_by_pieces_only() -> None:
    """A small body that becomes a large file is never held whole."""
    sizes = [len(piece) async for piece in unzipped(sent(gzip.compress(bytes(20 * PIECE_BYTES)), 65536))]
    assert sum(sizes) == 20 * PIECE_BYTES
    assert max(sizes) <= PIECE_BYTES


@pytest.mark.parametrize(
    "body",
    [b"", b"no gzip at all", gzip.compress(b"x" * 1000)[:-9], gzip.compress(b"x") + b"more"],
    ids=["empty", "text", "cut", "followed"],
)
async def test_what_is_not_gzip_is_refused(body: bytes) -> None:
    """Also half of one."""
    with pytest.raises(InvalidRequestError):
        async for _ in unzipped(sent(body, 10)):
            pass
