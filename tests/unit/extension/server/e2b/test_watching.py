"""What a watcher says is read with the distrust that anything out of a sandbox deserves."""

import base64
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from warmcell.extension.server.e2b.framing import ConnectError
from warmcell.extension.server.e2b.watching import Mark, _event, _said
from warmcell.sandbox.client.watching import LINE_MAX_BYTES
from warmcell.sandbox.errors import ProtocolError

EVENT = {"type": "EVENT_TYPE_WRITE", "name": "a" * 4096}
FILE = {
    "path": "/tmp/a",
    "name": "a",
    "type": "file",
    "size_bytes": 3,
    "mode": 0o640,
    "owner": "ann",
    "group": "ann",
    "modified_at": 1.5,
    "target": None,
    "metadata": {},
}


async def lines(*pieces: bytes) -> AsyncIterator[dict[str, Any]]:
    for piece in pieces:
        yield {"stdout": base64.b64encode(piece).decode()}


async def heard(*pieces: bytes) -> list[Mapping[str, Any]]:
    return [said async for said in _said(lines(*pieces), "/there")]


async def test_changes_come_whole_however_they_are_cut() -> None:
    """Also in the middle of a name that is as long as names are."""
    text = json.dumps(EVENT).encode() + b"\n" + json.dumps({"started": True}).encode() + b"\n"
    for cut in range(0, len(text), 97):
        assert await heard(text[:cut], text[cut:]) == [EVENT, {"started": True}]


@pytest.mark.parametrize(
    "words",
    [
        b"x" * (LINE_MAX_BYTES + 1),
        b"no json\n",
        b"[1]\n",
        b"1\n",
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        b'{"failed": []}\n',
    ],
)
async def test_other_words_end_it(words: bytes) -> None:
    """No line without an end is collected, and what is no event is none."""
    with pytest.raises((ConnectError, ProtocolError)):
        await heard(*(words[at : at + 1000] for at in range(0, len(words), 1000)))


@pytest.mark.parametrize(
    "file", [7, [], {}, {**FILE, "mode": "x"}, {**FILE, "modified_at": "then"}, {**FILE, "more": 1}]
)
def test_what_a_watcher_says_of_a_file_is_checked(file: object) -> None:
    """A file is told as what it is; words that are none end the watcher."""
    said = {"kind": "written", "name": "a"}
    told = _event({**said, "file": FILE})["entry"]
    assert (told["type"], told["permissions"], told["size"]) == ("FILE_TYPE_FILE", "-rw-r-----", "3")
    assert "entry" not in _event({**said, "file": None})
    with pytest.raises(ConnectError):
        _event({**said, "file": file})


def test_a_watcher_that_was_not_asked_for_long_goes_on() -> None:
    """What is lost is told once, in the place of nothing else: whole events before and after it come."""
    words = [json.dumps({"kind": "written", "name": name}).encode() + b"\n" for name in "abcd"]
    said = [
        base64.b64encode(piece).decode() for piece in (words[0], words[1][4:] + words[2], words[3][:5], words[3][5:])
    ]
    mark = Mark()
    assert names(mark.taken([{"stdout": said[0]}, {"next": 1}])) == ["a"]
    with pytest.raises(ConnectError, match="lost"):
        mark.taken([{"lost": 7}, {"stdout": said[1]}, {"stdout": said[2]}, {"next": 10}])
    assert mark.at == 10
    assert names(mark.taken([{"stdout": said[3]}, {"next": 11}])) == ["c", "d"]
    assert names(mark.taken([{"next": 11}])) == []


def test_a_mark_stays_where_it_was_when_something_else_speaks() -> None:
    """So that nothing is told twice, or passed over."""
    mark = Mark()
    with pytest.raises(ProtocolError):
        mark.taken([{"stdout": base64.b64encode(b"no json\n").decode()}, {"next": 5}])
    assert mark.at == 0


def names(events: Sequence[Mapping[str, Any]]) -> list[str]:
    return [event["name"] for event in events]
