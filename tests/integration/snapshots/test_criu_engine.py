"""The criu engine on real sandboxes: what is saved goes on elsewhere, and what fails changes nothing."""

import asyncio
import contextlib
import ctypes
import ctypes.util
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.snapshots.boxes import ON_EACH, Boxes, boxes_of, engine_of, nothing
from tests.leaks import Places
from warmcell.sandbox.backends.processes import children_of, has_ended, parent_of
from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotIncompatibleError,
    SnapshotNotFoundError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.helper import clones
from warmcell.sandbox.helper import places as guest_places
from warmcell.sandbox.helper.linux import PR_SET_CHILD_SUBREAPER
from warmcell.sandbox.helper.seals import Seals
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.criu import CriuEngine, SystemHelper

pytestmark = pytest.mark.criu

FIRST, SECOND, THIRD = "a" * 12, "b" * 12, "c" * 12


@pytest.fixture
async def boxes(places: Places, request: pytest.FixtureRequest) -> AsyncIterator[Boxes]:
    async with boxes_of(places, engine_of(request)) as made:
        yield made


@contextlib.contextmanager
def reaps_nobody() -> Iterator[None]:
    """Orphans become children of this process, which does not know of them; afterwards it reaps them."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        ours = children_of(os.getpid())
        for pid in ours:
            if has_ended(pid):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def images_of(boxes: Boxes) -> Path:
    return boxes.paths.images / "0"


def leftovers(boxes: Boxes) -> list[str]:
    """What operations that failed have left among the images."""
    return [path.name for path in images_of(boxes).iterdir() if path.name not in (".pages", ".pins")]


async def until_finished(boxes: Boxes, image: str) -> None:
    """Wait until the checksums of an image's memory are known."""
    deadline = time.monotonic() + 60
    while '"finished": null' in (images_of(boxes) / image / "image.json").read_text():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def flip(path: Path, *, at: int) -> None:
    """Change one byte, as a bad disk does: size as before."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


@pytest.mark.alone
async def test_it_says_that_it_is_ready(boxes: Boxes) -> None:
    """A real small dump and restore, once; asked again it knows."""
    took = []
    for _ in range(4):
        began = time.monotonic()
        report = await boxes.engine.probe()
        took.append(time.monotonic() - began)
        assert report.ready, report
    assert report.details["criu"] >= "4.2"
    assert min(took[1:]) < took[0] / 3, took


async def test_who_is_set_going_while_it_is_saved_is_not_saved(boxes: Boxes) -> None:
    """Any process of its sandbox can do that. What was read of it, and its files, would be of several moments."""
    source = await boxes.running()

    async def frozen() -> None:
        before = await source.count()
        await source.sh(f"kill -CONT {source.kernel}")
        await source.goes_on(past=before + 2)

    with pytest.raises(ConflictError, match="set the kernel going") as refused:
        await boxes.dump(source, FIRST, frozen=frozen)
    assert "SIGCONT" in refused.value.hint
    assert leftovers(boxes) == []
    await source.goes_on(past=await source.count() + 2)
    await boxes.dump(source, FIRST)
    await (await boxes.restored(FIRST)).goes_on()


@ON_EACH
async def test_the_source_goes_on_and_clones_count_from_the_same_number(boxes: Boxes) -> None:
    """One image, three sandboxes, one process number in all; nothing moves while the layer is saved."""
    source = await boxes.running()
    seen: list[int] = []

    async def frozen() -> None:
        seen.append(await source.count())
        await asyncio.sleep(0.1)
        seen.append(await source.count())

    dumped = await boxes.dump(source, FIRST, frozen=frozen)
    assert seen[0] == seen[1] > 0
    assert dumped.pids == (source.kernel,)
    assert source.kernel >= 1000
    assert dumped.memory_bytes > 4 << 20
    assert dumped.image_bytes > 1 << 20
    assert dumped.versions["engine"] == "criu"
    await source.goes_on(past=seen[1] + 5)
    for clone in [await boxes.restored(FIRST) for _ in range(3)]:
        assert clone.kernel == source.kernel
        assert await clone.goes_on() <= seen[1] + 200
        assert await clone.goes_on(past=seen[1] + 5) > seen[1]
        assert int(await clone.sh("sleep 0 & echo $!")) > clone.kernel
    (image,) = await boxes.engine.images()
    assert image.id == FIRST
    # What is counted is what the disk takes, which may be some blocks of its own more once all is written.
    assert image.image_bytes == pytest.approx(dumped.image_bytes, abs=1 << 18)
    elsewhere = dataclasses.replace(boxes.paths, state=boxes.paths.state / "other")
    assert await CriuEngine(paths=elsewhere, helper=SystemHelper(boxes.paths.helper_socket)).images() == []


async def test_stop_ends_the_kernel_when_its_layer_is_saved(boxes: Boxes) -> None:
    """Not before: should saving the layer fail it goes on."""
    source = await boxes.running()

    async def fails() -> None:
        raise CapacityError("no room for the layer")

    with pytest.raises(CapacityError, match="no room for the layer"):
        await boxes.dump(source, FIRST, then="stop", frozen=fails)
    await source.goes_on(past=await source.count() + 3)
    assert await boxes.engine.images() == []
    await boxes.dump(source, FIRST, then="stop")
    assert source.kernel not in await source.numbers()
    clone = await boxes.restored(FIRST)
    await clone.goes_on(past=await clone.goes_on())
    assert leftovers(boxes) == [FIRST]


@ON_EACH
async def test_a_restore_of_a_restore_of_a_restore(boxes: Boxes) -> None:
    """Memory that did not change is shared by the chain, and outlives the images that brought it."""
    source = await boxes.running(mib=24)
    first = await boxes.dump(source, FIRST, then="stop")
    second_box = await boxes.restored(FIRST)
    reached = await second_box.goes_on()
    second = await boxes.dump(second_box, SECOND, then="stop")
    assert second.image_bytes < first.image_bytes / 2
    third_box = await boxes.restored(SECOND)
    await boxes.engine.drop(SnapshotId(FIRST))
    await third_box.goes_on(past=reached)
    await boxes.dump(third_box, THIRD, then="stop")
    await boxes.engine.drop(SnapshotId(SECOND))
    clone = await boxes.restored(THIRD)
    await clone.goes_on(past=await clone.goes_on())
    await clone.goes_on(past=await clone.count() + 25)  # It has compared its memory with what it was.
    await boxes.engine.drop(SnapshotId(THIRD))
    await boxes.dump(clone, FIRST, then="stop")  # Its memory has no image any more, but is still kept.
    again = await boxes.restored(FIRST)
    await again.goes_on()


async def test_memory_that_nobody_needs_goes(boxes: Boxes) -> None:
    """With the last image of a page file and the last sandbox that has it mounted, at the next drop."""
    source = await boxes.running(mib=8)
    await boxes.dump(source, FIRST, then="stop")
    clone = await boxes.restored(FIRST)
    await until_finished(boxes, FIRST)
    await boxes.engine.drop(SnapshotId(FIRST))
    assert list((images_of(boxes) / ".pages").glob("????????????"))
    await clone.channel.close()
    await clone.instance.stop()
    other = await boxes.running()
    await boxes.dump(other, SECOND)
    await boxes.engine.drop(SnapshotId(SECOND))
    await boxes.engine.close()
    assert list((images_of(boxes) / ".pages").iterdir()) == []


async def test_memory_that_has_gone_is_written_over(boxes: Boxes) -> None:
    """By the next dump of about that size, but not as long as a clone maps it; and it is gone with the helper."""
    pages = images_of(boxes) / ".pages"
    source = await boxes.running(mib=80)
    await boxes.dump(source, FIRST)
    clone = await boxes.restored(FIRST)
    (first,) = pages.glob("????????????")
    inode = first.stat().st_ino
    await boxes.engine.drop(SnapshotId(FIRST))
    await boxes.dump(source, SECOND)
    (second,) = (images_of(boxes) / SECOND / "memory").iterdir()
    assert first.stat().st_ino == inode != second.stat().st_ino
    await clone.goes_on(past=await clone.count() + 25)  # It has compared its memory with what it was.
    await clone.channel.close()
    await clone.instance.stop()
    await boxes.dump(source, THIRD)
    (third,) = (images_of(boxes) / THIRD / "memory").iterdir()
    assert not first.exists()
    assert third.stat().st_ino == inode
    for image in (SECOND, THIRD):
        clone = await boxes.restored(image)
        await clone.goes_on(past=await clone.goes_on() + 25)
        await clone.channel.close()
        await clone.instance.stop()
        await boxes.engine.drop(SnapshotId(image))
    await boxes.engine.close()
    assert list(pages.iterdir()) == []


async def test_a_passing_image_is_restored_as_any_other(boxes: Boxes) -> None:
    """Only that no checksum of its memory is computed; what comes from it is saved again, with all checksums."""
    source = await boxes.running(mib=8)
    await boxes.engine.dump(
        source, pid=source.kernel, image=SnapshotId(FIRST), then="go_on", while_frozen=nothing, passing=True
    )
    clone = await boxes.restored(FIRST)
    await boxes.dump(clone, SECOND, then="stop")
    await until_finished(boxes, SECOND)
    assert '"finished": null' in (images_of(boxes) / FIRST / "image.json").read_text()
    (pages,) = (images_of(boxes) / FIRST / "memory").iterdir()
    assert (images_of(boxes) / ".pages" / f"{pages.name}.json").exists()
    await boxes.engine.drop(SnapshotId(FIRST))
    again = await boxes.restored(SECOND)
    await again.goes_on()


@ON_EACH
async def test_children_come_along(boxes: Boxes) -> None:
    """A pipe between the kernel and a child of it still works, on both sides, and so does what is held open."""
    before = (
        "import subprocess; child = subprocess.Popen(['cat'], stdin=-1, stdout=-1);"
        " log = open('/dev/shm/log', 'w+'); os.unlink('/dev/shm/log'); log.write('kept'); log.flush()"
    )
    each = "child.stdin.write(b'x'); child.stdin.flush(); assert child.stdout.read(1) == b'x'; log.seek(0);"
    source = await boxes.running(before=before, each=each + " assert log.read() == 'kept'")
    names: list[str] = []

    async def frozen() -> None:
        names.append(await source.sh("ls /dev/shm"))

    dumped = await boxes.dump(source, FIRST, frozen=frozen)
    assert len(dumped.pids) == 2
    await source.goes_on(past=await source.count() + 3)
    assert await source.sh("ls /dev/shm") == ""  # Nothing of criu's making is left.
    clone = await boxes.restored(FIRST)
    await clone.goes_on(past=await clone.goes_on() + 3)
    assert set(dumped.pids) <= set(await clone.numbers())


@ON_EACH
async def test_what_is_restored_is_in_the_control_groups_of_its_sandbox(boxes: Boxes) -> None:
    """All of it, children included, so that its limits hold, and in its namespaces; criu begins outside of them."""
    children = "import subprocess; [subprocess.Popen(['sleep', '600']) for _ in range(3)]"
    source = await boxes.running(before=children)
    await boxes.dump(source, FIRST, then="stop")
    for _ in range(3):
        clone = await boxes.restored(FIRST)
        groups = Path(f"/proc/{clone.pid}/cgroup").read_text()
        assert groups != Path("/proc/self/cgroup").read_text()
        kernel = guest_places.identify(os.pidfd_open(clone.pid), 0).find(clone.kernel)
        tree = [kernel, *guest_places.children(kernel)]
        assert len(tree) == 4
        assert {pid: Path(f"/proc/{pid}/cgroup").read_text() for pid in tree} == dict.fromkeys(tree, groups)
        for name in guest_places.NAMESPACES:
            assert len({os.readlink(f"/proc/{pid}/ns/{name}") for pid in (clone.pid, *tree)}) == 1, name


STARTS_AT_ONCE = """
import os, sys, time
from warmcell.sandbox.helper import enter, places
from warmcell.sandbox.helper.problems import HelperError

