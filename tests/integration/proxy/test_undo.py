"""A kernel is put back to an earlier state of it, or cloned, in the middle of things."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.proxy.conftest import MakeRig, Rig, ipc
from tests.integration.proxy.kernels import Kernel, behind, process
from tests.leaks import Places


@pytest.fixture
async def kernel(rig: Rig, places: Places) -> AsyncIterator[Kernel]:
    async with behind(rig, places.root / "k") as made:
        yield made


async def test_an_undone_cell_is_answered_and_what_came_after_it_kept(kernel: Kernel, places: Places) -> None:
    """The asking cell is ok with its number, later ones run in the kernel that is restored, in order."""
    await kernel.run("x = 1")
    with process(places.root / "earlier"):
        asking = kernel.client.execute("print('before', flush=True)\nimport time; time.sleep(60)")
        later = [kernel.client.execute(f"print({n})") for n in range(3)]
        await kernel.until(lambda: "before" in kernel.text(asking))
        await kernel.proxy.end_open_requests(asked_by=asking)
        waiting = kernel.client.execute("print('waited')")
        await kernel.finished(asking)
        assert kernel.reply(asking) == {
            "status": "ok",
            "execution_count": 2,
            "user_expressions": {},
            "payload": [],
        }
        kernel.prefix = str(places.root / "earlier")
        await kernel.go_on()
        await kernel.finished(*later, waiting)
        assert [kernel.text(name) for name in (*later, waiting)] == ["0\n", "1\n", "2\n", "waited\n"]
        assert not kernel.proxy.busy


async def test_an_undo_from_outside_aborts_what_runs(kernel: Kernel, places: Places) -> None:
    """No cell asked for it: what had begun is aborted, what had not runs in the restored kernel."""
    with process(places.root / "earlier"):
        running = kernel.client.execute("print('begun', flush=True)\nimport time; time.sleep(60)")
        later = kernel.client.execute("print('later')")
        await kernel.until(lambda: "begun" in kernel.text(running))
        await kernel.proxy.end_open_requests()
        await kernel.finished(running)
        assert kernel.reply(running)["status"] == "aborted"
        kernel.prefix = str(places.root / "earlier")
        await kernel.go_on()
        await kernel.finished(later)
        assert kernel.text(later) == "later\n"


async def test_what_an_undone_kernel_was_in_the_middle_of_is_not_heard(kernel: Kernel) -> None:
    """Undone into the middle of a cell: its end is nobody's to hear, and the kernel is busy till then."""
    cell = "import time\nprint('begun', flush=True)\ntime.sleep(1)\nprint('ghost')"
    name = kernel.client.execute(cell)
    await kernel.until(lambda: "begun" in kernel.text(name))
    inherited = await kernel.pause()
    assert inherited == (name,)
    await kernel.proxy.end_open_requests()
    assert not kernel.proxy.busy
    await kernel.go_on(restored=True, undone=True, inherited=inherited)
    assert kernel.proxy.busy
    assert await kernel.run("print('next')") == "next\n"
    assert kernel.text(name) == "begun\n"
    assert kernel.reply(name)["status"] == "aborted"
    assert not kernel.proxy.busy


async def test_a_clone_in_the_middle_of_a_cell(kernel: Kernel, make_rig: MakeRig, places: Places) -> None:
    """Its proxy knows it as busy until that cell is over; output is published, and new cells run after it."""
    name = kernel.client.execute("import time\nprint('begun', flush=True)\ntime.sleep(1)\nprint('cloned')")
    await kernel.until(lambda: "begun" in kernel.text(name))
    inherited = await kernel.pause()
    other = Kernel(await make_rig(ipc(places, ip=str(places.root / "o"))), Path(kernel.prefix))
    other.client = await other.rig.subscribed()
    listening = asyncio.create_task(other.listen())
    try:
        await other.go_on(restored=True, clone=True, inherited=inherited)
        assert other.proxy.busy
        assert other.proxy.idle_s == 0
        assert await other.run("print('own')") == "own\n"
        assert other.text(name) == "cloned\n"
        assert [each["parent_header"]["msg_id"] for each in other.replies] != [name]
        assert not other.proxy.busy
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
