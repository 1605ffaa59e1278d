"""Images are privileged input, and criu runs as root beside the guest's files: neither gives anybody anything."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import IMAGE, Dockerd
from tests.integration.snapshots.boxes import Boxes, boxes_of
from tests.lanes import ordinary_uid
from tests.leaks import Places
from warmcell.sandbox.errors import SnapshotCorruptError, UnsupportedOperationError
from warmcell.sandbox.helper.images import criu as image_files
from warmcell.sandbox.helper.images.protobuf import inner, replaced
from warmcell.sandbox.helper.seals import Seals, checksum
from warmcell.sandbox.helper.start import command
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.criu import helper_environment

pytestmark = pytest.mark.criu

FIRST = "a" * 12
PLANTED = "warmcell-test:planted"
THREAD, CREDS, UIDS, PERMITTED = 5, 10, (1, 3, 5, 7), 10


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


def enter(pid: int, script: str, *, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a script as root in a sandbox's mount namespace."""
    argv = ["nsenter", "-t", str(pid), "-m", "sh", "-c", script]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=True)


async def test_a_planted_preload_is_not_looked_at(boxes: Boxes) -> None:
    """`/etc/ld.so.preload` of the guest's view is a pipe: whoever opens it waits for ever. criu does not."""
    source = await boxes.running()
    planted = "mount -t tmpfs none /etc && umask 0 && mkfifo /etc/ld.so.preload"
    enter(source.pid, planted)
    with pytest.raises(subprocess.TimeoutExpired):  # Another program of root's there would.
        enter(source.pid, "exec /bin/true", timeout_s=1)
    async with asyncio.timeout(60):
        await boxes.dump(source, FIRST)
    target = await boxes.fresh()
    enter(target.pid, planted)
    async with asyncio.timeout(60):
        await boxes.engine.restore(target, image=SnapshotId(FIRST))
    assert source.kernel in {int(line.split()[-1]) for line in guest_numbers(target.pid)}


def guest_numbers(first: int) -> list[str]:
    """NSpid lines of all processes whose pid namespace is that of `first`."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "ns" / "pid").readlink() == Path(f"/proc/{first}/ns/pid").readlink():
                found += [line for line in (path / "status").read_text().splitlines() if line.startswith("NSpid")]
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("member", "value", "named"), [(UIDS, 0, "uid 0"), ((PERMITTED,), 1 << 21, "capabilities")], ids=["root", "admin"]
)
@pytest.mark.parametrize("sealed", [False, True], ids=["unsealed", "resealed"])
async def test_a_doctored_image(boxes: Boxes, member: tuple[int, ...], value: int, named: str, sealed: bool) -> None:
    """An image that would make its kernel root is refused by its seal, and were that broken, by what is in it."""
    source = await boxes.running()
    await boxes.dump(source, FIRST, then="stop")
    await boxes.engine.close()  # Its checksums are known now.
    image = boxes.paths.images / "0" / FIRST
    core = image / f"core-{source.kernel}.img"
    (message,) = image_files.read(core)
    thread = inner(message, THREAD) or b""
    creds = replaced(inner(thread, CREDS) or b"", dict.fromkeys(member, value))
    doctored = replaced(message, {THREAD: replaced(thread, {CREDS: creds})})
    core.write_bytes(image_files.joined("core", [doctored]))
    if sealed:
        seals, about = Seals(str(boxes.paths.images / "key")), str(image / "image.json")
        said = seals.read(about)
        seals.write(about, {**said, "files": {**said["files"], core.name: checksum(str(core))}})
    box = await boxes.fresh()
    with pytest.raises(SnapshotCorruptError, match=named if sealed else core.name):
        await boxes.engine.restore(box, image=SnapshotId(FIRST))
    assert max(await box.numbers()) < 1000


async def test_the_guest_cannot_enter_the_helpers_room(boxes: Boxes) -> None:
    """Page files lie there, with the memory of others that share them."""
    source = await boxes.running()
    await boxes.dump(source, FIRST, then="stop")
    clone = await boxes.restored(FIRST)
    assert "denied" in await clone.sh("ls /.warmcell 2>&1; echo x 2>&1 >/.warmcell/x")
    assert "denied" in await clone.sh("cat /run/criu.kdat 2>&1")
    pages = enter(clone.pid, "ls /.warmcell").stdout.split()
    name = next(name for name in pages if len(name) == 12)
    with pytest.raises(subprocess.CalledProcessError):
        enter(clone.pid, f"echo x >> /.warmcell/{name}")
    assert "denied" in await clone.sh(f"cat /.warmcell/{name} 2>&1 | tail -1")


async def test_nothing_of_an_image_is_for_others(boxes: Boxes) -> None:
    """Directories 0700, files 0600, all root's, whoever the kernel ran as."""
    source = await boxes.running()
    await boxes.dump(source, FIRST, then="stop")
    for path in boxes.paths.images.rglob("*"):
        if path.is_dir() or not {"pinned", ".pins"}.intersection(path.parts):
            found = path.lstat()
            assert (found.st_uid, found.st_gid, found.st_mode & 0o077) == (0, 0, 0), path


