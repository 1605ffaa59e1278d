"""Where the disk is full: each way to fill it is answered with 507 and its cure, and the sandbox goes on as it was."""

import contextlib
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.leaks import Places, own_places
from warmcell import Sandbox
from warmcell.sandbox import errors
from warmcell.sandbox.client.keeper import SyncKeeperClient

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

DISK_BYTES = 100 * 2**20


@pytest.fixture
def home(places: Places, monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """A keeper's directories, of which that of its state is a small disk."""
    with own_places() as home:
        config = home.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ("backend = 'bubblewrap'", "prepared = 0", "keeper_idle_s = 0.2")
        (config / "jupyter_warmcell_config.py").write_text("\n".join(f"c.Warmcell.{line}" for line in lines))
        for name, value in home.env.items():
            monkeypatch.setenv(name, value)
        options = f"size={DISK_BYTES},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "warmcell-test", str(home.state)], check=True)
        try:
            yield home
        finally:
            subprocess.run(["umount", "-l", str(home.state)], check=True)


def test_a_state_for_which_there_is_no_room_is_not_saved(home: Places) -> None:
    """Suspending, saving and copying say so before anything is lost; one whose time is over stands still instead."""
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(SyncKeeperClient.connect())
        box = stack.enter_context(Sandbox(preload=(), timeout=None))
        box.run("import os; x = 1; ballast = os.urandom(120 << 20)").check()
        box.files.write("kept", "yes")
        transport = httpx.HTTPTransport(uds=str(home.runtime / "keeper.sock"))
        http = stack.enter_context(
            httpx.Client(transport=transport, base_url="http://keeper/warmcell/api/v1", timeout=60)
        )
        for verb in ("suspend", "snapshot", "fork"):
            answer = http.post(f"/sandboxes/{box.id}/{verb}", json={})
            assert (answer.status_code, answer.json()["code"]) == (507, "storage_full"), answer.text
            assert "snapshots" in answer.json()["hint"]
            assert box.run("x += 1; x, len(ballast)").text is not None
        with pytest.raises(errors.StorageFullError):
            box.snapshot("never")
        assert keeper.get("/snapshots")["snapshots"] == []
        assert [info.id for info in Sandbox.list()] == [box.id]

        box.set_timeout(0.2)
        deadline = time.monotonic() + 60
        while not (terms := box.info().terms) or not terms.frozen:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        box.set_timeout(None)
        assert box.run("x").text == "4"

        box.run("del ballast; import gc; gc.collect()")
        saved = box.snapshot("now")
        box.suspend()
        assert (box.run("x").text, box.files.read_text("kept")) == ("4", "yes")
        keeper.delete(f"/snapshots/{saved.id}")


def test_a_full_disk_keeps_no_sandbox_from_its_work(home: Places) -> None:
    """The host's disk is full, to the last byte: code, commands and files go on; where they do not, it is said why."""
    with SyncKeeperClient.connect() as keeper, Sandbox(preload=(), timeout=None) as box:
        box.run("x = 1")
        filler = home.state / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**20))
        try:
            assert box.run("x + 1").text == "2"
            assert box.exec("echo", "up").stdout == "up\n"
            with contextlib.suppress(errors.StorageFullError):
                box.files.write("file", "content")
                assert box.files.read_text("file") == "content"
            with contextlib.suppress(errors.StorageFullError), Sandbox(preload=(), timeout=None) as other:
                assert other.exec("true").exit_code == 0
            assert keeper.get("/status")["pid"]
        finally:
            filler.unlink()
        assert box.run("x").text == "1"


def test_what_a_sandbox_may_have_of_a_disk_is_held(home: Places) -> None:
    """Its command fails as on a full disk, an upload is answered so, and what was removed is room again."""
    with Sandbox(preload=(), timeout=None, disk="16MiB") as box:
        box.files.write("kept", "old")
        filled = box.exec("sh", "-c", "head -c 24M /dev/zero > large")
        assert filled.exit_code != 0
        assert "No space left on device" in filled.stderr
        with pytest.raises(errors.StorageFullError) as caught:
            box.files.write("kept", bytes(2**20))
        assert "layer_bytes" in caught.value.hint
        assert box.files.read_text("kept") == "old"
        box.files.remove("large")
        assert box.files.write("kept", bytes(2**20)).size_bytes == 2**20
