"""However a gVisor sandbox ends, and whoever ends it, nothing of it is left."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import paths_of
from tests.integration.bubblewrap.test_death import KEEPER, gone, killed_keeper
from tests.integration.gvisor.boxes import Boxes, boxes_of
from tests.leaks import Places
from warmcell.sandbox.backends.leftovers import clean_leftovers
from warmcell.sandbox.errors import SnapshotError, WarmcellError

pytestmark = pytest.mark.gvisor

MOMENTS_S = (0.0, 0.1, 0.4)
"""Before, in and after a step, on machines of any speed."""


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


@pytest.mark.parametrize("kind", ["gvisor", "standing"])
async def test_a_killed_keeper_takes_its_sandboxes_along(places: Places, kind: str) -> None:
    """Every process of gVisor's, also of those that wait for an image and are stopped, without anybody cleaning up; the
    next keeper removes the files.
    """
    pids = await killed_keeper([sys.executable, KEEPER, kind, "2"])
    assert len(pids) >= 2 * 3
    await gone(pids)
    removed = await asyncio.to_thread(clean_leftovers, paths_of(places))
    assert [line for line in removed if str(places.runtime) in line]
    assert list(paths_of(places).sandboxes.iterdir()) == []


@pytest.mark.parametrize("which", ["runsc", "sandbox", "gofer"])
async def test_whichever_process_is_killed_the_sandbox_ends(boxes: Boxes, which: str) -> None:
    """Its end is told, and its stop leaves nothing. Each of them has a system call filter."""
    box = await boxes.make()
    pids = box.instance.processes()
    assert all("Seccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text() for pid in pids), "a filter is not there"
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in pids}
    victim = {
        "runsc": pids[0],
        "sandbox": box.instance.pid,
        "gofer": next(pid for pid, name in names.items() if name.endswith(b"runsc-gofer")),
    }[which]
    os.kill(victim, signal.SIGKILL)
    if which == "gofer":  # Nobody watches it: whatever needs a file of the host fails, and whoever sees that stops it.
        await box.instance.stop()
    ended = await asyncio.wait_for(box.instance.wait(), 10)
    assert ended.exit_code == 137
    await box.instance.stop()
    await gone(pids)


async def test_killed_while_it_is_saved_it_leaves_no_image(boxes: Boxes) -> None:
    """Whoever asked for the snapshot is told."""
    for moment_s in MOMENTS_S:
        box = await boxes.make()
        kernel = await box.start_kernel()
        saving = asyncio.ensure_future(boxes.save(box, kernel))
        await asyncio.sleep(moment_s)
        done = saving.done()
        os.kill(box.instance.pid, signal.SIGKILL)
        (outcome,) = await asyncio.gather(saving, return_exceptions=True)
        pids = box.instance.processes()
        await box.instance.stop()
        await gone(pids)
        images = await boxes.engine.images()
        if isinstance(outcome, BaseException):
            assert not done
            assert isinstance(outcome, WarmcellError), repr(outcome)
            assert images == []
        else:
            assert [image.id for image in images] == [outcome]
            await boxes.engine.drop(outcome)


async def test_killed_while_it_is_restored_it_can_be_restored_again(boxes: Boxes) -> None:
    """A start that is given up, or whose process is killed, leaves the image as it was, and nothing else."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    await kernel.run("kept = 'kept'")
    image = await boxes.save(box, kernel, then="stop")
    await box.instance.stop()
    for moment_s in MOMENTS_S:
        restoring = asyncio.ensure_future(boxes.make(image=image))
        await asyncio.sleep(moment_s)
        restoring.cancel()
        (outcome,) = await asyncio.gather(restoring, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError) or not isinstance(outcome, BaseException)
    again = await (await boxes.make(image=image)).kernel_again(kernel)
    assert await again.value("kept") == "kept"
    again.client.stop_channels()


async def test_a_damaged_image_is_an_error_and_nothing_is_left(boxes: Boxes) -> None:
    """One that has the right sizes, so that only gVisor finds out."""
    image = await boxes.image()
    path = boxes.engine.kept.path(image) / "checkpoint.img"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(SnapshotError) as failed:
        await boxes.make(image=image)
    assert failed.value.hint


async def test_a_runsc_that_does_not_answer_is_ended_too(boxes: Boxes) -> None:
    """As one whose sandbox is killed as it starts, which waits for ever: nothing is left, and that is no error."""
    box = await boxes.make()
    runsc = box.instance.processes()[0]
    os.kill(runsc, signal.SIGSTOP)
    await box.instance.stop()
    assert box.instance.processes() == ()
    assert not Path(f"/proc/{runsc}").exists()