place = places.identify(os.pidfd_open(int(sys.argv[1])), 0)
shell = os.open("/bin/sh", os.O_RDONLY)
running = enter.Run(place, (shell, ["sh", "-c", "sleep 60 & wait"], [shell]), env={"PATH": "/bin"})
running.go()
deadline = time.monotonic() + 60
while not (late := [pid for child in places.children(os.getpid()) for pid in places.children(child)]):
    assert time.monotonic() < deadline
try:
    running.wait(timeout_s=0)
except HelperError:
    print(open(f"/proc/{late[0]}/cgroup").read())
"""


async def test_what_was_started_before_joining_joins_as_well(boxes: Boxes) -> None:
    """A program that is faster than Linux has its first children follow it into the sandbox's groups."""
    box = await boxes.fresh()
    argv = [sys.executable, "-c", STARTS_AT_ONCE, str(box.pid)]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == Path(f"/proc/{box.pid}/cgroup").read_text().strip()


ENDS_MEANWHILE = """
import os, select, signal, sys
from warmcell.sandbox.helper import enter, places
from warmcell.sandbox.helper.problems import HelperError

first = os.pidfd_open(int(sys.argv[1]))
prepare = signal.pause if sys.argv[2] == "preparing" else int
shell = os.open("/bin/sh", os.O_RDONLY)
running = enter.Run(places.identify(first, 0), (shell, ["sh", "-c", ":"], [shell]), env={}, prepare=prepare)
if sys.argv[2] == "prepared":
    assert select.select([running._word], [], [], 60)[0]
signal.pidfd_send_signal(first, signal.SIGKILL)
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
try:
    running.go()
except HelperError as error:
    print(error)
running.end()
"""


