"""Saved layers of real sandboxes: hostile guests, full disks, and what it costs."""

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import folder, subject_of
from tests.leaks import Places
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.errors import CapacityError, UnsupportedOperationError
from warmcell.sandbox.models import Limits
from warmcell.sandbox.testing.contract import Box, Subject
from warmcell.sandbox.testing.contract.layers import described, differences

pytestmark = pytest.mark.bubblewrap

SWAP = """
import ctypes, os, sys
outside = sys.argv[1]
os.chdir("/tmp")
os.makedirs("d", exist_ok=True)
for number in range(20):
    open(f"d/{number}", "w").write("own")
open("d/secret", "w").write("own")
os.symlink(outside, "l")
open("f", "w").write("own")
os.symlink(outside + "/secret", "m")
exchange = lambda one, other: ctypes.CDLL(None).renameat2(-100, one, -100, other, 2)
print("ready", flush=True)
while True:
    exchange(b"d", b"l")
    exchange(b"f", b"m")
"""
"""Swaps a directory and a file for links that lead out of the sandbox, as fast as it can."""

CHANGE = """
import os, random, shutil, sys
top, chance = sys.argv[1], random.Random(int(sys.argv[2]))
for _ in range(60):
    found = [os.path.join(path, name) for path, folders, names in os.walk(top) for name in (*folders, *names)]
    found = [path for path in found if os.path.lexists(path)]
    folders = [top, *(path for path in found if os.path.isdir(path) and not os.path.islink(path))]
    what = chance.randrange(8)
    new = os.path.join(chance.choice(folders), chance.choice("abcdef"))
    old = chance.choice(found) if found else None
    if what <= 1 and not os.path.lexists(new):
        os.mkdir(new)
    elif what == 2 and not os.path.isdir(new):
        if os.path.islink(new):
            os.unlink(new)
        with open(new, "w") as file:
            file.write(str(chance.random()))
    elif what == 3 and not os.path.lexists(new):
        os.symlink(chance.choice(("/etc/passwd", "a", "..")), new)
    elif what == 4 and old and (os.path.islink(old) or not os.path.isdir(old)):
        os.unlink(old)
    elif what == 5 and old and os.path.isdir(old) and not os.path.islink(old):
        shutil.rmtree(old)
    elif what == 6 and old and not os.path.islink(old):
        os.chmod(old, chance.choice((0o700, 0o755, 0o711)))
    elif what == 7 and old and not os.path.lexists(new) and not new.startswith(old + "/"):
        shutil.move(old, new)
"""
"""Changes a tree at random."""


@pytest.fixture
def subject(places: Places) -> Subject:
    return subject_of(places)


@pytest.fixture
def layers(places: Places) -> Iterator["Layers"]:
    made = Layers(places.root / "layers")
    yield made
    remove_tree(made.directory)


