"""Full disks, damaged and strange snapshots, requests in each other's way: a typed error, and the old state."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import (
    Notebook,
    end_all,
    gone,
    keeper,
    notebook,
    own_disk,
    page,
    processes_of,
)
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    SnapshotCorruptError,
    SnapshotIncompatibleError,
    SnapshotNotFoundError,
    TransportError,
    WarmcellError,
)
from warmcell.sandbox.helper.seals import Seals
from warmcell.sandbox.paths import Paths

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]


@pytest.fixture
def small_disk(places: Places) -> Iterator[Path]:
    """The state directory, a file system of its own with 100 MiB."""
    with own_disk(places.state, options="size=100m") as state:
        yield state


async def finished(made: Notebook, snapshot: str) -> Path:
    """Wait until the helper has sealed an image, which it does after it has answered; where it is."""
    path = Paths.default().images / str(os.getuid()) / snapshot

    async def sealed() -> bool:
        return '"finished": null' not in await asyncio.to_thread((path / "image.json").read_text)

    await until(sealed)
    return path


async def test_a_disk_that_is_full(places: Places, small_disk: Path, tmp_path: Path) -> None:
    """Nothing is saved and the kernel goes on, the cell that wished it is told; with room it works."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("import os; x = 1; ballast = os.urandom(120 << 20)")
        for verb in ("suspend", "snapshot", "fork"):
            with pytest.raises(CapacityError) as raised:
                await made.do(verb)
            assert raised.value.hint
            assert await made.run("x += 1; print(len(ballast))") == str(120 << 20)
        assert "No snapshot was taken" in await made.run("%snapshot never")
        assert (await made.info())["state"] == "running"
        assert (await client.get("/snapshots"))["snapshots"] == []
        await made.run("del ballast")
        await made.do("suspend")
        assert await made.run("print(x)") == "4"
        await end_all(client)
        await gone(client, signum=signal.SIGTERM)