@pytest.mark.parametrize("moment", ["preparing", "prepared"])
async def test_a_sandbox_that_ends_while_it_is_entered_is_said_to_have_ended(boxes: Boxes, moment: str) -> None:
    """And not that a pipe was broken."""
    box = await boxes.fresh()
    argv = [sys.executable, "-c", ENDS_MEANWHILE, str(box.pid), moment]
    told = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=120, check=False)
    assert told.stdout == "The sandbox has ended, or what the helper did in it was killed\n", told.stderr


async def test_a_stopped_child_stays_stopped(boxes: Boxes) -> None:
    """What the user had stopped does not run because a snapshot was taken."""
    before = "import subprocess, signal; child = subprocess.Popen(['sleep', '600']); child.send_signal(signal.SIGSTOP)"
    source = await boxes.running(before=before)
    dumped = await boxes.dump(source, FIRST)
    await source.goes_on(past=await source.count() + 3)
    assert await source.sh(f"cut -d' ' -f3 /proc/{dumped.pids[1]}/stat") == "T"


async def test_an_open_file_that_has_changed_is_named(boxes: Boxes, places: Places) -> None:
    """The kernel would read on in another file; so it does not start."""
    workspace = places.root / "w"
    workspace.mkdir()
    (workspace / "data.csv").write_text("a,b\n1,2\n")
    source = await boxes.running(before=f"held = open('{workspace}/data.csv')", workspace=str(workspace))
    await boxes.dump(source, FIRST, then="stop")
    clone = await boxes.restored(FIRST, workspace=str(workspace))
    await clone.goes_on(past=await clone.goes_on())
    (workspace / "data.csv").write_text("c,d\n3,4\n")
    box = await boxes.fresh(workspace=str(workspace))
    with pytest.raises(SnapshotIncompatibleError, match=r"data\.csv") as raised:
        await boxes.engine.restore(box, image=SnapshotId(FIRST))
    assert raised.value.details["what"] == f"{workspace}/data.csv"
    assert raised.value.details["found"]
    assert FIRST in leftovers(boxes)
    assert max(await box.numbers()) < 1000


