"""Both forms of a message on a WebSocket: read as written, by Jupyter's own code too, and junk is refused."""

import json
from collections.abc import Callable
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)

from tests.anything import LENGTHS, give_anything
from warmcell.extension.server.jupyter_api.forms import from_json, from_v1, to_json, to_v1

CHANNEL = st.sampled_from(["shell", "control", "stdin"])
OBJECT = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3)
PARTS = st.tuples(st.tuples(*[OBJECT] * 4), st.lists(st.binary(max_size=20), max_size=4)).map(
    lambda told: [*(json.dumps(one).encode() for one in told[0]), *told[1]]
)


def refused(read: Callable[[Any], object], data: bytes | str) -> bool:
    """Whether that is no message, and nothing worse."""
    try:
        read(data)
    except ValueError:
        return True
    return False


@given(CHANNEL, PARTS)
def test_what_is_written_is_read_again(channel: str, parts: list[bytes]) -> None:
    """In either form, by us and by Jupyter's own functions, which also write what we read."""
    assert from_v1(to_v1(channel, parts)) == (channel, parts)
    assert deserialize_msg_from_ws_v1(to_v1(channel, parts)) == (channel, parts)
    assert from_v1(serialize_msg_to_ws_v1(parts, channel)) == (channel, parts)
    written = to_json(channel, parts)
    assert isinstance(written, bytes) == (len(parts) > 4)
    assert from_json(written) == (channel, parts)
    if isinstance(written, bytes):
        theirs = deserialize_binary_message(written)
        assert theirs["buffers"] == parts[4:]
        assert from_json(serialize_binary_message(theirs)) == (channel, parts)


def read(drawn: tuple[Callable[[Any], tuple[str, list[bytes]]], bytes | str]) -> None:
    """What was found, which is of no more than what came; JSON that is written again may be longer."""
    form, data = drawn
    if isinstance(data, str) and form is from_v1:
        form = from_json
    _, found = form(data)
    assert sum(map(len, found)) <= 8 * len(data)


def altered(drawn: tuple[bytes, int, bytes]) -> bytes:
    """A message of which some bytes are others."""
    data, at, other = drawn
    return data[: at % len(data)] + other + data[at % len(data) + len(other) :]


WRITTEN = st.one_of(
    st.tuples(CHANNEL, PARTS).map(lambda one: (from_v1, to_v1(*one))),
    st.tuples(CHANNEL, PARTS).map(lambda one: (from_json, cast(bytes, to_json(one[0], [*one[1], b"x"])))),
)
CHANGED = st.tuples(WRITTEN, st.integers(0, 500), st.binary(max_size=3)).map(
    lambda one: (one[0][0], altered((one[0][1], one[1], one[2])))
)
JUNK = st.tuples(st.sampled_from((from_v1, from_json)), st.binary(max_size=200) | st.text(max_size=50))


@LENGTHS
def test_any_message_is_read_or_refused(examples: int) -> None:
    """Junk, whatever it says of its own size, and sound messages of either form with other bytes in them."""
    give_anything(
        CHANGED | JUNK, read, refusals=ValueError, examples=examples, broken=[(from_v1, b""), (from_json, "7")]
    )


def test_what_a_kernel_alone_says_is_no_clients() -> None:
    """There is no sending on iopub, nor anything too deep to be read."""
    parts = [b"{}"] * 4
    for junk in (to_v1("iopub", parts), to_v1("", parts), to_v1("shell", parts[:2]), b"\xff" * 64):
        assert refused(from_v1, junk)
    for text in ('{"channel": "iopub", "header": {}}', "[" * 100_000, "7", "{}"):
        assert refused(from_json, text)
