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
    for depth in (0, -1, 101):
        with pytest.raises(errors.InvalidRequestError, match="depth"):
            files.list("in", depth=depth)
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


MANY = """
import os
def fill(folder, count, suffix=b""):
    os.makedirs(folder)
    for number in range(count):
        os.close(os.open(os.fsencode(folder) + b"/%05d" % number + suffix, os.O_CREAT))
    return count
fill("many", 10_001, b"\\xff"), fill("many/deep", 3), fill("many/deep/deeper", 3)
long = "/".join(["long", *["n" * 250] * 15])
fill(long, 4000)
"""


def test_a_folder_is_listed_whatever_is_in_it(box: Sandbox) -> None:
    """More than one answer holds, by number or by size, with names that are no text: each once, in its order."""
    box.run(MANY).check()
    found = [one.path.rpartition("/many/")[2] for one in box.files.list("many", depth=3)]
    top = [f"{number:05}\udcff" for number in range(10_001)]
    below = [f"{folder}/{name}" for folder in ("deep", "deep/deeper") for name in ("00000", "00001", "00002")]
    assert found == [*top, "deep", *below[:3], "deep/deeper", *below[3:]]
    assert len([one for one in box.files.list("long", depth=16) if one.type == "file"]) == 4000
    for folder in ("many", "long"):
        box.files.remove(folder, recursive=True)


def test_pages_of_a_folder_stay_in_step_with_it(box: Sandbox) -> None:
    """What was told is not told again, nor the rest left out, whatever comes and goes between two pages."""
    for name in "bdfh":
        box.files.write(f"pages/{name}", "")
    at = f"/sandboxes/{box.id}/files/list?path=pages&limit=2"
    with SyncKeeperClient.connect() as keeper:
        first = keeper.get(at)
        assert [one["name"] for one in first["files"]] == ["b", "d"]
        box.files.remove("pages/d")
        box.files.write("pages/a", "")
        box.files.write("pages/e", "")
        second = keeper.get(f"{at}&after={first['next']}")
        assert [one["name"] for one in second["files"]] == ["e", "f"]
        last = keeper.get(f"{at}&after={second['next']}")
        assert ([one["name"] for one in last["files"]], last["next"]) == (["h"], None)
        for wrong in ("x", "L2V0Yw"):  # the latter: /etc
            with pytest.raises(errors.InvalidRequestError):
                keeper.get(f"{at}&after={wrong}")
    box.files.remove("pages", recursive=True)


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


UPLOADS = """
import io, json, os, random, sys, tarfile, tempfile, tracemalloc
from warmcell_guest import files

def made(form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, kind, link in (
            ("a", b"0", ""), ("b" * 90 + "/" + "c" * 40, b"0", ""), ("../out", b"0", ""), ("l", b"2", ".."),
            ("l/out", b"0", ""), ("h", b"1", "a"), ("d", b"5", ""), ("p", b"6", ""), ("c", b"3", ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, 3 if kind == b"0" else 0
            archive.addfile(member, io.BytesIO(b"abc"))
    return out.getvalue()

class Ends:
    def __init__(self, data):
        self.buffer = io.BytesIO(data)

def changed(seen, data):
    data = bytearray(data[: seen.randrange(len(data) + 1)] if seen.random() < 0.3 else data)
    for _ in range(seen.randrange(4) if data else 0):
        at = seen.randrange(len(data))
        data[at] = seen.randrange(256)
        head = at - at % 512
        if seen.random() < 0.7 and len(data) >= head + 512:
            data[head + 148 : head + 156] = b" " * 8
            data[head + 148 : head + 156] = b"%06o\\0 " % sum(data[head : head + 512])
    return bytes(data)

seen, kinds, most = random.Random(41), {}, 0
sound = [made(form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)]
stdin, stdout = sys.stdin, sys.stdout
for number in range(COUNT):
    data = seen.choice(sound) if number % 10 == 0 else changed(seen, seen.choice(sound))
    with tempfile.TemporaryDirectory() as folder:
        line = json.dumps({"op": "unpack", "path": folder + "/in/here"}).encode() + b"\\n"
        files._answered = False
        tracemalloc.start()
        sys.stdin, sys.stdout = Ends(line + data), Ends(b"")
        try:
            code, answer = files.main(), sys.stdout.buffer.getvalue()
        finally:
            sys.stdin, sys.stdout = stdin, stdout
            most = max(most, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    said = json.loads(answer)
    kinds[said.get("errno", "done")] = kinds.get(said.get("errno", "done"), 0) + 1
    assert code == 0 and (said["ok"] or said["message"]), (number, said)
(kinds.get("done", 0) > COUNT // 10, kinds.get("EINVAL", 0) > 0, most < 4 * 2**20)
"""


@pytest.mark.parametrize(
    "count", [pytest.param(100, id="short"), pytest.param(10_000, id="long", marks=pytest.mark.long)]
)
def test_any_tar_that_is_uploaded_is_unpacked_or_refused(box: Sandbox, count: int) -> None:
    """By what does it in the sandbox: one line for an answer, in bounded memory, whatever it is sent."""
    done = box.run(UPLOADS.replace("COUNT", str(count)), timeout=1500)
    assert done.error is None, done.error
    assert done.text == "(True, True, True)"
