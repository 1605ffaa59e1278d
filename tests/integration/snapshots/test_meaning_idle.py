"""When a kernel is suspended and what wakes it; what a keeper that ends or is killed leaves to the next one."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import Notebook, configure, end_all, keeper, notebook, page, processes_of
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import ConflictError
from warmcell.sandbox.paths import Paths

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]


async def is_suspended(made: Notebook) -> bool:
    return bool((await made.info())["state"] == "suspended")


async def test_busy_idle_and_what_wakes(places: Places, tmp_path: Path) -> None:
    """A busy kernel is suspended only if asked; a page's own requests wake none, a person's do."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        running = made.page.send("import time\nfor n in range(200): time.sleep(0.01)\nprint(n)")
        await made.page.until(lambda: len(made.page.of(running)) > 1)
        with pytest.raises(ConflictError, match="busy"):
            await made.do("suspend")
        assert (await made.do("suspend", busy=True))["state"] == "suspended"
        assert running not in made.page.replies
        await made.do("resume")
        assert (await made.page.done(running))["status"] == "ok"
        assert made.page.said(running) == "199"

        await made.run("answer = 42")
        for request in (("execute", "answer"), ("complete", "answ"), ("inspect", "answer")):
            await made.do("suspend")
            for what in ("kernel_info", "comm_info", "history"):
                assert (await made.page.ask(what))["status"] == "ok", what
            async with page(made.body["connection"]) as reloaded:
                await reloaded.ready()
            assert (await made.info())["state"] == "suspended"
            assert processes_of(places) == []
            assert (await made.page.ask(*request))["status"] == "ok"
            await made.do("resume")
            assert (await made.info())["state"] == "running"
            await made.until_idle()


async def test_a_kernel_that_nobody_uses_goes_to_sleep(places: Places, tmp_path: Path) -> None:
    """After `suspend_after` without request or output; a thread that speaks, or a running cell, keeps it awake."""
    async with keeper(places, suspend_after=1.0) as client, notebook(client, tmp_path) as made:
        speaking = (
            "import threading, time\ndef speak():\n    for _ in range(25): print('.', flush=True); time.sleep(0.1)\n"
        )

        async def stays_awake() -> bool:
            await made.run(f"{speaking}threading.Thread(target=speak).start(); x = 1")
            for _ in range(8):
                await asyncio.sleep(0.25)  # it is the passing of time that must change nothing
                if await is_suspended(made):
                    return False
            return True

        for _ in range(5):  # A machine that stops for a second has silent kernels: such a one gets further tries.
            if await stays_awake():
                break
        else:
            pytest.fail("a kernel that speaks was suspended")
        running = made.page.send("time.sleep(2.5); x += 1")
        await made.page.until(lambda: bool(made.page.of(running)))
        await asyncio.sleep(2.0)
        assert not await is_suspended(made)
        await made.page.done(running)
        await until(lambda: is_suspended(made))
        assert await made.run("print(x)") == "2"


async def pid_of(client: KeeperClient) -> int:
    return int((await client.get("/status"))["pid"])


async def ended(pid: int) -> None:
    """Wait for a process that is no child of ours."""

    async def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    await until(gone, timeout=60)


async def test_a_keeper_that_is_stopped_leaves_its_kernels_to_the_next(places: Places, tmp_path: Path) -> None:
    """Three kernels, one in the middle of a cell: the same ids and pages, suspended, and the next cell finds all."""
    configure(places)
    async with (
        await KeeperClient.connect() as first,
        notebook(first, tmp_path) as one,
        notebook(first, tmp_path) as two,
        notebook(first, tmp_path) as three,
    ):
        for number, each in enumerate((one, two, three)):
            await each.run(f"x = {number}")
        await two.do("suspend")
        three.page.send("import time\nfor n in range(100): time.sleep(0.02)\nx = n")
        await three.page.until(lambda: len(three.page.heard) > 5)
        before = {one["kernel_id"]: one["sandbox_id"] for one in (await first.get("/kernels"))["kernels"]}
        pid = await pid_of(first)
        os.kill(pid, signal.SIGTERM)
        await ended(pid)
        assert processes_of(places) == []
        async with await KeeperClient.connect() as second:
            told = (await second.get("/kernels"))["kernels"]
            assert {each["kernel_id"]: each["sandbox_id"] for each in told} == before
            states = {each["id"]: each["state"] for each in (await second.get("/sandboxes"))["sandboxes"]}
            assert set(states.values()) == {"suspended"}
            assert (await second.get("/kernels"))["lost"] == []
            for number, each in enumerate((one, two)):
                async with page(each.body["connection"]) as opened:
                    assert await opened.run("print(x)") == str(number)
            async with page(three.body["connection"]) as opened:
                assert await opened.run("print(x)") == "99"
            await end_all(second)
            assert (await second.get("/snapshots"))["snapshots"] == []


async def test_a_keeper_that_is_killed_loses_what_ran_and_says_so(places: Places, tmp_path: Path) -> None:
    """Of a suspended and a running kernel the first is there with all it had, of the other nothing is left."""
    configure(places)
    async with (
        await KeeperClient.connect() as first,
        notebook(first, tmp_path) as kept,
        notebook(first, tmp_path) as lost,
    ):
        await kept.run("x = 'kept'")
        await lost.run("x = 'lost'")
        await kept.do("suspend")
        named = await lost.do("snapshot", name="by hand")
        pid = await pid_of(first)
        os.kill(pid, signal.SIGKILL)
        await ended(pid)

        async def nothing_runs() -> bool:
            return await asyncio.to_thread(processes_of, places) == []

        await until(nothing_runs)
        async with await KeeperClient.connect() as second:
            told = await second.get("/kernels")
            assert [each["kernel_id"] for each in told["kernels"]] == [kept.kernel_id]
            assert [each["kernel_id"] for each in told["lost"]] == [lost.kernel_id]
            assert "killed" in told["lost"][0]["why"]
            assert not (Paths.default().sandboxes / lost.sandbox_id).exists()
            kinds = {each["id"]: each["kind"] for each in (await second.get("/snapshots"))["snapshots"]}
            assert sorted(kinds.values()) == ["named", "suspended"]
            async with page(kept.body["connection"]) as opened:
                assert await opened.run("print(x)") == "kept"
            info = await second.post("/kernels", lost.body, timeout=120)
            assert info["started_from"] == "cold"
            assert "lost" in json.dumps(info["previous_error"])
            restored = await second.post(f"/sandboxes/{info['id']}/restore", {"snapshot": named["id"]}, timeout=120)
            assert restored["state"] == "running"
            async with page(lost.body["connection"]) as opened:
                assert await opened.run("print(x)") == "lost"
            await end_all(second)
