"""Sandboxes that stand by: all of runsc's is there, nothing runs in them, and any image of their kind goes on there."""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.keeper import state_of, still
from tests.integration.bubblewrap.test_death import gone
from tests.integration.gvisor.boxes import Box, Boxes, boxes_of
from tests.integration.snapshots.notebooks import keeper, notebook
from tests.integration.snapshots.test_twins import until, waiting
from tests.leaks import Places
from warmcell.sandbox.backends.gvisor import GvisorInstance
from warmcell.sandbox.backends.gvisor.instance import LAST_WORDS_S
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import SnapshotError, SnapshotIncompatibleError
from warmcell.sandbox.models import SandboxId, SandboxSpec

pytestmark = pytest.mark.gvisor

SHORT_S = LAST_WORDS_S / 2


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


@contextlib.asynccontextmanager
async def standing(boxes: Boxes, places: Places, spec: SandboxSpec | None = None) -> AsyncIterator[GvisorInstance]:
    """One that waits; nothing of it is left afterwards."""
    sandbox_id = SandboxId(secrets.token_hex(6))
    directory = places.runtime / "s" / sandbox_id
    directory.mkdir(mode=0o700)
    maker = boxes.engine.maker(boxes.backend, None)
    instance = await maker.create(spec or boxes.spec(), sandbox_id=sandbox_id, directory=directory)
    try:
        yield instance
    finally:
        pids = instance.processes()
        await instance.stop()
        await gone(list(pids))
        assert list(directory.iterdir()) == []
        directory.rmdir()


async def test_any_image_goes_on_there(boxes: Boxes, places: Places) -> None:
    """At once, or after a while, in which it takes no processor: its kernel is stopped, and nothing else is busy."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    for turn in range(2):
        await kernel.run(f"x = {turn}")
        image = await boxes.save(box, kernel)
        async with standing(boxes, places) as instance:
            assert instance.stands_by
            if turn:
                await still(instance)
            assert (await boxes.engine.restore(instance, image=image)).pid == kernel.pid
            assert not instance.stands_by
            assert "T" not in {state_of(pid) for pid in instance.processes()}
            there = Box(instance, instance.run_directory.parent, await GuestChannel.open(instance.run_directory))
            again = await there.kernel_again(kernel)
            assert await again.value("x") == turn
            again.client.stop_channels()
        kernel = await box.kernel_again(kernel)
    kernel.client.stop_channels()


async def test_one_that_nobody_wants_goes_at_once(boxes: Boxes, places: Places) -> None:
    """Whether it is still coming up or is stopped: nobody waits for the last words of who has none."""
    for rests in (False, True):
        async with standing(boxes, places) as instance:
            if rests:
                await still(instance)
            began = time.monotonic()
            await instance.stop()
            assert time.monotonic() - began < SHORT_S


async def test_one_that_has_died_meanwhile_is_an_error(boxes: Boxes, places: Places) -> None:
    """By name, at once, and the image goes on elsewhere."""
    image = await boxes.image()
    async with standing(boxes, places) as instance:
        await still(instance)
        for pid in instance.processes()[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(SnapshotError) as failed:
            await asyncio.wait_for(boxes.engine.restore(instance, image=image), 20)
        assert failed.value.hint
    again = await boxes.make(image=image)
    assert (await again.channel.exec(["echo", "back"])).stdout == "back\n"


async def test_an_image_of_another_kind_is_refused_and_it_waits_on(boxes: Boxes, places: Places) -> None:
    """Nothing was done to it, so the right one goes on there."""
    image = await boxes.image()
    folder = places.root / "work"
    folder.mkdir()
    async with standing(boxes, places, boxes.spec(workspace=folder)) as instance:
        with pytest.raises(SnapshotIncompatibleError):
            await boxes.engine.restore(instance, image=image)
        assert instance.stands_by


async def test_a_notebook_comes_back_in_what_stands_by(places: Places, tmp_path: Path) -> None:
    """From where it was suspended, and from whichever snapshot it is put back to; the next one waits afterwards."""
    async with keeper(places, prepared=1) as client, notebook(client, tmp_path, backend="gvisor") as made:
        await made.run("x = 0")
        (own,) = waiting(places)
        for name in ("first", "second"):
            assert (await made.run(f"x += 1; name = {name!r}")) == ""
            assert (await made.run(f"%snapshot {name}")).startswith("Snapshot ")
        for turn, name in enumerate(("first", "second", "first")):
            await until(lambda: len(waiting(places)) == 2)
            (waits,) = waiting(places) - {own}
            await until((places.runtime / "s" / waits / "run").exists)
            await made.do("restore", snapshot=name)
            assert await made.run("print(x, name)") == f"{1 + (name == 'second')} {name}", turn
            await until(lambda before=own: before not in waiting(places))
            own = waits
            assert own in waiting(places)
        await until(lambda: len(waiting(places)) == 2)
        (waits,) = waiting(places) - {own}
        await made.until_idle()
        await made.do("suspend")
        assert waiting(places) == {waits}
        assert await made.run("x += 1; print(x, name)") == "2 first"
        assert waits in waiting(places)