async def test_a_library_that_was_upgraded_is_still_there_for_the_kernel(boxes: Boxes, places: Places) -> None:
    """The one that it had mapped is kept, and shown to it in the place of the new one."""
    workspace = places.root / "w"
    workspace.mkdir()
    library = workspace / "libz.so"
    found = ctypes.util.find_library("z")
    original = next(Path(line.split()[-1]) for line in maps_with(found or "libz.so.1"))
    shutil.copy(original, library)
    source = await boxes.running(
        before=f"import ctypes; z = ctypes.CDLL('{library}'); z.zlibVersion.restype = ctypes.c_char_p",
        each="assert z.crc32(0, b'abc', 3) == 891568578",
        workspace=str(workspace),
    )
    await boxes.dump(source, FIRST, then="stop")
    library.unlink()
    library.write_bytes(b"another version")
    clone = await boxes.restored(FIRST, workspace=str(workspace))
    await clone.goes_on(past=await clone.goes_on() + 3)
    assert library.read_bytes() == b"another version"


def maps_with(name: str) -> list[str]:
    """Mappings of this process whose file has this name."""
    ctypes.CDLL(name)
    stem = name.partition(".so")[0]
    return [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.rpartition("/")[2].startswith(f"{stem}.so")
    ]


async def test_a_disk_that_is_full(boxes: Boxes) -> None:
    """A typed error with its cure; the kernel runs on, nothing is left, and with room it works."""
    images = boxes.paths.images
    images.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "warmcell-test", images], check=True)
    try:
        source = await boxes.running(mib=32)
        with pytest.raises(CapacityError) as raised:
            await boxes.dump(source, FIRST)
        assert raised.value.hint
        await source.goes_on(past=await source.count() + 3)
        assert leftovers(boxes) == []
        subprocess.run(["mount", "-o", "remount,size=200m", images], check=True)
        await boxes.dump(source, FIRST)
        clone = await boxes.restored(FIRST)
        await clone.goes_on()
        await clone.channel.close()
        await clone.instance.stop()
        await boxes.engine.close()
    finally:
        subprocess.run(["umount", "-l", images], check=True)


