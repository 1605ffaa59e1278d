"""Back to a named snapshot, in place: from outside and by the cell itself, with its clients connected."""

from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import keeper, notebook
from tests.leaks import Places
from warmcell.sandbox.errors import ConflictError, SnapshotError, SnapshotNotFoundError, UnsupportedOperationError

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]


async def test_a_notebook_goes_back_and_on(places: Places, tmp_path: Path) -> None:
    """Memory and files are those of the snapshot, also with magics; what is typed meanwhile runs afterwards."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 1; open('/tmp/kept', 'w').write('then'); total = 0")
        assert (await made.run("%snapshot then")).startswith("Snapshot then ")
        listed = await made.run("%snapshot")
        assert listed.startswith("then "), listed
        await made.run("x = 2; open('/tmp/kept', 'w').write('now'); open('/tmp/new', 'w')")
        restoring = made.page.send("%restore then\nprint('not reached')")
        typed = made.page.send("import os; print(x, open('/tmp/kept').read(), os.path.exists('/tmp/new'))")
        assert (await made.page.done(restoring))["status"] == "ok"
        assert made.page.said(restoring) == ""
        assert (await made.page.done(typed))["status"] == "ok"
        assert made.page.said(typed) == "1 then False"

        await made.run("x = 3")
        running = made.page.send("import time; print('runs', flush=True); time.sleep(600)")
        await made.page.until(lambda: made.page.said(running) == "runs")
        waiting = made.page.send("print(x)")
        info = await made.do("restore", snapshot="then")
        assert (info["state"], info["error"]) == ("running", None)
        assert (await made.page.done(running))["status"] == "aborted"
        assert (await made.page.done(waiting))["status"] == "ok"
        assert made.page.said(waiting) == "1"

        for _ in range(3):
            await made.run("x += 1")
            await made.do("restore", snapshot="then")
        await made.until_idle()  # It was saved in the last moments of a cell, which ends once more.
        await made.do("suspend")
        await made.do("restore", snapshot="then")
        assert await made.run("print(x)") == "1"


async def test_what_cannot_be_done_is_said(places: Places, tmp_path: Path) -> None:
    """No such name, a name that is taken, another kernel's snapshot: the kernel is as it was."""
    async with keeper(places) as client, notebook(client, tmp_path) as made, notebook(client, tmp_path) as other:
        await made.run("x = 1")
        assert "no snapshot 'nothing'" in await made.run("%restore nothing")
        await made.run("%snapshot mine")
        assert "has a snapshot 'mine' already" in await made.run("%snapshot mine")
        with pytest.raises(ConflictError, match="mine"):
            await made.do("snapshot", name="mine")
        with pytest.raises(SnapshotNotFoundError):
            await other.do("restore", snapshot="mine")
        with pytest.raises(SnapshotNotFoundError):
            await made.do("restore", snapshot="nothing")
        assert await made.run("x += 1; print(x)") == "2"
        assert await other.run("print('there')") == "there"


async def test_hooks_decide(places: Places, tmp_path: Path) -> None:
    """A before_snapshot that raises is a veto; an after_restore that fails leaves the old state."""
    hooks = """
import warmcell
calls, refuse, fail = [], False, False
@warmcell.before_snapshot
def before():
    calls.append("before")
    if refuse: raise RuntimeError("not in the middle of a transaction")
@warmcell.after_restore
def after():
    calls.append("after")
    if fail: raise RuntimeError("the licence server is gone")
"""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        assert await made.run(hooks) == ""
        await made.do("suspend")
        assert await made.run("print(calls)") == "['before', 'after']"

        await made.run("refuse = True; x = 1")
        for verb in ("suspend", "snapshot", "fork"):
            with pytest.raises((SnapshotError, UnsupportedOperationError), match="in the middle of a transaction"):
                await made.do(verb)
        assert (await made.info())["state"] == "running"
        assert await made.run("x += 1; print(x)") == "2"

        await made.run("refuse, fail = False, True; calls.clear()")
        await made.do("snapshot", name="fails")
        await made.run("fail = False; x = 10")
        with pytest.raises(SnapshotError, match="licence server"):
            await made.do("restore", snapshot="fails")
        assert await made.run("print(x, calls)") == "10 ['before']"
        await made.run("fail = True")
        with pytest.raises(SnapshotError, match="licence server"):
            await made.do("fork", n=2)
        told = (await client.get("/sandboxes"))["sandboxes"]
        assert {one["state"] for one in told if one["id"] != made.sandbox_id} == {"failed"}  # One, or both at once.
        assert [one["kernel_id"] for one in (await client.get("/kernels"))["kernels"]] == [made.kernel_id]
        assert await made.run("print(x)") == "10"
        await made.do("suspend")
        with pytest.raises(SnapshotError, match="licence server"):
            await made.do("resume")
        info = await made.info()
        assert (info["state"], info["error"]["code"]) == ("suspended", "snapshot_failed")
        assert "licence server" in await made.run("print(x)")
        assert (await made.info())["state"] == "suspended"
