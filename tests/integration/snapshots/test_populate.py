"""Reading a restored kernel's memory from disk in advance."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.pages import cached_bytes, forget, held_bytes
from tests.integration.snapshots.boxes import Box, Boxes, boxes_of
from tests.integration.snapshots.notebooks import keeper, notebook
from tests.integration.snapshots.test_compacting import FIRST, until_finished
from tests.leaks import Places
from warmcell.sandbox.errors import SnapshotNotFoundError
from warmcell.sandbox.models import MIB, SnapshotId
from warmcell.sandbox.snapshots.criu import CriuEngine

pytestmark = pytest.mark.criu

FILL = "import os\nstate = bytearray(os.urandom(1 << 20) * 128)"
"""128 MiB that are not looked at afterwards."""


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


async def saved(boxes: Boxes) -> tuple[Path, Box]:
    """An image of a program with memory that it does not use, none of which is in the page cache; a fresh sandbox."""
    box = await boxes.running(before=FILL, mib=1)
    await boxes.dump(box, FIRST, then="stop")
    await until_finished(boxes, FIRST)
    image = boxes.paths.images / "0" / FIRST
    forget(image)
    return image, await boxes.fresh()


def memory(image: Path) -> list[Path]:
    """Its page files."""
    return list((image / "memory").iterdir())


async def until_cached(image: Path) -> None:
    """Wait until what the image maps is in the page cache, but for little."""
    async with asyncio.timeout(60):
        while sum(map(cached_bytes, memory(image))) < 0.95 * held_bytes(memory(image)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_memory_comes_from_disk_when_it_is_used(boxes: Boxes) -> None:
    """Unless it was asked for before, what a restored program does not look at stays on disk."""
    image, box = await saved(boxes)
    box.kernel = (await boxes.engine.restore(box, image=SnapshotId(FIRST))).pid
    await box.goes_on(past=await box.count() + 20)
    assert sum(map(cached_bytes, memory(image))) < held_bytes(memory(image)) / 2


async def test_memory_is_read_in_advance_where_that_was_asked_for(boxes: Boxes) -> None:
    """It is in the page cache soon, though nothing has used it, and the program goes on with it."""
    image, box = await saved(boxes)
    box.kernel = (await boxes.engine.restore(box, image=SnapshotId(FIRST))).pid
    assert await boxes.engine.populate(SnapshotId(FIRST)) > 128 * MIB
    await until_cached(image)
    await box.goes_on(past=await box.count() + 20)


async def test_an_engine_can_do_it_each_time(boxes: Boxes) -> None:
    """With the operator's setting each restore does it."""
    image, box = await saved(boxes)
    engine = CriuEngine(paths=boxes.paths, populate=True, helper=boxes.engine._helper)
    await engine.restore(box, image=SnapshotId(FIRST))
    await until_cached(image)


async def test_what_is_not_there_cannot_be_read(boxes: Boxes) -> None:
    """An image that was dropped, or never was."""
    with pytest.raises(SnapshotNotFoundError):
        await boxes.engine.populate(SnapshotId("z" * 12))


async def test_a_resume_and_a_restore_can_ask_for_it(places: Places, tmp_path: Path) -> None:
    """In the body of the request; nothing else is different."""
    async with keeper(places) as client, notebook(client, tmp_path) as book:
        await book.run(f"{FILL}\nmark = {uuid.uuid4().hex!r}")
        await book.do("snapshot", name="here")
        told = await book.do("suspend")
        image = places.state / "images" / str(os.getuid()) / told["snapshot"]
        async with asyncio.timeout(60):
            while '"finished": null' in (image / "image.json").read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        forget(image)
        await book.do("resume", populate=True)
        await until_cached(image)
        await book.do("restore", snapshot="here", populate=True)
        assert await book.run("len(state), len(mark)") == "(134217728, 32)"