@pytest.mark.parametrize("what", ["inventory.img", "image.json", "memory"])
async def test_a_flipped_byte_is_found(boxes: Boxes, what: str) -> None:
    """In small files, in what the helper wrote, and in memory; nothing is started then."""
    source = await boxes.running(mib=8)
    await boxes.dump(source, FIRST, then="stop")
    await until_finished(boxes, FIRST)
    path = images_of(boxes) / FIRST / what
    flip(next(path.iterdir()) if path.is_dir() else path, at=40)
    box = await boxes.fresh()
    with pytest.raises(SnapshotCorruptError) as raised:
        await boxes.engine.restore(box, image=SnapshotId(FIRST))
    assert raised.value.hint
    assert max(await box.numbers()) < 1000


@pytest.mark.parametrize(
    ("field", "value", "what"), [("criu", "3.17", "CRIU"), ("linux", "5.4.0", "Linux"), ("cpu", ["amx9"], "processor")]
)
async def test_a_machine_that_is_not_as_it_was(boxes: Boxes, field: str, value: object, what: str) -> None:
    """Said with what was expected and what was found."""
    source = await boxes.running()
    await boxes.dump(source, FIRST, then="stop")
    await until_finished(boxes, FIRST)
    seals, path = Seals(str(boxes.paths.images / "key")), str(images_of(boxes) / FIRST / "image.json")
    seals.write(path, {**seals.read(path), field: value})
    with pytest.raises(SnapshotIncompatibleError, match=what) as raised:
        await boxes.restored(FIRST)
    assert {"expected", "found"} <= set(raised.value.details)


async def test_what_is_not_there_and_what_is_there_twice(boxes: Boxes) -> None:
    """Unknown images, ids in use, processes that have ended, dropping twice."""
    source = await boxes.running()
    with pytest.raises(SnapshotNotFoundError):
        await boxes.restored(FIRST)
    await boxes.dump(source, FIRST)
    with pytest.raises(ConflictError):
        await boxes.dump(source, FIRST)
    await source.goes_on(past=await source.count() + 3)
    with pytest.raises(ConflictError):
        await boxes.engine.restore(source, image=SnapshotId(FIRST))
    with pytest.raises(WarmcellError, match="9999"):
        await boxes.engine.dump(
            source, pid=9999, image=SnapshotId(SECOND), then="go_on", while_frozen=lambda: asyncio.sleep(0)
        )
    await boxes.engine.drop(SnapshotId(FIRST))
    await boxes.engine.drop(SnapshotId(FIRST))
    assert await boxes.engine.images() == []


@ON_EACH
async def test_what_cannot_be_saved_is_named(boxes: Boxes) -> None:
    """A socket whose other end is not of the kernel; it runs on."""
    before = (
        "import socket, subprocess; a, b = socket.socketpair();"
        " subprocess.Popen(['setsid', '-f', 'sleep', '600'], stdin=b); b.close(); time.sleep(0.3)"
    )
    source = await boxes.running(before=before)
    with pytest.raises(UnsupportedOperationError, match="socket") as raised:
        await boxes.dump(source, FIRST)
    assert raised.value.details["criu"]
    await source.goes_on(past=await source.count() + 3)
    assert leftovers(boxes) == []


