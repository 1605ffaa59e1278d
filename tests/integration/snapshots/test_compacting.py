"""Kernels that are suspended again and again: what their images hang on stays bounded."""

import asyncio
import errno
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.snapshots.boxes import Boxes, boxes_of
from tests.leaks import Places
from warmcell.sandbox.helper import compacting
from warmcell.sandbox.helper.shelf import Shelf
from warmcell.sandbox.models import SnapshotId

pytestmark = pytest.mark.criu

CYCLES = 12
FIRST, SECOND = "a" * 12, "b" * 12
GROWS = (
    "count % 20 or (more.append(os.urandom(2 << 20)), sums.append(hash(more[-1]))); "
    "assert count % 20 or [hash(bytes(bytearray(each)))==its for each, its in zip(more, sums)].count(False) == 0"
)
"""Takes another two MiB in each cycle, and looks whether all that it has is as it was."""

CHANGES = (
    "at = count // 5 % 16 << 20; data[at : at + (1 << 20) : 8192] = bytes([count % 251]) * 128; "
    "first = zlib.crc32(data) if count % 20 == 0 else first"
)
"""Changes every other page of a part of its memory at each step, and goes on to the next part after five."""


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


def page_files(boxes: Boxes, image: str) -> list[str]:
    about = json.loads((boxes.paths.images / "0" / image / "image.json").read_text())
    found: list[str] = about["about"]["memory"]
    return found


async def until_finished(boxes: Boxes, image: str) -> None:
    """Wait until nothing is done with an image in the background."""
    place = boxes.paths.images / "0"
    deadline = time.monotonic() + 120
    while any(path.name.startswith((".new-", "..new-")) for path in place.iterdir()) or (
        '"finished": null' in (place / image / "image.json").read_text()
    ):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_chain_stays_short(boxes: Boxes) -> None:
    """After twelve suspensions it counts on with all its memory, from a bounded number of page files."""
    box = await boxes.running(before="more, sums = [], []", each=GROWS)
    images = [f"{number:012d}" for number in range(CYCLES)]
    lengths, seen = [], 0
    for image in images:
        seen = await box.goes_on(past=seen + 20)
        await boxes.dump(box, image, then="stop")
        await until_finished(boxes, image)
        async with asyncio.timeout(120):
            while (length := len(page_files(boxes, image))) > compacting.LONG:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        lengths.append(length)
        if image != images[0]:
            await boxes.engine.drop(SnapshotId(images[images.index(image) - 1]))
        box = await boxes.restored(image)
        await box.goes_on(past=seen)
    assert any(after < before for before, after in itertools.pairwise(lengths)), lengths
    kept = [path for path in (boxes.paths.images / "0" / ".pages").iterdir() if "." not in path.name]
    assert len(kept) <= 2 * compacting.LONG
    await box.goes_on(past=await box.count() + 60)


async def test_an_image_that_is_being_restored_is_left_alone(boxes: Boxes) -> None:
    """It can be restored before, meanwhile and after, and what is restored counts on."""
    box = await boxes.running(before="more, sums = [], []", each=GROWS)
    for number in range(compacting.LONG + 1):
        await boxes.dump(box, f"{number:012d}")
        await until_finished(boxes, f"{number:012d}")
        box = await boxes.restored(f"{number:012d}")
        await box.goes_on(past=await box.count() + 20)
    image = "z" * 12
    seen = await box.count()
    await boxes.dump(box, image, then="stop")
    clones = [await boxes.restored(image) for _ in range(6)]
    await until_finished(boxes, image)
    clones.append(await boxes.restored(image))
    for clone in clones:
        await clone.goes_on(past=seen + 20)


async def test_what_was_changed_is_mapped_again(boxes: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of which single pages were changed after a restore is copied by the next ones, until it is compacted."""
    box = await boxes.running(each=CHANGES, mib=16)
    await boxes.dump(box, FIRST, then="stop")
    box = await boxes.restored(FIRST)
    seen = await box.goes_on(past=await box.count() + 90)  # Each part has had its turn.
    await boxes.dump(box, SECOND, then="stop")
    await until_finished(boxes, SECOND)
    copied = boxes.paths.images / "0" / SECOND / "pages-1.img"
    before = copied.stat().st_size
    shelf = Shelf(str(boxes.paths.images), 0)
    assert not compacting.attend(shelf, SECOND)
    monkeypatch.setattr(compacting, "COPIED_BYTES", 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(compacting, "compact", full)
        assert not compacting.attend(shelf, SECOND)
    assert not [path for path in (boxes.paths.images / "0").iterdir() if path.name.startswith((".new-", "..new-"))]
    async with asyncio.timeout(120):  # The helper may still be looking at it, and then it is left alone.
        while not await asyncio.to_thread(compacting.attend, shelf, SECOND):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not compacting.attend(shelf, SECOND)
    assert copied.stat().st_size < before / 4
    await boxes.engine.drop(SnapshotId(FIRST))
    for _ in range(2):
        clone = await boxes.restored(SECOND)
        await clone.goes_on(past=seen + 40)


def full(*args: object, **options: object) -> None:
    """A disk without room."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_one_that_is_not_there_is_none_to_be_compacted(tmp_path: Path) -> None:
    """It was dropped a moment ago."""
    assert not compacting.attend(Shelf(str(tmp_path / "images"), 0), FIRST)
