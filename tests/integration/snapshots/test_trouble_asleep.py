"""What goes wrong with kernels that sleep, or were lost: it is answered, one costs no other, and a way on is told."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import body, end_all, keeper, notebook, page
from tests.integration.snapshots.test_faults_storage import finished, flip, gone
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.helper.seals import Seals
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots import manifest as manifests

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

FILES = 4000


@pytest.fixture
def little_room(places: Places) -> Iterator[Path]:
    """The runtime directory, a file system of its own that few files fit into."""
    at = str(places.runtime)
    options = f"nr_inodes={FILES},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "warmcell-test", at], check=True)
    try:
        yield places.runtime
    finally:
        subprocess.run(["umount", "-l", at], check=True)


@contextlib.contextmanager
def full(directory: Path) -> Iterator[None]:
    """No file more fits."""
    ballast = directory / "ballast"
    ballast.mkdir()
    try:
        with contextlib.suppress(OSError):
            for number in range(FILES):
                (ballast / str(number)).touch()
        yield
    finally:
        for each in ballast.iterdir():
            each.unlink()
        ballast.rmdir()


def kept_aside(directory: Path, aside: Path) -> None:
    """The same files under another name."""
    subprocess.run(["cp", "-al", str(directory), str(aside)], check=True)


async def test_a_cell_whose_kernel_cannot_wake_is_answered(places: Places, little_room: Path, tmp_path: Path) -> None:
    """Without room for its sandbox the cell has an error; with room the next one goes on where the kernel was."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 1")
        await made.do("suspend")
        with full(little_room):
            asked = made.page.send("x += 1")
            assert (await made.page.reply(asked))["status"] == "error"
            assert (await made.info())["state"] == "suspended"
        assert await made.run("x += 1; print(x)") == "2"
        await end_all(client)
        await gone(client, signum=signal.SIGTERM)


async def test_a_damaged_image_does_not_stand_before_an_earlier_one(places: Places, tmp_path: Path) -> None:
    """A suspended kernel goes back to a named snapshot; what it was asleep as is neither read nor kept."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 'good'")
        await made.do("snapshot", name="good")
        await made.run("x = 'later'")
        asleep = (await made.do("suspend"))["snapshot"]
        flip(await finished(made, asleep) / "inventory.img")
        asked = made.page.send("print(x)")
        assert (await made.page.reply(asked))["status"] == "error"
        info = await made.do("restore", snapshot="good")
        assert (info["state"], info["error"]) == ("running", None)
        assert await made.run("print(x)") == "good"
        for _ in range(2):  # Asleep and awake, over and over: the snapshot that has a name stays.
            await made.do("suspend")
            await made.do("restore", snapshot="good")
        assert await made.run("print(x)") == "good"
        kept = (await client.get("/snapshots"))["snapshots"]
        assert [one["name"] for one in kept] == ["good"]


async def test_a_strange_record_costs_no_other_kernel(places: Places, tmp_path: Path) -> None:
    """A keeper that cannot take up one kernel starts, has the others, and tells of the loss; the snapshot stays."""
    async with keeper(places) as client, notebook(client, tmp_path) as bad, notebook(client, tmp_path) as good:
        await good.run("x = 'good'")
        strange, _ = [(await each.do("suspend"))["snapshot"] for each in (bad, good)]
        await gone(client, signum=signal.SIGKILL)
        directory = Paths.default().snapshots / strange
        manifest = manifests.read(directory)
        for wrong in ({"known_as": "none"}, {"request": "none"}):
            manifests.write(directory, dataclasses.replace(manifest, kernel={**manifest.kernel, **wrong}))
            async with await KeeperClient.connect() as second:
                kernels = await second.get("/kernels")
                assert [one["kernel_id"] for one in kernels["kernels"]] == [good.kernel_id]
                assert [one["kernel_id"] for one in kernels["lost"]] == [bad.kernel_id]
                listed = (await second.get("/sandboxes"))["sandboxes"]
                assert [one["kernel_id"] for one in listed] == [good.kernel_id]
                assert strange in {one["id"] for one in (await second.get("/snapshots"))["snapshots"]}
                await gone(second, signum=signal.SIGKILL)
        async with await KeeperClient.connect() as third:
            async with page(good.body["connection"]) as opened:
                assert await opened.run("print(x)") == "good"
            await end_all(third)
            await third.delete(f"/snapshots/{strange}?force=1")


async def test_the_state_before_stays_until_the_next_is_on_the_disk(places: Places, tmp_path: Path) -> None:
    """It goes then; had the machine lost its power before, the kernel could go back to it."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 'older'")
        older = (await made.do("suspend"))["snapshot"]
        await finished(made, older)
        await made.run("x = 'newer'")
        shelves = (Paths.default().snapshots, Paths.default().images / str(os.getuid()))
        for shelf in shelves:  # As they would be if the power went in a moment.
            await asyncio.to_thread(kept_aside, shelf / older, tmp_path / shelf.name)
        newer = (await made.do("suspend"))["snapshot"]
        image = await finished(made, newer)

        async def superseded() -> bool:
            return {one["id"] for one in (await client.get("/snapshots"))["snapshots"]} == {newer}

        await until(superseded)
        await gone(client, signum=signal.SIGKILL)
        for shelf in shelves:
            (tmp_path / shelf.name).rename(shelf / older)
        seals, about = Seals(str(Paths.default().images / "key")), str(image / "image.json")
        seals.write(about, {**seals.read(about), "boot_id": "another", "finished": None})
        async with await KeeperClient.connect() as second:

            async def named() -> bool:
                kinds = {one["id"]: one["kind"] for one in (await second.get("/snapshots"))["snapshots"]}
                return kinds == {older: "named", newer: "suspended"}

            await until(named)
            async with page(made.body["connection"]) as opened:
                await opened.ready()
                assert (await opened.reply(opened.send("print(x)")))["status"] == "error"
                await second.post(f"/sandboxes/{made.sandbox_id}/restore", {"snapshot": older}, timeout=120)
                assert await opened.run("print(x)") == "older"
            await end_all(second)
            await second.delete(f"/snapshots/{older}")


async def test_what_a_lost_kernel_was_earlier_is_kept_and_told(places: Places, tmp_path: Path) -> None:
    """Its keeper is killed after a resume: what it was then has a name, and whoever hears of the loss hears of that."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 'before'")
        asleep = (await made.do("suspend"))["snapshot"]
        await made.run("x = 'lost'")
        await gone(client, signum=signal.SIGKILL)
        async with await KeeperClient.connect() as second:
            (kept,) = (await second.get("/snapshots"))["snapshots"]
            assert (kept["id"], kept["kind"]) == (asleep, "named")
            assert kept["name"].startswith("before the loss ")
            told = (await second.post("/kernels", made.body, timeout=120))["previous_error"]
            assert told["code"] == "sandbox_died"
            assert f"%restore {asleep}" in told["hint"]
            for where in (made.body, body(tmp_path)):  # The same notebook's next kernel, and any other one's.
                if where is not made.body:
                    await second.post("/kernels", where, timeout=120)
                async with page(where["connection"]) as opened:
                    await opened.ready()
                    await opened.run(f"%restore {asleep}")
                    assert await opened.run("print(x)") == "before"
            await end_all(second)
            await second.delete(f"/snapshots/{asleep}")
