"""`warmcell snapshots` and the REST below it, on a real socket and a real store."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tornado import web

from tests.leaks import Places
from tests.unit.sandbox.snapshots.making import add
from tests.unit.sandbox.snapshots.test_archive import Images
from warmcell.extension.cli import main
from warmcell.extension.cli.output import WARNING
from warmcell.extension.keeper.http import JsonHandler, UnixServer
from warmcell.extension.keeper.snapshots_api import SnapshotsApi, routes
from warmcell.sandbox.client.keeper import KeeperClient, SyncKeeperClient
from warmcell.sandbox.errors import (
    ConflictError,
    InvalidRequestError,
    SnapshotNotFoundError,
    UnsupportedOperationError,
)
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.store import SnapshotStore, new_id

PREFIX = "/warmcell/api/v1"
Serve = Callable[..., None]


class StatusHandler(JsonHandler):
    """What a client asks first."""

    def get(self) -> None:
        self.answer({"pid": os.getpid()})


@pytest.fixture
async def store(places: Places) -> AsyncIterator[SnapshotStore]:
    made = SnapshotStore(Paths.default().snapshots)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def serve(store: SnapshotStore) -> AsyncIterator[Serve]:
    """Serve the store as the keeper does; given `images` and `imports`, with these."""
    paths = Paths.default().make()
    servers = []

    def begin(**changes: Any) -> None:
        application = web.Application(
            [(PREFIX + path, handler) for path, handler in [*routes(), ("/status", StatusHandler)]],
            log_function=lambda handler: None,
            check_peer=True,
            snapshots=SnapshotsApi(store=store, **changes),
        )
        server = UnixServer(application, path=paths.keeper_socket)
        server.listen_unix()
        servers.append(server)

    yield begin
    for server in servers:
        await server.close()
    paths.keeper_socket.unlink(missing_ok=True)


async def cli(*argv: str) -> int:
    return await asyncio.to_thread(main, ["snapshots", *argv])


async def test_rest_lists_names_and_removes(store: SnapshotStore, serve: Serve) -> None:
    """By id and by name, all or those of one kernel; what is not there and what is taken are typed errors."""
    serve()
    one = await add(store, "one")
    two = await add(store, "two", kernel_id="k2", sandbox_id=SandboxId("b" * 12))
    async with await KeeperClient.connect(start=False) as keeper:
        answer = await keeper.get("/snapshots")
        assert {info["id"] for info in answer["snapshots"]} == {one, two}
        assert (answer["unreadable"], answer["used_bytes"]) == ([], store.used_bytes)
        for query in ("kernel_id=k2", f"sandbox_id={'b' * 12}"):
            assert [info["id"] for info in (await keeper.get(f"/snapshots?{query}"))["snapshots"]] == [two]
        assert (await keeper.get("/snapshots/one"))["id"] == one
        assert "key" not in json.dumps(await keeper.get(f"/snapshots/{one}"))
        with pytest.raises(SnapshotNotFoundError):
            await keeper.get("/snapshots/one?kernel_id=k2")
        with pytest.raises(ConflictError):
            async with store.use(one):
                await keeper.delete("/snapshots/one")
        assert await keeper.delete("/snapshots/one") is None
        with pytest.raises(SnapshotNotFoundError):
            await keeper.delete(f"/snapshots/{one}")


async def test_rest_renames(store: SnapshotStore, serve: Serve) -> None:
    """A name and nothing else can be changed."""
    serve()
    one = await add(store, "one")
    async with await KeeperClient.connect(start=False) as keeper:
        changed = await keeper._request("PATCH", f"/snapshots/{one}", {"name": "other"}, 10.0)
        assert changed["name"] == store.get(one).info.name == "other"
        for body in ({"name": 3}, {}, {"name": "a", "kind": "template"}, {"name": "a\nb"}):
            with pytest.raises(InvalidRequestError):
                await keeper._request("PATCH", f"/snapshots/{one}", body, 10.0)
    assert store.get("other").info.id == one


async def test_ls_shows_what_there_is(store: SnapshotStore, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, sizes and what cannot be used, with the cure; JSON has the same."""
    serve()
    assert await cli("ls") == 0
    assert "No snapshots" in capsys.readouterr().out
    await add(store, "one", image_bytes=3 * 2**20, memory_bytes=2**30, notebook="a.ipynb")
    broken = await add(store, "two")
    (store.root / broken / "manifest.json").write_text("{}")
    await store.open()
    assert await cli("ls") == 0
    out = capsys.readouterr().out
    for part in ("one", "3.0 MiB", "1.0 GiB", "a.ipynb", f"{broken} cannot be used", "cure:"):
        assert part in out
    assert await cli("ls", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [info["name"] for info in answer["snapshots"]] == ["one"]
    assert answer["unreadable"][0]["error"]["code"] == "snapshot_corrupt"
    assert await cli("rm", broken) == 0
    assert store.unreadable == ()


async def test_rm_keeps_a_suspended_kernel(
    store: SnapshotStore, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless it is forced; names with odd characters work."""
    serve()
    suspended = await add(store, kind="suspended")
    await add(store, "a/b ?#%&")
    assert await cli("rm", suspended) == 1
    assert "--force" in capsys.readouterr().err
    assert await cli("rm", "a/b ?#%&", suspended, "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"removed": ["a/b ?#%&", suspended]}
    assert store.infos() == []


async def test_out_and_in_again(
    store: SnapshotStore, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than any JSON may be goes through the socket both ways; the file is its owner's alone."""
    snapshot_id = new_id()
    memory = os.urandom(40 * 2**20)
    images = Images()
    serve(images=images, imports=True)
    snapshot_id = await add(store, "one", content=b"layer")
    images.known[snapshot_id] = memory
    path = tmp_path / "file"
    assert await cli("export", "one", str(path)) == 0
    assert path.stat().st_size > len(memory)
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]
    await store.remove(snapshot_id)
    images.known.clear()
    capsys.readouterr()
    assert await cli("import", str(path), "--name", "back", "--json") == 0
    assert json.loads(capsys.readouterr().out)["name"] == "back"
    assert images.known == {snapshot_id: memory}
    async with store.use("back") as held:
        assert (held.layer / "file").read_bytes() == b"layer"


async def test_verified(store: SnapshotStore, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them or those named: whole, damaged, or with memory that nobody can look at; the exit code says which."""
    images = Images()
    serve(images=images)
    assert await cli("verify") == 0
    assert "No snapshots" in capsys.readouterr().out
    snapshot_id = await add(store, "one", content=b"layer")
    images.known[snapshot_id] = b"memory"
    assert await cli("verify") == 0
    assert capsys.readouterr().out == f"{snapshot_id} (one): as it was written\n"
    images.known.clear()
    assert await cli("verify", "one") == WARNING
    assert "verify it again" in capsys.readouterr().out
    file = store.layer(snapshot_id) / "file"
    before = file.stat()
    file.write_bytes(b"LAYER")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await cli("verify", "one") == 1
    said = capsys.readouterr().out
    assert ("'file' differs" in said, "cure:" in said) == (True, True)
    assert await cli("verify", "nothing") == 1
    assert "no snapshot 'nothing'" in capsys.readouterr().err


async def test_import_is_off_by_default(
    store: SnapshotStore, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large file is refused with the setting that would take it, and nothing of it is kept."""
    serve()
    path = tmp_path / "file"
    path.write_bytes(os.urandom(30 * 2**20))
    assert await cli("import", str(path)) == 1
    assert "c.Warmcell.import_snapshots = True" in capsys.readouterr().err
    assert os.listdir(store.root) == ["store.json"]
    assert await cli("import", str(tmp_path / "none")) == 1
    assert "cannot be read" in capsys.readouterr().err


async def test_what_is_no_archive_is_refused(
    store: SnapshotStore, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noise and nothing at all."""
    serve(imports=True)
    path = tmp_path / "file"
    for data in (os.urandom(20 * 2**20), b""):
        path.write_bytes(data)
        assert await cli("import", str(path)) == 1
        assert "cure:" in capsys.readouterr().err
        assert os.listdir(store.root) == ["store.json"]


async def test_an_export_that_breaks_off_leaves_no_file(
    store: SnapshotStore, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that cannot begin says why; a file that was there stays."""

    class Breaking(Images):
        async def export_image(self, image: str) -> AsyncIterator[bytes]:
            yield os.urandom(8 * 2**20)
            raise ConflictError("the image went away", hint="Try again.")

    serve(images=Breaking())
    await add(store, "one")
    path = tmp_path / "file"
    path.write_text("before")
    assert await cli("export", "one", str(path)) == 1
    assert "cure:" in capsys.readouterr().err
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
    assert await cli("export", "nothing", str(path)) == 1
    assert "no snapshot 'nothing'" in capsys.readouterr().err
    assert await cli("export", "one", str(tmp_path / "none" / "file")) == 1
    assert "cannot be written" in capsys.readouterr().err


async def test_memory_that_no_engine_gives(store: SnapshotStore, serve: Serve, tmp_path: Path) -> None:
    """The files alone can still be had."""
    serve()
    await add(store, "one")

    def export(query: str) -> int:
        with SyncKeeperClient.connect(start=False) as keeper:
            return sum(len(piece) for piece in keeper.download(f"/snapshots/one/export{query}"))

    with pytest.raises(UnsupportedOperationError, match="criu"):
        await asyncio.to_thread(export, "")
    assert await asyncio.to_thread(export, "?files_only=1") > 0