SLOW = """
import socket, threading
door = socket.socket(socket.AF_UNIX)
door.bind("/run/warmcell/door")
door.listen()
def serve():
    served, _ = door.accept()
    served.send(b".")
    served.recv(1)
    time.sleep(0.5)
    served.close()
threading.Thread(target=serve).start()
"""
"""It sees only after a while that its client has gone."""


@ON_EACH
async def test_a_client_that_has_just_left_is_in_nobodys_way(boxes: Boxes) -> None:
    """It is waited for until what is to be saved has seen that, as a kernel on a busy machine does late."""
    source = await boxes.running(before=SLOW)
    reader, writer = await asyncio.open_unix_connection(source.instance.run_directory / "door")
    assert await reader.read(1) == b"."
    writer.close()
    await writer.wait_closed()
    await boxes.dump(source, FIRST)
    await source.goes_on(past=await source.count() + 3)


def processes_named(name: str) -> list[int]:
    """Host pids of the processes below this one that are called so, or were started under this name."""
    found: list[int] = []
    for pid in guest_places.Place(os.getpid(), -1, {}).processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if guest_places.status(pid).get("Name") == name or command.startswith(f"{name}\0".encode()):
                found.append(pid)
    return found


async def kill_when_there(name: str, *, during: asyncio.Task[object], after_s: float = 0.0) -> None:
    """Kill the first process of this name as soon as there is one, if what needs it has not been faster."""
    while not (found := processes_named(name)):
        if during.done():
            return
        await asyncio.sleep(0.0005)
    await asyncio.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):
        os.kill(found[0], signal.SIGKILL)


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.02, 0.04])
async def test_criu_killed_in_the_middle_of_a_dump(boxes: Boxes, after_s: float) -> None:
    """The kernel runs on with all its threads, nothing is left, and the next dump works."""
    threads = "import threading; [threading.Thread(target=time.sleep, args=(600,)).start() for _ in range(3)]"
    source = await boxes.running(mib=64, before=threads)
    descriptors = await source.sh(f"ls /proc/{source.kernel}/fd")
    dumping = asyncio.create_task(boxes.dump(source, FIRST))
    await kill_when_there("criu", during=dumping, after_s=after_s)
    try:
        await dumping
    except SnapshotError:
        assert leftovers(boxes) == []
    await source.goes_on(past=await source.count() + 25)
    assert await source.sh(f"ls /proc/{source.kernel}/fd") == descriptors
    assert await source.sh(f"ls /proc/{source.kernel}/task | wc -l") == "4"
    await boxes.dump(source, SECOND)
    clone = await boxes.restored(SECOND)
    await clone.goes_on(past=await clone.count() + 25)


@pytest.mark.parametrize("after_s", [0.0, 0.02])
async def test_criu_killed_in_the_middle_of_a_restore(boxes: Boxes, after_s: float) -> None:
    """Nothing of the kernel is left in the sandbox, and the image is as before."""
    source = await boxes.running(mib=16)
    await boxes.dump(source, FIRST, then="stop")
    box = await boxes.fresh()
    restoring = asyncio.create_task(boxes.engine.restore(box, image=SnapshotId(FIRST)))
    await kill_when_there("criu", during=restoring, after_s=after_s)
    try:
        await restoring
    except SnapshotError:
        deadline = time.monotonic() + 60
        while source.kernel in await box.numbers():
            assert time.monotonic() < deadline
    clone = await boxes.restored(FIRST)
    await clone.goes_on()


async def test_the_helper_killed_while_a_kernel_is_frozen(boxes: Boxes) -> None:
    """Whoever is left sets the kernel going again, and the next request gets a new helper."""
    source = await boxes.running()

    async def frozen() -> None:
        for name in ("warmcell-work", "warmcell-helper"):
            for pid in processes_named(name):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(SnapshotError):
        await boxes.dump(source, FIRST, frozen=frozen)
    await source.goes_on(past=await source.count() + 3)
    async with asyncio.timeout(60):
        while leftovers(boxes):  # What was begun goes with the next removal, once it is known not to be in use.
            await boxes.dump(source, SECOND)
            await boxes.engine.drop(SnapshotId(SECOND))


