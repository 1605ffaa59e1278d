"""JSON lines as the guest's init reads and writes them: the same as the standard library's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, give_anything
from warmcell.sandbox.guest.supervisor.jsonline import decode, encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=5)


@given(OBJECTS)
def test_what_is_written_is_json_on_one_line(value: dict[str, object]) -> None:
    """The standard library reads back what was written, and there is one newline, at the end."""
    line = encode(value)
    assert json.loads(line) == value
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")


@given(OBJECTS, st.booleans())
def test_what_json_writes_is_read(value: dict[str, object], ascii_only: bool) -> None:
    """Escaped or not, with the line's end or without."""
    assert decode(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@LENGTHS
def test_other_bytes_are_an_error_or_an_object(examples: int) -> None:
    """Nothing but ValueError comes of bytes that are no object, and an object is what the standard library reads."""
    words = st.sampled_from(
        (b"{", b"}", b"[", b"]", b":", b",", b'"a"', b"1", b"1e999", b"null", b"\\ud800", b" ", b"\xff")
    )
    objects = JSON.map(lambda value: json.dumps({"a": value}).encode())
    inputs = st.one_of(st.binary(max_size=60), st.lists(words, max_size=12).map(b"".join), objects)

    def read(data: bytes) -> None:
        value = decode(data)
        assert json.dumps(value) == json.dumps(json.loads(data))

    give_anything(inputs, read, refusals=ValueError, examples=examples, sound=[b"{}"], broken=[b"[]"])


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '"x"', "{", '{"a"', '{"a": }', '{"a": 1} x', '{"a": NaN}', "[" * 10**6]
)
def test_what_is_no_object_is_refused(text: str) -> None:
    """Other values, halves, leftovers, NaN and absurd depth raise ValueError."""
    with pytest.raises(ValueError):
        decode(text.encode())
