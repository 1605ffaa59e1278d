"""The wire format of image files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from warmcell.sandbox.helper.images import criu, pagemap, protobuf
from warmcell.sandbox.helper.images.errors import ImageError

NUMBERS = st.integers(0, (1 << 64) - 1)
KEYS = st.integers(1, 200)
MESSAGES = st.lists(st.tuples(KEYS, st.one_of(NUMBERS, st.binary(max_size=20))), max_size=10)


def encoded(pairs: list[tuple[int, int | bytes]]) -> bytes:
    return b"".join(protobuf.encoded(key, value) for key, value in pairs)


@given(NUMBERS)
def test_numbers_survive(value: int) -> None:
    """What is written is read."""
    raw = protobuf.varint(value)
    assert protobuf.read_varint(raw + b"rest", 0) == (value, len(raw))


@given(MESSAGES)
def test_messages_survive(pairs: list[tuple[int, int | bytes]]) -> None:
    """Fields come back in their order, with the bytes where they stood."""
    data = encoded(pairs)
    found = list(protobuf.fields(data))
    assert [(field.number, field.value) for field in found] == pairs
    assert b"".join(data[field.start : field.end] for field in found) == data


@given(MESSAGES, KEYS, NUMBERS)
def test_replacing_a_field_keeps_the_others(pairs: list[tuple[int, int | bytes]], key: int, value: int) -> None:
    """Unknown fields stay byte for byte and in their order."""
    changed = protobuf.replaced(encoded(pairs), {key: value})
    assert [(f.number, f.value) for f in protobuf.fields(changed) if f.number != key] == [
        p for p in pairs if p[0] != key
    ]
    assert [f.value for f in protobuf.fields(changed) if f.number == key] == [value]


@LENGTHS
def test_any_bytes_end(examples: int) -> None:
    """Bytes from nowhere are a message, a file of an image, a page map, or an error, soon."""

    def read(data: bytes) -> None:
        assert sum(field.end - field.start for field in protobuf.fields(data)) == len(data)
        protobuf.numbers(data)

    whole = st.one_of(st.binary(max_size=60), MESSAGES.map(encoded))
    give_anything(whole, read, refusals=ImageError, examples=examples, sound=[b""], broken=[b"\xff" * 20])
    files = st.lists(whole, max_size=4).flatmap(
        lambda payloads: st.tuples(st.just(criu.joined("pagemap", payloads)), st.integers(0, 90), st.binary(max_size=9))
    )
    give_anything(
        files.map(lambda drawn: drawn[0][: len(drawn[0]) - drawn[1] % 30] + drawn[2]),
        lambda data: (criu.messages(data, "pagemap", name="pagemap-1.img"), pagemap.parse(data, name="pagemap-1.img")),
        refusals=ImageError,
        examples=examples,
        sound=[pagemap.joined(protobuf.message({1: 3}), [pagemap.entry(4096, 1, 4)])],
        broken=[b"", criu.header("pagemap"), criu.joined("pagemap", [b""])],
    )


@given(st.one_of(st.binary(max_size=60), MESSAGES.map(encoded)))
def test_numbers_are_those_of_the_fields(data: bytes) -> None:
    """What reads numbers by itself reads what `fields` does, and refuses what that refuses."""
    try:
        expected = {field.number: field.value for field in protobuf.fields(data) if isinstance(field.value, int)}
    except ImageError as error:
        with pytest.raises(ImageError, match=str(error)):
            protobuf.numbers(data)
    else:
        assert protobuf.numbers(data) == expected


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_image_files_survive(payloads: list[bytes]) -> None:
    """Messages of a file come back as they were."""
    assert criu.messages(criu.joined("mm", payloads), "mm", name="mm-1.img") == payloads


def test_packed_and_single_numbers_are_both_read() -> None:
    """Protobuf allows both for a repeated field."""
    assert protobuf.repeated(encoded([(5, 1), (5, b"\x02\x80\x01"), (5, 3)]), 5) == [1, 2, 128, 3]


@pytest.mark.parametrize(
    "data", [b"", b"\x19CVT", criu.header("files"), criu.header("mm") + b"\x05\0\0\0ab", b"\0" * 40]
)
def test_other_files_are_refused(data: bytes) -> None:
    """No magic number, another kind, or cut short."""
    with pytest.raises(ImageError, match=r"mm-1\.img is"):
        criu.messages(data, "mm", name="mm-1.img")


ENTRIES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 700), st.sampled_from([2, 4, 6])), max_size=30)


@given(ENTRIES, st.sampled_from([0, 1 << 9, 1 << 21, 0x7F1234567]), st.booleans())
def test_page_maps_are_read_the_same_both_ways(entries: list[tuple[int, int, int]], base: int, unusual: bool) -> None:
    """Entries in CRIU's usual form and others give the same lists."""
    page, wanted, raw = base, [], []
    for gap, count, flags in entries:
        page += gap
        wanted.append((page * 4096, count, flags))
        entry = pagemap.entry(page * 4096, count, flags)
        raw.append(criu.framed(entry[4:] + b"\xa2\x06\x01x") if unusual else entry)
        page += count
    data = pagemap.joined(protobuf.message({1: 3}), raw)
    found = pagemap.parse(data, name="pagemap-1.img")
    assert list(zip(found.starts, found.counts, found.flags, strict=True)) == wanted
    assert found.raw == raw
    assert found.pages_id == 3
    assert found.bytes_in_file == sum(count for _, count, flags in wanted if flags & 4) * 4096
    assert pagemap.joined(found.head, found.raw) == data


@pytest.mark.parametrize(
    "entries",
    [
        [(4096, 2, 4), (8192, 1, 4)],
        [(8192, 1, 4), (4096, 1, 4)],
        [(4097, 1, 4)],
        [(4096, 0, 4)],
        [(1 << 63, 1 << 52, 4)],
    ],
)
def test_impossible_page_maps_are_corrupt(entries: list[tuple[int, int, int]]) -> None:
    """Overlapping, out of order, not on page borders, empty, or past the end of memory."""
    data = pagemap.joined(protobuf.message({1: 1}), [pagemap.entry(*entry) for entry in entries])
    with pytest.raises(ImageError):
        pagemap.parse(data, name="pagemap-1.img")


def test_runs_end_where_pages_are_not_in_the_page_file() -> None:
    """Entries side by side are one run, but for those without content, which take no place in the page file."""
    entries = [(4096, 2, 6), (12288, 1, 4), (16384, 3, 2), (28672, 2, 4), (40960, 1, 4)]
    data = pagemap.joined(protobuf.message({1: 1}), [pagemap.entry(*entry) for entry in entries])
    found = [(run.start, run.end, run.offset_bytes) for run in pagemap.runs(pagemap.parse(data, name="pagemap-1.img"))]
    assert found == [(4096, 16384, 0), (28672, 36864, 12288), (40960, 45056, 20480)]
