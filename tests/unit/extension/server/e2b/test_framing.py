"""Connect's envelopes: any bytes, in any pieces, are messages or a typed error, in bounded memory."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.anything import CUTS, LENGTHS, give_anything, pieces
from warmcell.extension.server.e2b.framing import Code, ConnectError, Envelopes, envelope, trailer

MESSAGES = st.lists(st.binary(max_size=200), max_size=8)


def framed(messages: list[bytes]) -> bytes:
    return b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)


@given(MESSAGES, CUTS)
@settings(max_examples=200, deadline=None)
def test_messages_come_whole_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    """What was framed is what is read, whatever the pieces it travels in."""
    reader = Envelopes()
    found = [message for piece in pieces(framed(messages), cuts) for message in reader.feed(piece)]
    reader.close()
    assert found == messages


def feed(drawn: tuple[bytes, list[int]]) -> None:
    """Messages, and never more held than a message may have."""
    data, cuts = drawn
    reader = Envelopes(max_bytes=64)
    for piece in pieces(data, cuts):
        for message in reader.feed(piece):
            assert len(message) <= 64
        assert len(reader._buffer) <= 64 + 5
    reader.close()


ANY = st.one_of(
    st.binary(max_size=300),
    st.tuples(st.sampled_from([0, 0, 0, 1, 2, 255]), st.integers(0, 2**32 - 1), st.binary(max_size=80)).map(
        lambda head: struct.pack(">BI", head[0], head[1]) + head[2]
    ),
    st.lists(st.binary(max_size=70), max_size=4).map(framed),
)


@LENGTHS
def test_any_bytes_give_messages_or_a_typed_error(examples: int) -> None:
    """Junk, huge announcements and foreign flags are refused by name; nothing grows with what is announced."""
    give_anything(st.tuples(ANY, CUTS), feed, refusals=ConnectError, examples=examples, sound=[(framed([b"x"]), [1])])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (struct.pack(">BI", 1, 2) + b"{}", Code.UNIMPLEMENTED),
        (struct.pack(">BI", 2, 2) + b"{}", Code.INVALID_ARGUMENT),
        (struct.pack(">BI", 0, 2**22 + 1), Code.RESOURCE_EXHAUSTED),
    ],
)
def test_what_cannot_be_taken_is_named(data: bytes, code: Code) -> None:
    """Compressed messages, a client's trailer, and messages over 4 MiB."""
    with pytest.raises(ConnectError) as caught:
        list(Envelopes().feed(data))
    assert caught.value.code is code


def test_a_request_that_breaks_off_is_no_message() -> None:
    """Half an envelope at the end is an error, not silence."""
    reader = Envelopes()
    assert list(reader.feed(b"\0\0")) == []
    with pytest.raises(ConnectError):
        reader.close()


def test_streams_end_with_a_trailer() -> None:
    """Flag 2, and the error where there is one."""
    assert trailer() == b"\x02\0\0\0\x02{}"
    failed = trailer(ConnectError(Code.NOT_FOUND, "no"))
    assert failed[0] == 2
    assert json.loads(failed[5:]) == {"error": {"code": "not_found", "message": "no"}}
    assert json.loads(envelope({"a": 1})[5:]) == {"a": 1}
