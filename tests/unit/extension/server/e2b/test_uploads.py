"""Uploads in their forms, in any pieces: whole files, or a typed error."""

import gzip
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


@given(st.binary(max_size=300), st.integers(1, 100))
@settings(max_examples=300, deadline=None)
async def test_any_body_is_files_or_a_typed_error(data: bytes, size: int) -> None:
    """Junk, also after a good beginning."""
    for body in (data, b"--b0undary\r\n" + data, form([("a", b"1")])[:-8] + data):
        try:
            await each_file(TYPE, sent(body, size), take)
        except InvalidRequestError as error:
            assert error.message


async def test_one_that_cannot_be_written_ends_the_upload() -> None:
    """With its own error, though more would come."""

    async def refuse(name: str, pieces: AsyncIterator[bytes]) -> None:
        raise SandboxFileNotFoundError("no such directory")

    with pytest.raises(SandboxFileNotFoundError):
        await each_file(TYPE, sent(form([("a", b"x" * 3_000_000)]), 65536), refuse)


@given(st.binary(max_size=2000), st.integers(1, 500))
@settings(max_examples=100, deadline=None)
async def test_gzip_is_undone(content: bytes, size: int) -> None:
    """In any pieces."""
    assert b"".join([piece async for piece in unzipped(sent(gzip.compress(content), size))]) == content


async def test_gzip_grows_by_pieces_only() -> None:
    """A small body that becomes a large file is never held whole."""
    sizes = [len(piece) async for piece in unzipped(sent(gzip.compress(bytes(20 * PIECE_BYTES)), 65536))]
    assert sum(sizes) == 20 * PIECE_BYTES
    assert max(sizes) <= PIECE_BYTES


@pytest.mark.parametrize(
    "body", [b"", b"no gzip at all", gzip.compress(b"x" * 1000)[:-9]], ids=["empty", "text", "cut"]
)
async def test_what_is_not_gzip_is_refused(body: bytes) -> None:
    """Also half of one."""
    with pytest.raises(InvalidRequestError):
        async for _ in unzipped(sent(body, 10)):
            pass
