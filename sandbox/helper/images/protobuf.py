"""Just enough of protobuf's wire format to read some fields of a message and to change them.

Messages stay bytes. What is not asked for is never decoded, and is kept byte for byte when a field is replaced.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from warmcell.sandbox.helper.images.errors import corrupt

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_FIXED = {FIXED64: 8, FIXED32: 4}


class Field(NamedTuple):
    """One field where it stands: `message[start:end]` is its tag and its value."""

    number: int
    wire: int
    value: int | bytes
    start: int
    end: int


def varint(value: int) -> bytes:
    """Encode `value`, 0 ≤ value < 2**64."""
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} is no unsigned 64-bit number")
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next thing begins.

    Raises:
        ImageError: It does not end, or is too large.
    """
    value = shift = 0
    for byte in data[at : at + _LONGEST_VARINT]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
        shift += 7
    raise corrupt("a number in an image file has no end")


def fields(message: bytes) -> Iterator[Field]:
    """The fields of `message` in their order.

    Raises:
        ImageError: The bytes are no message.
    """
    at, length = 0, len(message)
    while at < length:
        start = at
        tag, at = message[at], at + 1
        if tag > 0x7F:
            tag, at = read_varint(message, start)
        number, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire in (VARINT, BYTES):
            if at < length and message[at] < 0x80:  # As nearly all are; a call takes longer than this.
                size, at = message[at], at + 1
            else:
                size, at = read_varint(message, at)
            value = size
            if wire == BYTES:
                value, at = message[at : at + size], at + size
        elif wire in _FIXED:
            size = _FIXED[wire]
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        else:
            raise corrupt(f"an image file holds a field of unknown kind {wire}")
        if number == 0 or at > length:
            raise corrupt("a message in an image file is cut short")
        yield Field(number, wire, value, start, at)


def numbers(message: bytes) -> dict[int, int]:
    """The plain numbers of `message` by field; the last one wins, as protobuf says.

    By itself, since most of what is read of an image are numbers, and by `fields` that takes twice as long.

    Raises:
        ImageError: The bytes are no message.
    """
    found: dict[int, int] = {}
    at, length = 0, len(message)
    while at < length:
        tag, at = message[at], at + 1
        if tag > 0x7F:
            tag, at = read_varint(message, at - 1)
        wire = tag & 7
        if wire in (VARINT, BYTES):
            if at < length and message[at] < 0x80:
                value, at = message[at], at + 1
            else:
                value, at = read_varint(message, at)
            if wire == VARINT:
                found[tag >> 3] = value
            else:
                at += value
        elif wire in _FIXED:
            size = _FIXED[wire]
            found[tag >> 3] = int.from_bytes(message[at : at + size], "little")
            at += size
        else:
            raise corrupt(f"an image file holds a field of unknown kind {wire}")
        if tag < 8 or at > length:
            raise corrupt("a message in an image file is cut short")
    return found


def repeated(message: bytes, number: int) -> list[int]:
    """The numbers of a repeated field, packed or not.

    Raises:
        ImageError: The bytes are no message.
    """
    return all_repeated(message, (number,))[number]


def all_repeated(message: bytes, wanted: Collection[int]) -> dict[int, list[int]]:
    """The numbers of several repeated fields, each packed or not, by field.

    Raises:
        ImageError: The bytes are no message.
    """
    found: dict[int, list[int]] = {number: [] for number in wanted}
    for field in fields(message):
        if field.number not in found:
            continue
        if isinstance(field.value, int):
            found[field.number].append(field.value)
            continue
        at = 0
        while at < len(field.value):
            value, at = read_varint(field.value, at)
            found[field.number].append(value)
    return found


def inner(message: bytes, number: int) -> bytes | None:
    """The message, string or bytes in field `number` (the last one), None where there is none."""
    found = None
    for field in fields(message):
        if field.number == number and isinstance(field.value, bytes):
            found = field.value
    return found


def encoded(number: int, value: int | bytes) -> bytes:
    """One field: a number as varint, bytes with their length."""
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    return varint(number << 3 | BYTES) + varint(len(value)) + value


def message(values: Mapping[int, int | bytes]) -> bytes:
    """A message of these fields, in the order given."""
    return b"".join(encoded(number, value) for number, value in values.items())


def replaced(data: bytes, values: Mapping[int, int | bytes | None]) -> bytes:
    """`data` with the fields of `values` set (or dropped where None); everything else is kept byte for byte.

    A field stays where it was; one that was not there comes at the end.

    Raises:
        ImageError: The bytes are no message.
    """
    parts: list[bytes] = []
    written: set[int] = set()
    for field in fields(data):
        if field.number not in values:
            parts.append(data[field.start : field.end])
            continue
        value = values[field.number]
        if value is not None and field.number not in written:
            parts.append(encoded(field.number, value))
        written.add(field.number)
    parts += [encoded(number, value) for number, value in values.items() if value is not None and number not in written]
    return b"".join(parts)
