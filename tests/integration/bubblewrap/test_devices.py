"""Nodes of leased devices, with another device in the place of a GPU."""

import asyncio
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import subject_of
from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap import nodes
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import UnsupportedOperationError
from warmcell.sandbox.models import GpuDevice

pytestmark = pytest.mark.bubblewrap

STAND_INS = ("/dev/fuse", "/dev/net/tun", "/dev/vsock", "/dev/loop-control")


@pytest.fixture
def node() -> str:
    """A device that no sandbox has by itself."""
    found = next((path for path in STAND_INS if Path(path).is_char_device()), None)
    if found is None:
        pytest.skip(f"this machine has none of {', '.join(STAND_INS)}")
    return found


def device(node: str, **changes: object) -> GpuDevice:
    fields = {"uuid": "GPU-1", "index": 0, "name": "Stand-in", "memory_total_bytes": 1, "device_nodes": (node,)}
    return GpuDevice(**{**fields, **changes})  # type: ignore[arg-type]


async def test_a_leased_device_is_there_as_a_device(places: Places, node: str) -> None:
    """The very node of the host, not a file of that name."""
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[device(node)]
    )
    try:
        seen = Path(f"/proc/{instance.pid}/root{node}").stat()
        assert seen.st_rdev == os.stat(node).st_rdev
        mounts = Path(f"/proc/{instance.pid}/mountinfo").read_text().splitlines()
        (options,) = [line.split()[5].split(",") for line in mounts if line.split()[4] == node]
        assert "nodev" not in options
        assert "nosuid" in options
    finally:
        await instance.stop()
    subject.nothing_is_left(sandbox_id, directory)


async def test_what_is_not_leased_is_not_there(places: Places, node: str) -> None:
    """Nor is a simulated device, whose nodes would be none of its own."""
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    simulated = device(node, simulated=True)
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[simulated]
    )
    try:
        assert not Path(f"/proc/{instance.pid}/root{node}").exists()
    finally:
        await instance.stop()
    subject.nothing_is_left(sandbox_id, directory)