class Server:
    """A helper for all users, as the system's is."""

    def __init__(self, places: Places) -> None:
        self.path = places.root / "all.sock"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(self.path))
        listening.listen()
        reading, self._lifeline = os.pipe()
        argv = command(
            sys.executable,
            listening=listening.fileno(),
            lifeline=reading,
            base=str(places.state / "images"),
            for_all=True,
        )
        self._process = subprocess.Popen(argv, pass_fds=[listening.fileno(), reading], env=helper_environment())
        listening.close()
        os.close(reading)

    def ask(self, request: dict[str, Any], *fds: int, uid: int = 0) -> dict[str, Any]:
        """What the helper answers to this uid."""
        said: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: said.append(self._ask(request, fds, uid)))
        thread.start()
        thread.join(60)
        return said[0]

    def _ask(self, request: dict[str, Any], fds: tuple[int, ...], uid: int) -> dict[str, Any]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(60)
        # Credentials are those of the thread that connects; the C library would change those of all threads.
        _set_thread_uid(uid)
        connection.connect(str(self.path))
        _set_thread_uid(0)
        ours, theirs = socket.socketpair()  # Of root's, whoever asks: that must give nobody root's rights.
        ours.settimeout(60)
        with connection, ours, theirs:
            apart = request.get("op") == "restore"  # Each clone is answered on a socket that comes with its request.
            sent = [*fds, theirs.fileno()] if apart else list(fds)
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], sent)
            with (ours if apart else connection).makefile() as answers:
                answer: dict[str, Any] = json.loads(answers.readline())
                return answer

    def close(self) -> None:
        os.close(self._lifeline)
        assert self._process.wait(60) == 0
        self.path.unlink()


def _set_thread_uid(uid: int) -> None:
    import ctypes

    setresuid = 117
    keep = ctypes.c_uint(0xFFFFFFFF)
    assert ctypes.CDLL(None).syscall(setresuid, keep, ctypes.c_uint(uid), keep) == 0


@pytest.fixture
def server(places: Places) -> Iterator[Server]:
    places.root.chmod(0o755)
    made = Server(places)
    made.path.chmod(0o666)
    yield made
    made.close()


async def test_images_and_sandboxes_of_others(boxes: Boxes, server: Server) -> None:
    """Another user neither sees, restores nor drops an image, nor saves what runs in a sandbox, of somebody else."""
    stranger = ordinary_uid()
    source = await boxes.running()
    await boxes.dump(source, FIRST)
    mine = os.pidfd_open(source.pid)
    try:
        request = {"op": "dump", "image": "b" * 12, "pid": source.kernel, "then": "stop"}
        ask = server.ask
        assert (await asyncio.to_thread(ask, request, mine, uid=stranger))["code"] == "sandbox_not_found"
        assert (await asyncio.to_thread(ask, {"op": "enroll"}, mine, uid=stranger))["code"] == "sandbox_not_found"
        everything = {"op": "images", "store": boxes.engine.store}
        assert (await asyncio.to_thread(ask, everything, uid=stranger))["images"] == []
        assert (await asyncio.to_thread(ask, {"op": "drop", "image": FIRST}, uid=stranger))["ok"]
        listed = await asyncio.to_thread(ask, everything)
        assert [one["id"] for one in listed["images"]] == [FIRST]
        request = {"op": "restore", "image": FIRST}
        assert (await asyncio.to_thread(ask, request, mine, uid=stranger))["code"] == "sandbox_not_found"
    finally:
        os.close(mine)
    await source.goes_on(past=await source.count())