async def test_a_worker_is_killed_where_nobody_reaps(boxes: Boxes) -> None:
    """As in a container whose first process is no init: what had entered a sandbox keeps that from no end."""
    source = await boxes.running(mib=64)
    with reaps_nobody():
        for image in (FIRST, SECOND, THIRD):  # A worker that is killed early or late has nobody in there.
            dumping = asyncio.create_task(boxes.dump(source, image))
            while not (running := processes_named("criu")) and not dumping.done():  # noqa: ASYNC110 - nobody tells it
                await asyncio.sleep(0.001)
            for worker in {parent_of(pid) for pid in running} - {0, os.getpid()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            with contextlib.suppress(SnapshotError):
                await dumping
            await source.goes_on(past=await source.count() + 3)
        await source.instance.stop()


async def test_dropped_while_it_is_restored(boxes: Boxes) -> None:
    """Each restore either comes up whole or says that there is no such snapshot."""
    source = await boxes.running(mib=8)
    await boxes.dump(source, FIRST, then="stop")
    fresh = [await boxes.fresh() for _ in range(4)]
    restores = [asyncio.create_task(boxes.engine.restore(box, image=SnapshotId(FIRST))) for box in fresh]
    await asyncio.sleep(0.03)
    await boxes.engine.drop(SnapshotId(FIRST))
    for box, ended in zip(fresh, await asyncio.gather(*restores, return_exceptions=True), strict=True):
        if isinstance(ended, BaseException):
            assert isinstance(ended, SnapshotNotFoundError), ended
            assert max(await box.numbers()) < 1000
        else:
            box.kernel = ended.pid
            await box.goes_on(past=await box.count() + 25)
    assert await boxes.engine.images() == []
    began = time.monotonic()
    await boxes.engine.close()
    assert time.monotonic() - began < clones.IDLE_S / 2  # Who restored them has ended with the last one.


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "not there"), ("#!/bin/sh\necho Version: 3.17.1\n", "too old"), ("#!/bin/sh\n", "code 0")],
)
async def test_a_criu_that_cannot_be_used(
    places: Places, monkeypatch: pytest.MonkeyPatch, content: str | None, why: str
) -> None:
    """The report says why and what to do; nothing else is tried."""
    named = places.root / "criu"
    if content is not None:
        named.write_text(content)
        named.chmod(0o755)
    monkeypatch.setenv("WARMCELL_CRIU", str(named))
    engine = CriuEngine(paths=Paths(runtime=places.runtime, state=places.state, leases=places.leases).make())
    report = await engine.probe()
    await engine.close()
    assert not report.ready
    assert why in report.why_not
    assert "warmcell criu" in report.hint


async def test_a_kernel_that_dies_while_it_is_saved(boxes: Boxes) -> None:
    """It has failed at once, though CRIU would wait for threads that will never be heard of again."""
    moments = random.Random(4)
    threads = (
        "import threading\nfor _ in range(8): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()"
    )
    for number in range(12):
        box = await boxes.running(before=threads, mib=1)
        [host] = [pid for pid in below(box.pid) if guest_places.guest_pid_of(pid) == box.kernel]
        dumping = asyncio.create_task(boxes.dump(box, f"{number:012d}"))
        await asyncio.sleep(moments.uniform(0.0, 0.15))
        os.kill(host, signal.SIGKILL)
        await asyncio.wait({dumping}, timeout=45)
        assert dumping.done(), number
        if dumping.exception() is not None:
            assert isinstance(dumping.exception(), WarmcellError)
            assert not (images_of(boxes) / f"{number:012d}").exists()


def below(pid: int) -> list[int]:
    """A process and all that it and those have started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in below(int(child)))]


async def test_an_image_that_nobody_wants_any_more_does_not_come_to_be(boxes: Boxes) -> None:
    """One that is dropped while it is being made: its kernel goes on, and nothing is left."""
    box = await boxes.running(mib=4)

    async def dropped() -> None:
        await boxes.engine.drop(SnapshotId(FIRST))

    with pytest.raises(WarmcellError):
        await boxes.dump(box, FIRST, frozen=dropped)
    await box.goes_on(past=await box.count())
    assert leftovers(boxes) == []
    await boxes.dump(box, FIRST)
