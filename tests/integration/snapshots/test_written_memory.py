"""Memory that a restored kernel writes again and again: each restore maps it anew, and none takes longer for it."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.integration.snapshots.boxes import Box, Boxes, boxes_of
from tests.integration.snapshots.test_compacting import page_files, until_finished
from tests.leaks import Places
from warmcell.sandbox.helper import compacting
from warmcell.sandbox.helper.shelf import Shelf
from warmcell.sandbox.models import MIB, SnapshotId

pytestmark = pytest.mark.criu

BEFORE = """
import hashlib, random
array = bytearray(random.Random(0).randbytes(1 << 20) * {mib})
total = hashlib.sha256(array).hexdigest()

def all_of_it(source):
    block = source.randbytes(1 << 20)
    for at in range(0, len(array), 1 << 20):
        array[at : at + (1 << 20)] = block

def parts_of_it(source):
    block = source.randbytes(1 << 20)
    for length, count in ((1, 200), (40_000, 100), (1 << 20, 20)):
        for _ in range(count):
            at = source.randrange(len(array) - length)
            array[at : at + length] = block[:length]

def asked():
    global total
    try:
        with open("/tmp/ask") as file:
            what, seed = file.read().split()
    except FileNotFoundError:
        return
    same = hashlib.sha256(array).hexdigest() == total
    if what != "look":
        globals()[what](random.Random(int(seed)))
        total = hashlib.sha256(array).hexdigest()
    os.unlink("/tmp/ask")
    with open("/tmp/.answer", "w") as file:
        file.write(str(same))
    os.rename("/tmp/.answer", "/tmp/answer")
"""


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


async def ask(box: Box, what: str, seed: int = 0) -> None:
    """Have it look whether its array is as it was, and write some or all of it."""
    await box.sh(f"rm -f /tmp/answer; echo {what} {seed} > /tmp/.ask; mv /tmp/.ask /tmp/ask")
    async with asyncio.timeout(60):
        while not (answer := await box.sh("cat /tmp/answer 2>/dev/null")):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert answer == "True"


async def own_bytes(box: Box) -> int:
    """Memory that is its own: neither a file's nor shared with others."""
    return 1024 * int((await box.sh(f"grep ^Anonymous: /proc/{box.kernel}/smaps_rollup")).split()[1])


async def areas(box: Box) -> int:
    """In how many its memory is."""
    return int(await box.sh(f"wc -l < /proc/{box.kernel}/maps"))


async def again(boxes: Boxes, box: Box, number: int) -> Box:
    """What was in a sandbox, in another one; of its images only the newest is left."""
    await boxes.dump(box, f"{number:012d}", then="stop")
    await until_finished(boxes, f"{number:012d}")
    restored = await boxes.restored(f"{number:012d}")
    await box.instance.stop()
    if number:
        await boxes.engine.drop(SnapshotId(f"{number - 1:012d}"))
    return restored


def on_disk(boxes: Boxes, image: str) -> tuple[int, int]:
    """What each restore copies, and what the memory takes in all, in bytes."""
    place = boxes.paths.images / "0" / image
    copied = sum(path.stat().st_size for path in place.glob("pages-*.img"))
    return copied, copied + sum(path.stat().st_blocks * 512 for path in (place / "memory").iterdir())


async def test_memory_that_was_all_written_is_mapped_as_at_first(boxes: Boxes) -> None:
    """300 MB that a restored program wrote once more cost the next restore as little as they did the first."""
    box = await boxes.running(before=BEFORE.format(mib=300), each="asked()", mib=1)
    box = await again(boxes, box, 0)
    first, pieces = await own_bytes(box), await areas(box)
    assert first < 32 * MIB
    await ask(box, "all_of_it", 1)
    assert await own_bytes(box) > 300 * MIB
    box = await again(boxes, box, 1)
    await ask(box, "look")
    assert await own_bytes(box) < first + 16 * MIB
    assert await areas(box) < pieces + 100
    copied, taken = on_disk(boxes, "000000000001")
    assert copied < 16 * MIB
    assert taken < 2 * 320 * MIB
    assert len(page_files(boxes, "000000000001")) <= 2


async def test_memory_that_is_written_in_parts_stays_bounded(boxes: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rounds of writing here and there: areas, copies and page files are few, and all can be put in order."""
    box = await boxes.running(before=BEFORE.format(mib=64), each="asked()", mib=1)
    for number in range(10):
        box = await again(boxes, box, number)
        assert await own_bytes(box) < 40 * MIB
        assert await areas(box) < 2000
        copied, taken = on_disk(boxes, f"{number:012d}")
        assert copied < 32 * MIB
        assert taken < 2 * 64 * MIB + compacting.IDLE_BYTES
        await ask(box, "parts_of_it", number)
    box = await again(boxes, box, 10)
    await ask(box, "look")
    monkeypatch.setattr(compacting, "JOINTS", 0)
    async with asyncio.timeout(60):  # The helper may be about to do the same, and only one of them can.
        while len(page_files(boxes, f"{10:012d}")) > 1:
            await asyncio.to_thread(compacting.attend, Shelf(str(boxes.paths.images), 0), f"{10:012d}")
    fresh = await boxes.restored(f"{10:012d}")
    await ask(fresh, "look")
    assert await areas(fresh) < 150
    assert await own_bytes(fresh) < 16 * MIB