class Layers:
    """Saved layers of a test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0

    async def save(self, box: Box) -> Path:
        """The layer of a sandbox."""
        self._count += 1
        target = self.directory / str(self._count)
        target.mkdir(mode=0o700, parents=True)
        await box.instance.save_layer(target)
        return target


async def site_packages(subject: Subject, box: Box) -> str:
    """Where packages are installed in a sandbox."""
    said = await box.run(subject.python, "-I", "-c", "import site; print(site.getsitepackages()[0])")
    return said.stdout.strip()


async def test_a_guest_that_swaps_files_for_links_meanwhile_gets_nothing_of_the_host(
    places: Places, subject: Subject, layers: Layers
) -> None:
    """What its links lead to is not read, however the race goes; its own files are."""
    outside = folder(places, "outside")
    (outside / "secret").write_text("the host's")
    own = 0
    async with subject.box() as box:
        swapping = asyncio.create_task(box.run(subject.python, "-I", "-c", SWAP, str(outside), timeout=60))
        while (await box.shell("test -e /tmp/m")).exit_code != 0:
            assert not swapping.done(), swapping.result()
        for _ in range(25):
            layer = await layers.save(box)
            for path in (layer / "tmp").rglob("*"):
                if not path.is_symlink() and path.is_file():
                    assert path.read_text() == "own", path
                    own += 1
        await box.shell("pkill -9 -f renameat2")
        await swapping
    assert own > 25


async def test_random_changes_survive_any_number_of_saves(subject: Subject, layers: Layers) -> None:
    """A tree in the environment, and one above a package that was there, are always as the guest has left them."""
    async with subject.box() as box:
        site = await site_packages(subject, box)
        tops = [f"{site}/mine", f"{site}/pip/_internal"]
        await box.says(f"mkdir {site}/mine")
        if (await box.shell(f"test -O {site}/pip/_internal")).exit_code != 0:
            tops = tops[:1]
        layer = await layers.save(box)
    for seed in range(6):
        async with subject.box(layer=layer) as box:
            for top in tops:
                changed = await box.run(subject.python, "-I", "-c", CHANGE, top, str(seed))
                assert changed.exit_code == 0, changed.stderr
            before = await described(subject, box, *tops)
            layer = await layers.save(box)
        async with subject.box(layer=layer) as box:
            after = await described(subject, box, *tops)
            assert after == before, f"seed {seed}: {differences(before, after)}"


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of 256 KiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir()
    assert libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, b"size=256k,mode=0700") == 0
    try:
        yield
    finally:
        assert libc.umount(os.fsencode(path)) == 0


@pytest.mark.root
async def test_a_full_disk_is_said_and_nothing_is_left(places: Places, subject: Subject) -> None:
    """The sandbox runs on, and its files can be saved elsewhere."""
    async with subject.box() as box:
        await box.says("head -c 1000000 /dev/zero > /tmp/large")
        with small_disk(places.root / "small"):
            target = places.root / "small" / "layer"
            target.mkdir(mode=0o700)
            with pytest.raises(CapacityError, match="disk is full"):
                await box.instance.save_layer(target)
            assert not list((places.root / "small").iterdir())
        assert await box.says("wc -c < /tmp/large") == "1000000"


async def test_layers_that_add_up_to_more_than_the_limit_are_refused_in_time(subject: Subject, layers: Layers) -> None:
    """What is saved above an earlier layer counts with it, so that whatever is saved can also be begun with."""
    limits = Limits(layer_bytes=8 * 2**20, shm_bytes=2**20)
    async with subject.box(limits=limits) as box:
        site = await site_packages(subject, box)
        await box.says(f"head -c 6000000 /dev/zero > {site}/one")
        layer = await layers.save(box)
    async with subject.box(limits=limits, layer=layer) as box:
        too_much = await box.shell(f"head -c 6000000 /dev/zero > {site}/two")
        assert too_much.exit_code != 0
        assert "No space left" in too_much.stderr
        await box.says(f"rm {site}/one {site}/two")
        layer = await layers.save(box)
    async with subject.box(limits=limits, layer=layer) as box:
        await box.says(f"head -c 6000000 /dev/zero > {site}/two")


async def test_a_file_under_a_lease_is_named(subject: Subject, layers: Layers) -> None:
    """An open would wait until its holder, which may be frozen, gives the lease up."""
    hold = "import fcntl, os, time; f = os.open('/tmp/leased', os.O_RDWR | os.O_CREAT);"
    hold += "fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK); os.mkdir('/tmp/held'); time.sleep(60)"
    async with subject.box() as box:
        holding = asyncio.create_task(
            box.run(subject.python, "-I", "-c", f"import signal; signal.signal(29, 1); {hold}")
        )
        while (await box.shell("test -d /tmp/held")).exit_code != 0:
            assert not holding.done(), holding.result()
        with pytest.raises(UnsupportedOperationError, match="leased"):
            await layers.save(box)
        await box.shell("pkill -9 -f F_SETLEASE")
        await holding


async def test_the_guest_learns_nothing_of_where_its_layer_is(subject: Subject, layers: Layers) -> None:
    """Neither the place of the layer nor that of the sandbox's own files stands in its mounts."""
    async with subject.box() as box:
        layer = await layers.save(box)
        plain = await box.says("cat /proc/self/mountinfo")
    async with subject.box(layer=layer) as box:
        seen = await box.says("cat /proc/self/mountinfo /proc/self/mounts")
        assert "overlay" in seen
        assert str(layer) not in seen
        assert str(box.directory) not in seen
        assert len(plain.splitlines()) == len((await box.says("cat /proc/self/mountinfo")).splitlines())


async def test_each_sandbox_has_a_name_and_a_closed_room_of_its_own(subject: Subject) -> None:
    """Clones tell themselves apart by the name; into the room go memory images."""
    async with subject.box() as one, subject.box() as other:
        for box in (one, other):
            name = f"warmcell-{box.directory.name[:6]}"
            assert await box.says("hostname; cat /etc/hostname") == f"{name}\n{name}"
            assert await box.says("getent hosts $(hostname)")
            assert await box.says("stat -c %a-%h /.warmcell") == "700-2"
            assert (await box.shell("touch /.warmcell/new")).exit_code != 0
            if os.getuid() == 0:
                assert (await box.shell("ls /.warmcell")).exit_code != 0


async def test_a_layer_that_a_restored_sandbox_uses_may_be_renamed(subject: Subject, layers: Layers) -> None:
    """Whoever removes a snapshot can put it aside first."""
    async with subject.box() as box:
        site = await site_packages(subject, box)
        await box.says(f"mkdir {site}/mine; echo here > {site}/mine/file")
        layer = await layers.save(box)
    async with subject.box(layer=layer) as box:
        layer.rename(layer.with_name("aside"))
        assert await box.says(f"cat {site}/mine/file") == "here"
        again = await layers.save(box)
    async with subject.box(layer=again) as box:
        assert await box.says(f"cat {site}/mine/file") == "here"


async def test_a_nearly_empty_layer_costs_next_to_nothing(subject: Subject, layers: Layers) -> None:
    """Saving takes a part of what a start takes; a start with a layer about as long as one without."""
    plain, with_layer, saving = [], [], []
    async with _timed(subject, None, plain) as box:
        await box.says("echo x > /tmp/x; echo y > ~/y")
        layer = await layers.save(box)
    for _ in range(6):
        async with _timed(subject, None, plain):
            pass
        async with _timed(subject, layer, with_layer) as box:
            began = time.perf_counter()
            await layers.save(box)
            saving.append(time.perf_counter() - began)
    # The best of several: whatever else runs on the machine only ever adds.
    assert min(saving) < 0.4 * min(plain)
    assert min(with_layer) < 2 * min(plain)


@contextlib.asynccontextmanager
async def _timed(subject: Subject, layer: Path | None, taken: list[float]) -> AsyncIterator[Box]:
    began = time.perf_counter()
    async with subject.box(layer=layer) as box:
        taken.append(time.perf_counter() - began)
        yield box
