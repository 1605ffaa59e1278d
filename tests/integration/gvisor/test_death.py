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
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import OperationTimeoutError, SnapshotError, WarmcellError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.gvisor import GvisorEngine

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


async def test_what_a_killed_keeper_was_saving_is_removed_by_the_next(boxes: Boxes) -> None:
    """Unfinished images before it saves any itself, and nothing else; one that is damaged is told, so that whoever has
    no snapshot of it can remove it.
    """
    whole, damaged = await boxes.image(), await boxes.image()
    base = boxes.engine.kept.path(whole).parent
    (base / ".unfinished").mkdir()
    (base / ".unfinished" / "pages.img").write_bytes(b"x" * 4096)
    (boxes.engine.kept.path(damaged) / "about.json").write_text("{")
    (base / ".tried.json").write_text("{}")
    following = GvisorEngine(paths=boxes.paths, backend=boxes.backend)
    found = {image.id: image.image_bytes for image in await following.images()}
    assert found.keys() == {whole, damaged}
    assert min(found.values()) > 0
    assert {path.name for path in base.iterdir()} == {whole, damaged, ".tried.json"}
    under_way = following.kept.draft(SnapshotId("b" * 12))
    await following.images()
    assert under_way.is_dir()


async def test_a_leave_that_is_given_up_loses_no_sandbox(boxes: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Init may have left when the answer is late, or leave later: it comes back each time, and there is no image."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    await kernel.run("kept = 'kept'")
    really = GuestChannel.leave

    async def late(channel: GuestChannel, until: str) -> None:
        await really(channel, until)
        raise OperationTimeoutError("it was late")

    with monkeypatch.context() as patched:
        patched.setattr(GuestChannel, "leave", late)
        with pytest.raises(OperationTimeoutError):
            await boxes.save(box, kernel)
    kernel = await box.kernel_again(kernel)
    assert await kernel.value("kept") == "kept"

    os.kill(box.instance.pid, signal.SIGSTOP)
    saving = asyncio.ensure_future(boxes.save(box, kernel))
    await asyncio.sleep(0.2)
    asyncio.get_running_loop().call_later(0.2, os.kill, box.instance.pid, signal.SIGCONT)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    kernel = await box.kernel_again(kernel)
    assert await kernel.value("kept") == "kept"
    assert await boxes.engine.images() == []
    kernel.client.stop_channels()


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