async def test_what_a_cdi_specification_says_comes_along(
    places: Places, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node under another name, a library at a place of its own with the links to it, a directory of libraries, and
    the variables by which processes find them. Left out is what others could be spoken to by, what is not there, what
    is no driver's, and what would lie in a tree of the host's.
    """
    driver = places.root / "driver"
    driver.mkdir()
    (driver / "libcuda.so.580.1").write_text("the driver's")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(driver / "socket"))
    for name in ("service", "config", "more"):
        (driver / name).mkdir()
        (driver / name / "libmore.so.1").touch()
    os.mkfifo(driver / "service" / "control")
    (driver / "config" / "libmore.so.1").rename(driver / "config" / "any.conf")
    mounts = [
        {"hostPath": str(driver / name), "containerPath": place}
        for name, place in (
            ("libcuda.so.580.1", "/opt/nv/lib/libcuda.so.580.1"),
            ("libcuda.so.580.1", "/usr/lib/none/libcuda.so.580.1"),
            ("libcuda.so.580.1", "/lib/none/libcuda.so.580.1"),
            ("libcuda.so.580.1", "/bin/libcuda.so.580.1"),
            ("libcuda.so.580.1", "/tmp/libcuda.so.580.1"),
            ("libcuda.so.580.1", "/etc/libcuda.so.580.1"),
            ("socket", "/opt/nv/socket"),
            ("service", "/opt/nv/service"),
            ("config", "/opt/nv/config"),
            ("more", "/opt/nv/more"),
            ("missing", "/opt/nv/missing"),
        )
    ]
    system = Path("/usr/lib/os-release")
    mounts.append({"hostPath": str(driver / "libcuda.so.580.1"), "containerPath": "/lib/os-release"})
    mounts.append({"hostPath": "/lib/locale", "containerPath": "/lib/locale"})
    hook = ["nvidia-cdi-hook", "create-symlinks", "--link", "libcuda.so.580.1::/opt/nv/lib/libcuda.so.1"]
    hook += ["--link", "bash::/bin/libcuda.so.1"]
    edits = {
        "deviceNodes": [
            {"path": node},
            {"path": "/dev/nvidia-caps/nvidia-cap1", "hostPath": node},
            {"path": "/dev/fd/9"},
        ],
        "mounts": mounts,
        "env": ["DRIVER_SAYS=yes", "LD_LIBRARY_PATH=/opt/own"],
        "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": hook}],
    }
    spec = {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [{"name": "GPU-1", "containerEdits": edits}],
    }
    (driver / "nvidia.yaml").write_text(json.dumps(spec))
    monkeypatch.setattr("warmcell.sandbox.backends.cdi.DIRECTORIES", (driver,))
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[device(node)]
    )
    try:
        root = Path(f"/proc/{instance.pid}/root")
        assert (root / "dev/nvidia-caps/nvidia-cap1").stat().st_rdev == os.stat(node).st_rdev
        assert sorted(os.listdir(root / "opt/nv")) == ["lib", "more"]
        assert not (root / "etc/libcuda.so.580.1").exists()
        assert not system.exists() or (root / system.relative_to("/")).read_text() == "the driver's"
        code = "import os; print(open('/opt/nv/lib/libcuda.so.1').read(), os.environ['DRIVER_SAYS'], sep='\\n')"
        code += "; print(os.environ['LD_LIBRARY_PATH']); open('/opt/nv/lib/libcuda.so.1', 'w')"
        channel = await GuestChannel.open(instance.run_directory, timeout=60)
        said = await channel.exec(["python3", "-c", code])
        await channel.close()
        assert said.stdout.splitlines() == ["the driver's", "yes", "/opt/own:/opt/nv/lib:/opt/nv/more"]
        assert "Read-only file system" in said.stderr
    finally:
        await instance.stop()
        listening.close()
    subject.nothing_is_left(sandbox_id, directory)


async def test_another_device_comes_to_a_sandbox_that_runs(places: Places, node: str) -> None:
    """In the place of the one that it had, for a program that runs all the while; and without one it sees none. The
    rest of its /dev is as it was, and nobody in there can write to it.
    """
    other = next((path for path in STAND_INS if Path(path).is_char_device() and path != node), None)
    if other is None:
        pytest.skip(f"this machine has only one of {', '.join(STAND_INS)}")
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[device(node)]
    )
    try:
        assert instance.shows_others
        channel = await GuestChannel.open(instance.run_directory, timeout=60)
        root = Path(f"/proc/{instance.pid}/root")
        before = mounts_of(instance.pid)
        await instance.show_gpus([device(other)])
        seen = await channel.exec(["sh", "-c", f"ls -l {other}; test -e {node}; echo $?; touch /dev/new; rm {other}"])
        assert seen.stdout.startswith("c")
        assert seen.stdout.splitlines()[-1] == "1"
        assert seen.stderr.count("Read-only file system") == 2
        assert (root / other[1:]).stat().st_rdev == os.stat(other).st_rdev
        assert mounts_of(instance.pid) - before == {(other, "nosuid")}
        process = os.pidfd_open(instance.pid)
        with pytest.raises(UnsupportedOperationError, match="cannot be given another GPU"):
            await asyncio.to_thread(
                nodes.change, process, add={"/dev/new": node, "/dev/null/x": other}, remove={other: other}
            )
        keepers = os.umask(0o077)
        try:
            await asyncio.to_thread(nodes.change, process, add={"/dev/caps/one": node}, remove={})
        finally:
            os.umask(keepers)
        assert (await channel.exec(["test", "-c", "/dev/caps/one"])).exit_code == 0
        await asyncio.to_thread(nodes.change, process, add={}, remove={"/dev/caps/one": node})
        os.close(process)
        assert mounts_of(instance.pid) - before == {(other, "nosuid")}
        await instance.show_gpus([])
        assert not (root / node[1:]).exists()
        assert not (root / other[1:]).exists()
        await instance.show_gpus([device(node)])
        assert mounts_of(instance.pid) == before
        await channel.close()
    finally:
        await instance.stop()
    subject.nothing_is_left(sandbox_id, directory)


THREAD = """
import ctypes, os, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
opened = threading.Event()
def work():
    assert libc.unshare(0x400 if sys.argv[1] == "own" else 0) == 0  # CLONE_FILES
    os.open("/dev/mine", os.O_RDONLY)
    opened.set()
    threading.Event().wait()
threading.Thread(target=work).start()
opened.wait()
print(flush=True)
if sys.argv[1] == "alone":
    libc.syscall(int(sys.argv[2]), 0)  # exit(2): of this thread
threading.Event().wait()
"""
ON_ITS_WAY = """
import os, socket, sys, threading
device = os.open("/dev/mine", os.O_RDONLY)
listens, sends = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
listens.bind("\\0mine"); listens.listen(); sends.connect("\\0mine")
if sys.argv[1] == "received":
    there, _ = listens.accept()
socket.send_fds(sends, [b"x"], [device])
os.close(device)
print(flush=True)
threading.Event().wait()
"""
EXIT = {"x86_64": "60", "aarch64": "93"}[os.uname().machine]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node of the host that a device has as /dev/mine, by a specification."""
    mine = tmp_path / "device"
    os.mknod(mine, 0o666 | stat.S_IFCHR, os.stat("/dev/full").st_rdev)
    mine.chmod(0o666)
    driver = tmp_path / "cdi"
    driver.mkdir()
    edits = {"deviceNodes": [{"path": "/dev/own"}, {"path": "/dev/mine", "hostPath": str(mine)}]}
    spec = {"kind": "nvidia.com/gpu", "devices": [{"name": "GPU-1", "containerEdits": edits}]}
    (driver / "nvidia.json").write_text(json.dumps(spec))
    monkeypatch.setattr("warmcell.sandbox.backends.cdi.DIRECTORIES", (driver,))
    return mine


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(["sh", "-c", "exec 3</dev/mine; echo; exec sleep 600"], id="program"),
        pytest.param(["python3", "-c", THREAD, "own"], id="thread-with-a-table-of-its-own"),
        pytest.param(["python3", "-c", THREAD, "alone", EXIT], id="thread-whose-first-has-ended"),
        pytest.param(["python3", "-c", ON_ITS_WAY, "received"], id="on-its-way-in-a-socket"),
        pytest.param(["python3", "-c", ON_ITS_WAY, "listened"], id="on-its-way-to-who-has-not-accepted"),
    ],
)
async def test_a_device_that_a_program_has_open_is_not_taken(places: Places, mine: Path, program: list[str]) -> None:
    """It would use it while somebody else has it. All stays as it is, until that program has ended."""
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[device("/dev/own")]
    )
    try:
        channel = await GuestChannel.open(instance.run_directory, timeout=60)
        before, first = mounts_of(instance.pid), set(instance.processes())
        async with channel.exec_stream(program) as process:
            await anext(process.output())
            with pytest.raises(UnsupportedOperationError, match="has the device of its GPU open"):
                await instance.show_gpus([])
            assert mounts_of(instance.pid) == before
        async with asyncio.timeout(60):
            while not first.issuperset(instance.processes()):  # noqa: ASYNC110 - it depends on another process
                await asyncio.sleep(0.01)
        await instance.show_gpus([])
        assert mounts_of(instance.pid) < before
        await channel.close()
    finally:
        await instance.stop()
    subject.nothing_is_left(sandbox_id, directory)


async def test_a_device_whose_node_has_gone_is_taken_away(places: Places, mine: Path) -> None:
    """As a part of a GPU that is divided anew: it is nobody's, and a new one of that name is not the sandbox's."""
    subject = subject_of(places)
    sandbox_id, directory = subject.place()
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, gpus=[device("/dev/own")]
    )
    try:
        before = mounts_of(instance.pid)
        mine.unlink()
        await instance.show_gpus([])
        assert before - mounts_of(instance.pid) == {("/dev/mine", "nosuid")}
        assert not Path(f"/proc/{instance.pid}/root/dev/mine").exists()
        os.mknod(mine, 0o666 | stat.S_IFCHR, os.stat("/dev/full").st_rdev)
        await instance.show_gpus([device("/dev/own")])
        assert mounts_of(instance.pid) == before
    finally:
        await instance.stop()
    subject.nothing_is_left(sandbox_id, directory)


def mounts_of(pid: int) -> set[tuple[str, str]]:
    """Where something is mounted in its sandbox, and whether programs there keep their rights."""
    lines = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    return {(fields[4], "nosuid" if "nosuid" in fields[5].split(",") else "") for fields in lines}
