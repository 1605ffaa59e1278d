"""Both forms of a message on a WebSocket: read as written, by Jupyter's own code too, and junk is refused."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)

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


@settings(max_examples=2000)
@given(st.binary(max_size=200) | st.text(max_size=50))
def test_junk_is_refused(data: bytes | str) -> None:
    """Whatever it says of its own size: with the one error that there is."""
    if isinstance(data, bytes):
        assert refused(from_v1, data)
    assert refused(from_json, data)


@given(CHANNEL, PARTS, st.data())
def test_a_message_that_was_changed_is_read_or_refused(channel: str, parts: list[bytes], data: st.DataObject) -> None:
    """Any byte of either form."""
    for written, read in ((to_v1(channel, parts), from_v1), (to_json(channel, [*parts, b"x"]), from_json)):
        assert isinstance(written, bytes)
        at = data.draw(st.integers(0, len(written) - 1))
        changed = written[:at] + bytes([data.draw(st.integers(0, 255))]) + written[at + 1 :]
        try:
            _, found = read(changed)
        except ValueError:
            continue
        assert sum(map(len, found)) <= 8 * len(changed)  # JSON that is written again may be longer


def test_what_a_kernel_alone_says_is_no_clients() -> None:
    """There is no sending on iopub, nor anything too deep to be read."""
    parts = [b"{}"] * 4
    for junk in (to_v1("iopub", parts), to_v1("", parts), to_v1("shell", parts[:2]), b"\xff" * 64):
        assert refused(from_v1, junk)
    for text in ('{"channel": "iopub", "header": {}}', "[" * 100_000, "7", "{}"):
        assert refused(from_json, text)
