"""Files of sandboxes, and what is not in a sandbox."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from warmcell import AsyncSandbox, Sandbox
from warmcell.sandbox import errors
from warmcell.sandbox.client.keeper import SyncKeeperClient

pytestmark = pytest.mark.bubblewrap


def test_files_come_and_go(box: Sandbox, tmp_path: Path) -> None:
    """Whatever bytes: written whole, read, listed, moved, removed; errors have names."""
    files = box.files
    content = bytes(range(256)) * 5000
    written = files.write("in/deep/data", content, mode=0o600)
    assert (written.size_bytes, written.mode, written.type) == (len(content), 0o600, "file")
    assert files.read("in/deep/data") == content
    assert files.write("in/deep/data", "ä").size_bytes == 2
    assert files.read_text("in/deep/data") == "ä"
    assert [one.name for one in files.list("in", depth=3)] == ["deep", "data"]
    assert files.mkdir("in/more")
    assert not files.mkdir("in/more")
    assert files.move("in/deep/data", "in/more/data").path.endswith("in/more/data")
    assert files.exists("in/more/data")
    assert not files.exists("in/deep/data")
    for wrong, error, number in (
        (lambda: files.read("in/nothing"), errors.SandboxFileNotFoundError, "ENOENT"),
        (lambda: files.read("in"), errors.ConflictError, "EISDIR"),
        (lambda: files.remove("in"), errors.ConflictError, "ENOTEMPTY"),
        (lambda: files.move("in/more", "in/deep"), errors.ConflictError, "EEXIST"),
        (lambda: files.write("in/more/data/x", ""), errors.ConflictError, "ENOTDIR"),
        (lambda: files.read("/dev/zero"), errors.InvalidRequestError, "EINVAL"),
        (lambda: files.write("x" * 300, ""), errors.InvalidRequestError, "ENAMETOOLONG"),
    ):
        with pytest.raises(error) as caught:
            wrong()  # type: ignore[no-untyped-call]
        assert caught.value.details["errno"] == number
    (tmp_path / "up" / "sub").mkdir(parents=True)
    (tmp_path / "up" / "sub" / "file").write_bytes(content)
    files.upload(tmp_path / "up", "up")
    files.upload(tmp_path / "up" / "sub" / "file", "up/again")
    box.exec("ln", "-s", "/etc/passwd", "up/link")
    assert files.download("up", tmp_path / "down") == ["link"]
    assert (tmp_path / "down" / "sub" / "file").read_bytes() == content
    files.download("up/again", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == content
    for one in ("in", "up"):
        files.remove(one, recursive=True)
    assert not files.exists("in")


def test_paths_lead_nowhere_but_into_the_sandbox(box: Sandbox, tmp_path: Path) -> None:
    """Dots, absolute paths and links to files of the host meet the sandbox's own; the host's stay as they are."""
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    for path in (str(secret), f"../../../../../../..{secret}", f"/proc/1/root{secret}", f"/proc/self/cwd/{secret}"):
        with pytest.raises(errors.WarmcellError):
            box.files.read(path)
    box.exec("ln", "-sfn", str(tmp_path), "out")
    with pytest.raises(errors.WarmcellError):
        box.files.read("out/secret")
    with contextlib.suppress(errors.WarmcellError):  # It may have a folder of that name, its own.
        box.files.write("out/secret", "from inside")
        box.files.write(str(secret), "from inside")
    for text in ("\udcff", "\ud800"):  # no text, which is said before it is sent
        for ask in (box.files.read, box.files.list, box.files.mkdir, box.exec):
            with pytest.raises(errors.InvalidRequestError, match="no text"):
                ask(text)
    assert secret.read_text() == "of the host"
    assert box.files.stat("out").type == "symlink"
    box.files.remove("out")


def test_half_a_file_never_gets_its_name(box: Sandbox) -> None:
    """An upload that breaks off leaves the file of before, and nothing beside it."""
    box.files.write("half", "whole")
    transport = httpx.HTTPTransport(uds=str(Path(os.environ["WARMCELL_RUNTIME_DIR"]) / "keeper.sock"))

    def breaks() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise RuntimeError("gone")

    url = f"http://keeper/warmcell/api/v1/sandboxes/{box.id}/files"
    with httpx.Client(transport=transport) as client, pytest.raises(RuntimeError):
        client.put(url, params={"path": "half"}, content=breaks())
    running = "import glob; sum(b'files.py' in open(name, 'rb').read() for name in glob.glob('/proc/[0-9]*/cmdline'))"
    deadline = time.monotonic() + 60
    while box.run(running).text != "0":
        assert time.monotonic() < deadline
    assert box.files.read_text("half") == "whole"
    assert [one.name for one in box.files.list(".") if "half" in one.name] == ["half"]


def test_nothing_of_the_host_is_inside(box: Sandbox) -> None:
    """No network, no socket to ask the keeper, no folder and no variable of the host's."""
    look = """
import os, socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=1)
    network = True
except OSError:
    network = False
(network, sorted(name for name in os.listdir("/run/warmcell") if "api" in name), os.environ.get("WARMCELL_STATE_DIR"))
"""
    assert box.run(look).text == "(False, [], None)"
    for wrong in ({"workspace": {"path": "/tmp"}}, {"mounts": [{"source": "/etc"}]}, {"network": "host"}):
        with SyncKeeperClient.connect() as keeper, pytest.raises(errors.InvalidRequestError):
            keeper.post("/sandboxes", {"spec": {"preload": [], **wrong}, "terms": {}})


def test_changes_of_a_folder_are_told(box: Sandbox) -> None:
    """In order, from the moment at which `with` begins; what came before, and what is elsewhere, is not."""
    box.files.write("seen/old", "1")
    box.files.mkdir("unseen")
    with box.files.watch("seen", recursive=True, timeout=300) as changes:
        box.files.write("unseen/x", "1")
        box.files.write("seen/new", "2")
        box.files.mkdir("seen/deep")
        told: list[tuple[str, str]] = []
        while ("created", "deep") not in told:
            told += [(change.kind, change.name) for change in itertools.islice(changes, 1)]
        box.exec("sh", "-c", "echo 3 > seen/deep/b; mv seen/deep/b seen/c; rm seen/old; chmod 600 seen/c")
        for change in changes:
            told.append((change.kind, change.name))
            if told[-1] == ("changed", "c"):
                break
    assert [one for one in told if one[0] != "written"] == [
        ("created", "new"),
        ("created", "deep"),
        ("created", "deep/b"),
        ("moved", "deep/b"),
        ("created", "c"),
        ("removed", "old"),
        ("changed", "c"),
    ]
    assert ("written", "deep/b") in told
    assert {info.state for info in (one.info() for one in box.commands()) if info.tag == "watcher"} <= {"ended"}
    for path, error in (("nowhere", errors.SandboxFileNotFoundError), ("seen/new", errors.ConflictError)):
        with pytest.raises(error), box.files.watch(path):
            pass


async def test_a_folder_is_watched_for_as_long_as_was_asked(box: Sandbox) -> None:
    """In a loop, beside other work; the end of the time is the end of the changes, and no error."""
    same = await AsyncSandbox.connect(box.id)
    try:
        async with same.files.watch(timeout=1.0) as changes:
            await same.files.write("beside", "1")
            assert [change.name async for change in changes if change.kind == "created"] == ["beside"]
    finally:
        await same.close()
