"""The two forms that a message of Jupyter's has on a WebSocket, read from whoever is connected and written to them."""

import itertools
import json
import struct
from typing import Any, Final

CHANNELS: Final = ("shell", "control", "stdin")
"""Those that a client may send on."""

NAMES: Final = ("header", "parent_header", "metadata", "content")
PARTS_MAX: Final = 1024


def from_v1(data: bytes) -> tuple[str, list[bytes]]:
    """The channel and the parts of a message in the form `v1.kernel.websocket.jupyter.org`.

    Raises:
        ValueError: It is none, or for no channel that a client may send on.
    """
    count = int.from_bytes(data[:8], "little")
    start = 8 * (count + 1)
    if not len(NAMES) + 2 <= count <= PARTS_MAX or len(data) < start:
        raise ValueError("not as many offsets as it says")
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    channel, *parts = _cut(data, start, offsets)
    return _checked(channel.decode("ascii", "replace")), parts


def to_v1(channel: str, parts: list[bytes]) -> bytes:
    """A message in that form."""
    pieces = [channel.encode(), *parts]
    offsets = [8 * (len(pieces) + 2)]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(pieces)


def from_json(message: bytes | str) -> tuple[str, list[bytes]]:
    """The channel and the parts of a message that is JSON, or binary where it has buffers.

    Raises:
        ValueError: It is none, or for no channel that a client may send on.
    """
    buffers: list[bytes] = []
    if isinstance(message, bytes):
        count = int.from_bytes(message[:4], "big")
        start = 4 * (count + 1)
        if not 1 <= count <= PARTS_MAX or len(message) < start:
            raise ValueError("not as many offsets as it says")
        offsets = struct.unpack_from(f">{count}I", message, 4)
        message, *buffers = _cut(message, start, (*offsets, len(message)))
    try:
        read = json.loads(message)
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(read, dict) or not all(isinstance(read.get(name), dict) for name in NAMES):
        raise ValueError("no message")
    parts = [json.dumps(read[name]).encode() for name in NAMES]
    return _checked(read.get("channel", "shell")), [*parts, *buffers]


def to_json(channel: str, parts: list[bytes]) -> str | bytes:
    """A message in that form."""
    told: dict[str, Any] = {name: json.loads(part) for name, part in zip(NAMES, parts, strict=False)}
    told |= {name: told["header"].get(name) for name in ("msg_id", "msg_type")}
    buffers = parts[len(NAMES) :]
    if not buffers:
        return json.dumps({**told, "buffers": [], "channel": channel})
    pieces = [json.dumps({**told, "channel": channel}).encode(), *buffers]
    offsets = [4 * (len(pieces) + 1)]
    for piece in pieces[:-1]:
        offsets.append(offsets[-1] + len(piece))
    return struct.pack(f">{len(pieces) + 1}I", len(pieces), *offsets) + b"".join(pieces)


def _cut(data: bytes, start: int, offsets: tuple[int, ...]) -> list[bytes]:
    """What is between each two offsets, the first of which is the beginning."""
    if offsets[0] != start or offsets[-1] > len(data) or list(offsets) != sorted(offsets):
        raise ValueError("offsets that make no sense")
    return [data[begin:end] for begin, end in itertools.pairwise(offsets)]


def _checked(channel: object) -> str:
    if channel not in CHANNELS:
        raise ValueError(f"{channel!r:.32} is no channel to send on")
    return str(channel)
