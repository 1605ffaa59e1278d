"""The forms in which files are uploaded, read as they come: as they are, compressed, or several in one body."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from warmcell.sandbox.errors import InvalidRequestError

PIECE_BYTES: Final = 2**18
PIECES_AHEAD: Final = 4
FIELD: Final = "file"

Take = Callable[[str, AsyncIterator[bytes]], Awaitable[Any]]


async def unzipped(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What gzip has made small, never more than a piece of it at a time. It may be in several parts, one after another.

    Raises:
        InvalidRequestError: It is not gzip, or not all of it.
    """
    reader = zlib.decompressobj(wbits=31)
    async for piece in pieces:
        rest = piece
        while rest:
            if reader.eof:
                reader = zlib.decompressobj(wbits=31)
            try:
                yield reader.decompress(rest, PIECE_BYTES)
            except zlib.error as error:
                raise _not_gzip() from error
            rest = reader.unused_data if reader.eof else reader.unconsumed_tail
    if not reader.eof:
        raise _not_gzip()


async def each_file(content_type: str, pieces: AsyncIterator[bytes], take: Take) -> list[Any]:
    """Give each file of a multipart body to `take`, by its name, one after the other; what it has made of them.

    Raises:
        InvalidRequestError: The body is not of that form.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequestError("The request is not multipart/form-data", hint="Send the field `file`.")
    parts = _Parts()
    parser = MultipartParser(boundary, callbacks=parts.callbacks())  # type: ignore[arg-type]
    done = []
    work: asyncio.Task[Any] | None = None
    try:
        async for piece in pieces:
            for start in range(0, len(piece), PIECE_BYTES):
                _parse(parser, piece[start : start + PIECE_BYTES])
                for event in parts.taken():
                    if isinstance(event, str):
                        queue: asyncio.Queue[bytes | None] = asyncio.Queue(PIECES_AHEAD)
                        work = asyncio.create_task(_given(take(event, _all(queue))))
                    elif work is not None:
                        await _put(queue, event, work)
                        if event is None:
                            done.append(await work)
                            work = None
        _finish(parser)
    finally:
        if work is not None:
            work.cancel()
    if not done:
        raise InvalidRequestError("The request has no file", hint=f"Send the field `{FIELD}`.")
    return done


class _Parts:
    """What the parser finds: the name of a file, its pieces, and None at its end. Other fields are passed over."""

    def __init__(self) -> None:
        self._found: list[str | bytes | None] = []
        self._header = self._value = b""
        self._file = False

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._field,
            "on_header_value": self._text,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def taken(self) -> list[str | bytes | None]:
        """What was found since this was asked before."""
        found, self._found = self._found, []
        return found

    def _begin(self) -> None:
        self._file = False
        self._header = self._value = b""

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _text(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            if options.get(b"name") == FIELD.encode():
                self._file = True
                self._found.append(options.get(b"filename", b"").decode("utf-8", "replace"))
        self._header = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file:
            self._found.append(data[start:end])

    def _end(self) -> None:
        if self._file:
            self._found.append(None)


def _parse(parser: MultipartParser, data: bytes) -> None:
    try:
        parser.write(data)
    except FormParserError as error:
        raise InvalidRequestError(f"The request is not multipart/form-data: {error}", hint="Send it again.") from error


def _finish(parser: MultipartParser) -> None:
    try:
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequestError("The request broke off in a file", hint="Send it again.") from error


async def _all(queue: "asyncio.Queue[bytes | None]") -> AsyncIterator[bytes]:
    while (piece := await queue.get()) is not None:
        yield piece


async def _given(work: Awaitable[Any]) -> Any:
    return await work


async def _put(queue: "asyncio.Queue[bytes | None]", piece: "bytes | str | None", work: "asyncio.Task[Any]") -> None:
    """Hand a piece on, unless nobody takes it any more: then that is why."""
    assert not isinstance(piece, str)
    put = asyncio.ensure_future(queue.put(piece))
    await asyncio.wait({put, work}, return_when=asyncio.FIRST_COMPLETED)
    put.cancel()
    if work.done() and piece is not None:
        await work


def _not_gzip() -> InvalidRequestError:
    return InvalidRequestError("The request is not gzip, or not all of it", hint="Send it as it is, or all of it.")
