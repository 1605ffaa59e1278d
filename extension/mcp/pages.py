"""What code and commands have said, in pages that a model can read: text, pictures, and where the next page begins."""

import base64
import codecs
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Final

from mcp_types import ContentBlock, ImageContent, TextContent

from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.errors import InvalidRequestError

TEXT_MAX: Final = 20_000
"""Characters of text in one answer."""

IMAGES_MAX: Final = 4
IMAGE_MAX_CHARS: Final = 6 * 2**20
"""Of one picture, in base64; larger ones are only named."""

COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")
STREAMS: Final = ("stdout", "stderr")
PLACE: Final = re.compile(
    r"(?:(?P<entry>\d{1,12})(?:\.(?P<offset>\d{1,12}))?"
    r"(?:~(?P<stdout>(?:[0-9a-f]{2}){0,3})-(?P<stderr>(?:[0-9a-f]{2}){0,3}))?)?",
    re.ASCII,
)
PICTURES: Final = ("image/png", "image/jpeg", "image/gif", "image/webp")


class Page:
    """Entries of output until it is full.

    A place in the output is written "n.offset": entry n, from that character of its text on; "n~OUT-ERR" where the
    entries before it ended in the middle of a character of stdout or stderr, with the bytes of it that were there.
    """

    def __init__(self, after: str = "") -> None:
        """Begin at `after`, which an earlier page has told as `next`.

        Raises:
            InvalidRequestError: It is no such place.
        """
        found = PLACE.fullmatch(after)
        if found is None:
            raise InvalidRequestError(f"{after!r} is no place in the output", hint="Give `next` of an earlier answer.")
        self.entry, self._offset = int(found["entry"] or 0), int(found["offset"] or 0)
        self.full = False
        self._blocks: list[ContentBlock] = []
        self._text: list[str] = []
        self._kind = ""
        self._room = TEXT_MAX
        self._images = 0
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in STREAMS}
        self._begun = {name: bytes.fromhex(found[name] or "") for name in STREAMS}
        """Of each stream, what there was of a character before the entry."""
        self._decode_on()

    @property
    def next(self) -> str:
        """Where the next page begins."""
        place = f"{self.entry}.{self._offset}" if self._offset else str(self.entry)
        begun = [self._begun[name].hex() for name in STREAMS]
        return f"{place}~{'-'.join(begun)}" if any(begun) else place

    def take(self, said: Mapping[str, Any]) -> None:
        """Add an entry, as much of it as there is room for."""
        if "lost" in said:
            self._say("note", f"[{said['lost']} earlier pieces of output are no longer kept]\n")
        if "n" not in said or self.full:
            return
        if int(said["n"]) != self.entry:
            self.entry, self._offset, self._begun = int(said["n"]), 0, dict.fromkeys(STREAMS, b"")
            self._decode_on()
        skip = self._offset
        for kind, mime, content in self._parts(said):
            if mime:
                if self._images == IMAGES_MAX:
                    self.full = True
                    return
                self._show(mime, content)
                continue
            text = content[skip:]
            skip = max(0, skip - len(content))
            if len(text) > self._room:
                self._offset += self._room
                self._say(kind, text[: self._room])
                self.full = True
                return
            self._offset += len(text)
            self._say(kind, text)
        self.entry, self._offset = self.entry + 1, 0
        self._begun = {name: decoder.getstate()[0] for name, decoder in self._decoders.items()}

    def content(self) -> list[ContentBlock]:
        """All of it."""
        self._end_text()
        return list(self._blocks)

    def _decode_on(self) -> None:
        for name, decoder in self._decoders.items():
            decoder.setstate((self._begun[name], 0))

    def _parts(self, said: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """What an entry shows: kind and text, or the MIME type of a picture and itself in base64. Text comes last."""
        for name, decoder in self._decoders.items():
            if name in said:
                yield name, "", decoder.decode(base64.b64decode(said[name]))
        content = said.get("content", {})
        match said.get("msg_type"):
            case "stream":
                yield str(content.get("name")), "", str(content.get("text", ""))
            case "error":
                lines = "\n".join(str(line) for line in content.get("traceback", ()))
                yield "error", "", COLOURS.sub("", lines) + "\n"
            case "execute_result" | "display_data" | "update_display_data":
                yield from _shown(content.get("data", {}))

    def _say(self, kind: str, text: str) -> None:
        if not text:
            return
        if kind != self._kind:
            self._end_text()
            self._kind = kind
            if kind in ("stderr", "error"):
                self._text.append(f"[{kind}]\n")
        self._text.append(text)
        self._room -= len(text)

    def _show(self, mime: str, data: str) -> None:
        self._end_text()
        self._images += 1
        self._blocks.append(ImageContent(type="image", data=data, mime_type=mime))

    def _end_text(self) -> None:
        if self._text:
            self._blocks.append(TextContent(type="text", text="".join(self._text)))
        self._text, self._kind = [], ""


def _shown(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The richest form of a result that a model can take in."""
    for mime in PICTURES:
        if mime in data:
            picture = "".join(str(data[mime]).split())
            if len(picture) <= IMAGE_MAX_CHARS:
                yield "", mime, picture
                return
            yield (
                "result",
                "",
                f"[{mime} of {len(picture)} characters: too large; write it to a file in a smaller size]\n",
            )
            return
    for mime in ("text/markdown", "text/plain", "application/json"):
        if mime in data:
            value = data[mime]
            yield "result", "", (value if isinstance(value, str) else json.dumps(value)) + "\n"
            return
    if data:
        yield "result", "", f"[{', '.join(data)}]\n"


async def read(calls: Calls, path: str, after: str) -> tuple[Page, bool]:
    """What is there of a run or command from a place on, and whether that is all that there is at present.

    Raises:
        WarmcellError: There is no such thing.
    """
    page = Page(after)
    params = {"from": str(page.entry), "until": "now"}
    async with contextlib.aclosing(calls.download(f"{path}/output", params)) as pieces:
        async for said in _lines(pieces):
            page.take(said)
            if page.full:
                return page, False
    return page, True


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield json.loads(line)