async def test_what_is_no_sandbox(boxes: Boxes, server: Server) -> None:
    """The host's own processes, bubblewrap, those inside a sandbox, files, dead ones, none, two: all are refused."""
    box = await boxes.fresh()
    others = [os.pidfd_open(pid) for pid in box.instance.processes() if pid != box.pid]
    assert len(others) >= 2
    dead = subprocess.Popen(["true"])
    gone = os.pidfd_open(dead.pid)
    dead.wait()
    own, right = os.pidfd_open(os.getpid()), os.pidfd_open(box.pid)
    with open(os.devnull) as file:
        try:
            for fd in (own, *others, gone, file.fileno()):
                answer = await asyncio.to_thread(server.ask, {"op": "enroll"}, fd)
                assert answer["code"] == "sandbox_not_found", answer
            for fds in ((), (right, right)):
                answer = await asyncio.to_thread(server.ask, {"op": "enroll"}, *fds)
                assert answer["code"] == "protocol", answer
        finally:
            for fd in (own, *others, right, gone):
                os.close(fd)


@pytest.mark.parametrize("image", ["../0/aaaaaaaaaaaa", "/etc/passwd", "AAAAAAAAAAAA", "a" * 13, "", "٣" * 12])
async def test_an_id_is_no_path(server: Server, image: str) -> None:
    """Nothing that comes over the wire is ever looked up as a path."""
    answer = await asyncio.to_thread(server.ask, {"op": "drop", "image": image})
    assert answer["code"] == "invalid_request"


async def test_requests_that_are_none(server: Server, boxes: Boxes) -> None:
    """Whatever is sent, the helper answers or hangs up, and serves the next one."""
    for request in ({}, {"op": "exec"}, {"op": 7}, {"op": "dump"}, {"op": "dump", "image": FIRST, "pid": True}):
        answer = await asyncio.to_thread(server.ask, request)
        assert not answer["ok"]
        assert answer["code"] in ("protocol", "invalid_request")
    for sent in (b"", b"\n", b"[]\n", b"x" * 200_000 + b"\n", b'{"op": "images"'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(60)
            await asyncio.to_thread(connection.connect, str(server.path))
            try:
                await asyncio.to_thread(connection.sendall, sent)
                connection.shutdown(socket.SHUT_WR)
                await asyncio.to_thread(connection.recv, 4096)
            except OSError:
                continue
    assert (await asyncio.to_thread(server.ask, {"op": "images"}))["ok"]


def image_with(containers: Dockerd, change: str, *copied: tuple[Path, str]) -> None:
    """An image of a test's own, with a line of a Dockerfile and files."""
    made = containers.docker("create", IMAGE, "true")
    for source, target in copied:
        containers.docker("cp", str(source), f"{made}:{target}")
    containers.docker("commit", "--change", change, made, PLANTED)
    containers.docker("rm", made)


@pytest.fixture
def containers(docker: Dockerd) -> Iterator[Dockerd]:
    """The engine, with no image called `PLANTED` afterwards."""
    yield docker
    docker.docker("rmi", "--force", PLANTED)


@pytest.mark.docker
async def test_what_an_image_of_docker_brings_is_not_taken_for_the_helpers(
    containers: Dockerd, places: Places, tmp_path: Path
) -> None:
    """Neither what criu is to know of the machine nor the place for page files; the guest enters neither."""
    (tmp_path / "kdat").write_bytes(b"planted" * 1000)
    image_with(containers, 'VOLUME ["/.warmcell"]', (tmp_path / "kdat", "/run/criu.kdat"))
    async with boxes_of(places, containers) as boxes:
        boxes.image = PLANTED
        source = await boxes.running()
        await boxes.dump(source, FIRST)
        clone = await boxes.restored(FIRST)
        await clone.goes_on(past=await clone.goes_on())
        for box in (source, clone):
            look = "stat --format '%u %a' /.warmcell; cmp /.warmcell/criu.kdat /run/criu.kdat && echo same"
            assert enter(box.pid, look).stdout == "0 700\nsame\n"
            assert await box.sh("ls /.warmcell") == ""


@pytest.mark.docker
async def test_an_image_of_docker_that_leads_the_helper_elsewhere_is_refused(
    containers: Dockerd, places: Places, tmp_path: Path
) -> None:
    """Its sandboxes work; saved they are not, and nothing is mounted where the link leads to."""
    (tmp_path / "link").symlink_to("/tmp")
    image_with(containers, "LABEL planted=yes", (tmp_path / "link", "/.warmcell"))
    async with boxes_of(places, containers) as boxes:
        boxes.image = PLANTED
        box = await boxes.fresh()
        with pytest.raises(UnsupportedOperationError, match="link"):
            await boxes.engine.enroll(box)
        assert await box.sh("echo there > /tmp/file && cat /tmp/file") == "there"
