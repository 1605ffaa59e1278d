"""What a restore that fails leaves of its kernel, and what it leaves alone, in a sandbox that goes on."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from tests.integration.snapshots.boxes import Boxes, boxes_of
from tests.leaks import Places
from warmcell.sandbox.errors import ConflictError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.criu import helper_environment

pytestmark = pytest.mark.criu

IMAGE = "a" * 12


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


FAILS_AT_THE_END = """
import os, sys
from warmcell.sandbox.helper import enter, places, probe, program, restore
from warmcell.sandbox.helper.shelf import Shelf

base, image, pid = sys.argv[1:]
found = program.find(os.environ)
nothing, cache = probe.nothing(base), probe.cache(found, base)
source = restore.Source(found, Shelf(base, 0), image, nothing=nothing, cache=cache)

def full(*_):
    raise OSError("no control group takes it")

enter.hold_limits = full
restoring = restore.Restoring(source, places.identify(os.pidfd_open(int(pid)), 0), told=print)
try:
    while restoring.step() is None:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
except OSError as error:
    print(error)
finally:
    restoring.end()
"""


async def test_a_kernel_that_cannot_be_set_going_is_not_left(boxes: Boxes) -> None:
    """CRIU has done its part by then. What it has made would keep its memory, and its number from the next restore."""
    source = await boxes.running()
    await boxes.dump(source, IMAGE, then="stop")
    box = await boxes.fresh()
    argv = [sys.executable, "-c", FAILS_AT_THE_END, str(boxes.paths.images), IMAGE, str(box.pid)]
    env = {**os.environ, **helper_environment()}
    told = await asyncio.to_thread(
        subprocess.run, argv, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert told.stdout == "no control group takes it\n", told.stderr
    assert source.kernel not in await box.numbers()
    box.kernel = (await boxes.engine.restore(box, image=SnapshotId(IMAGE))).pid
    await box.goes_on()


async def test_who_has_the_number_of_a_kernel_lives_on(boxes: Boxes) -> None:
    """It is why the restore fails, and it was there before."""
    source = await boxes.running()
    await boxes.dump(source, IMAGE, then="stop")
    box = await boxes.fresh(enrolled=True)
    started = {int(number) for number in (await box.sh("for i in 1 2 3 4 5 6; do sleep 600 & echo $!; done")).split()}
    assert source.kernel in started
    with pytest.raises(ConflictError, match="has a number that the snapshot needs"):
        await boxes.engine.restore(box, image=SnapshotId(IMAGE))
    assert started <= {*await box.numbers()}