def flip(path: Path) -> None:
    """Change a byte in the middle, keeping all that a directory tells of a file."""
    before = path.stat()
    with path.open("r+b") as file:
        at = before.st_size // 2
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_what_is_damaged_or_strange_is_said_and_kept(places: Places, tmp_path: Path) -> None:
    """A kernel whose image was changed stays suspended and says why; as soon as it is mended it goes on."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 1")
        info = await made.do("suspend")
        image = await finished(made, info["snapshot"])
        for name in ("inventory.img", "core-1001.img", "image.json"):
            flip(image / name)
            with pytest.raises(SnapshotCorruptError) as raised:
                await made.do("resume")
            assert raised.value.hint
            info = await made.info()
            assert (info["state"], info["error"]["code"]) == ("suspended", "snapshot_corrupt")
            assert processes_of(places) == []
            flip(image / name)
        seals, about = Seals(str(Paths.default().images / "key")), str(image / "image.json")
        was = seals.read(about)
        for field, value in (("criu", "3.17"), ("linux", "5.4.0"), ("cpu", ["amx9"])):
            seals.write(about, {**was, field: value})
            with pytest.raises(SnapshotIncompatibleError) as strange:
                await made.do("resume")
            assert {"expected", "found"} <= set(strange.value.details)
            assert strange.value.hint
        asked = made.page.send("print(x)")
        assert (await made.page.reply(asked))["status"] == "error"
        seals.write(about, was)
        assert await made.run("x += 1; print(x)") == "2"
        assert (await made.do("resume"))["error"] is None


async def test_what_another_keeper_finds(places: Places, tmp_path: Path) -> None:
    """A damaged manifest and one of another user are shown, not used; their kernels are said to be lost."""
    async with keeper(places) as client, notebook(client, tmp_path) as damaged, notebook(client, tmp_path) as foreign:
        async with notebook(client, tmp_path) as good:
            await good.run("x = 'good'")
            ids = [(await each.do("suspend"))["snapshot"] for each in (damaged, foreign, good)]
        await gone(client, signum=signal.SIGKILL)
        store = Paths.default().snapshots
        flip(store / ids[0] / "manifest.json")
        for path in (store / ids[1], store / ids[1] / "manifest.json"):
            os.chown(path, 54321, 54321)
        async with await KeeperClient.connect() as second:
            told = await second.get("/snapshots")
            assert {one["id"] for one in told["unreadable"]} == set(ids[:2])
            assert all(one["error"]["hint"] for one in told["unreadable"])
            kernels = await second.get("/kernels")
            assert [one["kernel_id"] for one in kernels["kernels"]] == [good.kernel_id]
            assert {one["kernel_id"] for one in kernels["lost"]} == {damaged.kernel_id, foreign.kernel_id}
            async with page(good.body["connection"]) as opened:
                assert await opened.run("print(x)") == "good"
            await end_all(second)
            for one in ids[:2]:
                await second.delete(f"/snapshots/{one}?force=1")
            assert (await second.get("/snapshots"))["unreadable"] == []


WISHES: dict[str, dict[str, Any]] = {"restore": {"snapshot": "old"}, "fork": {"n": 2}}


async def outcome(doing: Any) -> object:
    try:
        return await doing
    except WarmcellError as error:
        assert error.hint or isinstance(error, TransportError), repr(error)
        return error


async def test_restored_and_removed_at_once(places: Places, tmp_path: Path) -> None:
    """The snapshot is used whole or not found; the kernel is what it was or what was saved."""
    moments = random.Random(5)

    async def remove(client: KeeperClient, snapshot: str) -> None:
        await asyncio.sleep(moments.uniform(0.0, 0.15))
        await client.delete(f"/snapshots/{snapshot}")

    async with keeper(places) as client:
        async with notebook(client, tmp_path) as made:
            for number in range(6):
                await made.run(f"x = {number}")
                saved = (await made.do("snapshot", name=f"then {number}"))["id"]
                await made.run("x = 'now'")
                restored, removed = await asyncio.gather(
                    outcome(made.do("restore", snapshot=saved)), outcome(remove(client, saved))
                )
                failed = isinstance(restored, WarmcellError)
                assert isinstance(restored, SnapshotNotFoundError) or not failed, restored
                assert isinstance(removed, ConflictError) or removed is None, removed
                assert failed != (removed is not None)
                assert await made.run("print(x)") == ("now" if failed else str(number))
        await end_all(client)
        for one in (await client.get("/snapshots"))["snapshots"]:
            await client.delete(f"/snapshots/{one['id']}")


async def test_shut_down_in_the_middle(places: Places, tmp_path: Path) -> None:
    """A kernel that is removed while something is done with it: that is told, and nothing is left."""
    moments = random.Random(7)
    async with keeper(places) as client:
        for verb in ("suspend", "resume", "snapshot", "restore", "fork"):
            async with notebook(client, tmp_path) as made:
                await made.do("snapshot", name="old")
                if verb == "resume":
                    await made.do("suspend")
                doing = asyncio.create_task(outcome(made.do(verb, **WISHES.get(verb, {}))))
                await asyncio.sleep(moments.uniform(0.0, 0.25))
                await client.delete(f"/kernels/{made.kernel_id}")
                assert isinstance(await doing, (dict, WarmcellError))
                await end_all(client)
            assert (await client.get("/sandboxes"))["sandboxes"] == []
            assert processes_of(places) == []
            for one in (await client.get("/snapshots"))["snapshots"]:
                assert one["kind"] == "named", one
                await client.delete(f"/snapshots/{one['id']}")


async def test_removed_while_a_large_kernel_is_saved(places: Places, tmp_path: Path) -> None:
    """Nobody waits for memory that nobody wants any more: saving it fails, and the kernel is gone."""
    async with keeper(places) as client:
        for verb in ("suspend", "snapshot"):
            async with notebook(client, tmp_path) as made:
                await made.run("ballast = b'x' * (1 << 30)")
                doing = asyncio.create_task(outcome(made.do(verb)))
                while not list(Paths.default().images.rglob("pages-*.img")):
                    assert not doing.done(), "it was saved before anybody could come"
                    await asyncio.sleep(0.005)
                await client.delete(f"/kernels/{made.kernel_id}")
                assert isinstance(await doing, WarmcellError), verb
            assert (await client.get("/sandboxes"))["sandboxes"] == []
            assert (await client.get("/snapshots"))["snapshots"] == []
            assert processes_of(places) == []
