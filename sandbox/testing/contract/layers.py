"""What a sandbox has of its own is saved, and sandboxes begin with it."""

import json
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import SnapshotCorruptError, SnapshotIncompatibleError, UnsupportedOperationError
from warmcell.sandbox.models import Limits, Workspace
from warmcell.sandbox.testing.contract.subject import SMALL, Box, Register, Subject, expect

check = Register()

CYCLES = 4
MANY = 5000
LONGEST_S = 60.0
"""Some 0.3 s where nothing else uses the disk."""

DESCRIBE = """
import hashlib, json, os, stat, sys

def about(path):
    found = os.lstat(path)
    told = {"mode": oct(found.st_mode), "owner": found.st_uid}
    if not stat.S_ISDIR(found.st_mode) and "site-packages" not in path:
        told["links"] = found.st_nlink  # Below an overlay it counts those of other saved layers too.
    if not stat.S_ISDIR(found.st_mode) or path in sys.argv:
        told["changed"] = 0 if path in sys.argv else found.st_mtime_ns
    if stat.S_ISREG(found.st_mode):
        told["size"], told["sparse"] = found.st_size, found.st_blocks * 512 < found.st_size
        if found.st_uid == os.getuid():
            os.chmod(path, 0o600)
        with open(path, "rb") as file:
            told["content"] = hashlib.sha256(file.read()).hexdigest()
        told["attributes"] = {name: os.getxattr(path, name).hex() for name in sorted(os.listxattr(path))}
        if found.st_uid == os.getuid():
            os.chmod(path, stat.S_IMODE(found.st_mode))
    if stat.S_ISLNK(found.st_mode):
        told["target"] = os.readlink(path)
    return told

def walk(path, into, device):
    if os.lstat(path).st_dev != device:
        return True  # The environment, say, whose place happens to be below /tmp. What leads there is nobody's.
    into[path], foreign = about(path), False
    if stat.S_ISDIR(os.lstat(path).st_mode):
        mode = stat.S_IMODE(os.lstat(path).st_mode)
        mine = os.lstat(path).st_uid == os.getuid()
        if mine:
            os.chmod(path, mode | 0o700)
        for name in sorted(os.listdir(path)):
            foreign |= walk(os.path.join(path, name), into, device)
        if mine:
            os.chmod(path, mode)
    if foreign and path not in sys.argv:
        del into[path]
    return foreign

found = {}
for top in sys.argv[1:]:
    if os.path.lexists(top):
        walk(top, found, os.lstat(top).st_dev)
    else:
        found[top] = None
print(json.dumps(found))
"""
"""Says all there is to say about trees, apart from times of directories, as JSON."""

MESS = """
import os, socket, sys
for top in sys.argv[1:]:
    os.makedirs(top + "/deep/er", exist_ok=True)
    os.chdir(top)
    with open("plain", "wb") as file:
        file.write(os.urandom(100_000))
    os.utime("plain", ns=(1, 1_234_567_890_123_456_789))
    with open("sparse", "wb") as file:
        file.write(b"begin")
        file.seek(8 << 20)
        file.write(b"middle")
        file.truncate(16 << 20)
    with open("deep/er/one", "w") as file:
        file.write("linked")
    os.link("deep/er/one", "other")
    os.symlink("/etc/passwd", "link")
    os.symlink("nowhere", "deep/dangling")
    os.mkfifo("fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    with open("closed", "w") as file:
        file.write("nobody reads this")
    os.chmod("closed", 0)
    os.makedirs("shut/inner")
    open("shut/inner/file", "w").close()
    os.chmod("shut", 0)
    os.chmod("deep", 0o1711)
    open("na\\udcffme \\n with all", "w").close()
    open("script", "w").close()
    os.chmod("script", 0o755)
    try:
        os.setxattr("plain", "user.colour", b"blue")
    except OSError:
        pass
"""
"""Makes one of everything in each directory that it is given."""


def has_layers(subject: Subject) -> bool:
    """Whether a backend saves what a sandbox has of its own."""
    return subject.backend.capabilities.layers


async def described(subject: Subject, box: Box, *tops: str) -> Any:
    """All there is to say about trees in it."""
    said = await box.run(subject.python, "-I", "-c", DESCRIBE, *tops)
    expect(said.exit_code == 0, f"looking at {tops} failed: {said.stderr}")
    return json.loads(said.stdout)


async def saved(subject: Subject, box: Box, name: str) -> Path:
    """Its layer, saved."""
    target = subject.directory / "w" / f"{name}-{secrets.token_hex(4)}"
    target.mkdir(mode=0o700, parents=True)
    await box.instance.save_layer(target)
    return target


def differences(before: Any, after: Any) -> str:
    """The first few entries that are not as they were."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name}: {before.get(name)} became {after.get(name)}" for name in names[:3])


@asynccontextmanager
async def site_of(subject: Subject, box: Box) -> AsyncIterator[str]:
    """Where packages are installed in it; a package of its own is there to be changed."""
    said = await box.run(subject.python, "-I", "-c", "import site; print(site.getsitepackages()[0])")
    site = said.stdout.strip()
    made = await box.shell(f"mkdir -p {site}/mine/inner && echo 1 > {site}/mine/inner/a && echo 2 > {site}/mine/b")
    yield site if made.exit_code == 0 else ""


@check(isolated=True, needs=has_layers)
async def everything_of_a_sandboxs_own_is_there_again(subject: Subject) -> None:
    async with subject.box() as box:
        home = await box.says("echo ~")
        tops = ["/tmp/a", f"{home}/a", "/dev/shm/a"]
        async with site_of(subject, box) as site:
            tops += [f"{site}/a"] if site else []
        made = await box.run(subject.python, "-I", "-c", MESS, *tops)
        expect(made.exit_code == 0, f"making the files failed: {made.stderr}")
        before = await described(subject, box, *tops)
        layer = await saved(subject, box, "layer")
        expect(await described(subject, box, *tops) == before, "saving them has changed them")
    async with subject.box(layer=layer) as box:
        after = await described(subject, box, *tops)
        expect(after == before, f"not as they were: {differences(before, after)}")


@check(isolated=True, needs=has_layers)
async def what_was_removed_or_replaced_stays_so(subject: Subject) -> None:
    async with subject.box() as box, site_of(subject, box) as site:
        if not site:
            return
        tops = [f"{site}/mine", f"{site}/pip"]
        first = await saved(subject, box, "first")
    scripts = [
        f"cd {site} && rm mine/b && mkdir mine/b && echo in > mine/b/in && rm -r mine/inner",
        f"cd {site} && mkdir mine/inner && echo new > mine/inner/c && chmod 500 mine && chmod 750 mine/inner",
        f"cd {site} && chmod 700 mine && rm -r mine && echo file > mine",
        f"cd {site} && rm mine && mkdir -p mine/inner && ln -s b mine/a && mv mine/inner mine/moved",
    ]
    if await _is_changeable(subject, first, f"{site}/pip"):
        scripts += [
            f"cd {site} && cp -r pip other && rm -r pip && mkdir pip && echo 3 > pip/three",
            f"cd {site} && rm -r pip",
            f"cd {site} && mv other pip && chmod 700 pip && echo >> pip/__init__.py",
        ]
    layer = first
    for number, script in enumerate(scripts):
        async with subject.box(layer=layer) as box:
            await box.says(script)
            before = await described(subject, box, *tops)
            names = await box.says(f"ls -A {site}")
            layer = await saved(subject, box, f"step{number}")
        async with subject.box(layer=layer) as box:
            after = await described(subject, box, *tops)
            expect(after == before, f"after {script!r}: {differences(before, after)}")
            expect(await box.says(f"ls -A {site}") == names, f"after {script!r} other names are there")


async def _is_changeable(subject: Subject, layer: Path, path: str) -> bool:
    async with subject.box(layer=layer) as box:
        return (await box.shell(f"test -O {path}")).exit_code == 0


@check(isolated=True, needs=has_layers)
async def a_saved_layer_serves_many_and_none_changes_it(subject: Subject) -> None:
    async with subject.box() as box, site_of(subject, box) as site:
        await box.says("echo kept > /tmp/kept; mkdir -p ~/kept; echo kept > ~/kept/file")
        layer = await saved(subject, box, "layer")
    before = _on_disk(layer)
    async with subject.box(layer=layer) as one, subject.box(layer=layer) as other:
        await one.says("echo changed > /tmp/kept; rm -r ~/kept; chmod 777 /tmp/kept; touch /dev/shm/new")
        if site:
            await one.says(f"rm -r {site}/mine/inner; echo changed > {site}/mine/b; chmod 777 {site}/mine")
            expect(await other.says(f"cat {site}/mine/inner/a {site}/mine/b") == "1\n2", "the other's have changed")
        expect(await other.says("cat /tmp/kept ~/kept/file") == "kept\nkept", "the other's files have changed")
        await saved(subject, one, "next")
        expect(_on_disk(layer) == before, "the saved layer has changed")
    expect(_on_disk(layer) == before, "the saved layer has changed")


@check(isolated=True, needs=has_layers)
async def saving_and_beginning_again_changes_nothing_however_often(subject: Subject) -> None:
    async with subject.box() as box, site_of(subject, box) as site:
        home = await box.says("echo ~")
        tops = ["/tmp", home, "/dev/shm", *([f"{site}/mine"] if site else [])]
        made = await box.run(subject.python, "-I", "-c", MESS, *(f"{top}/a" for top in tops))
        expect(made.exit_code == 0, made.stderr)
        if site:
            await box.shell(f"rm -rf {site}/pip")
        layer = await saved(subject, box, "cycle")
        before = await described(subject, box, *tops)
    for number in range(CYCLES):
        async with subject.box(layer=layer) as box:
            layer = await saved(subject, box, f"cycle{number}")
            after = await described(subject, box, *tops)
            expect(after == before, f"in cycle {number}: {differences(before, after)}")


@check(isolated=True, needs=has_layers)
async def links_that_a_guest_made_lead_a_saved_layer_nowhere(subject: Subject) -> None:
    outside = subject.folder("outside")
    (outside / "secret.txt").write_text("secret")
    (outside / "secret.txt").chmod(0o644)
    async with subject.box() as box:
        for place in ("/tmp", "/dev/shm", await box.says("echo ~")):
            await box.says(f"ln -s {outside} {place}/folder; ln -s {outside}/secret.txt {place}/file")
        layer = await saved(subject, box, "layer")
    found = [path for path in _walk(layer) if os.path.basename(path) == "secret.txt"]
    expect(not found, f"what a link leads to was saved: {found}")
    async with subject.box(layer=layer) as box:
        await box.shell("echo changed > /tmp/file; echo changed > /tmp/folder/new")
        expect(await box.says("readlink /tmp/folder") == str(outside), "the link is not as it was")
    expect([path.name for path in outside.iterdir()] == ["secret.txt"], "something was made outside")
    expect((outside / "secret.txt").read_text() == "secret", "the file outside has changed")


@check(isolated=True, needs=has_layers)
async def sockets_of_the_guest_and_a_persistent_home_are_no_part_of_a_layer(subject: Subject) -> None:
    async with subject.box(home="persistent") as box:
        await box.says(f"touch ~/mine.txt {box.instance.guest_run_directory}/mine.sock")
        layer = await saved(subject, box, "layer")
        await box.says("rm ~/mine.txt")
    names = [os.path.basename(path) for path in _walk(layer)]
    expect("mine.txt" not in names and "mine.sock" not in names, "they were saved")
    async with subject.box(home="persistent", layer=layer):
        pass


@check(isolated=True, needs=has_layers)
async def a_layer_that_does_not_fit_is_refused(subject: Subject) -> None:
    async with subject.box() as box:
        await box.says("head -c 9000000 /dev/zero > /tmp/large")
        layer = await saved(subject, box, "layer")
    small = Limits(layer_bytes=8 * 2**20, shm_bytes=SMALL.shm_bytes, pids=SMALL.pids)
    for why, changes in (("limits", {"limits": small}), ("home", {"home": "persistent"})):
        try:
            async with subject.box(layer=layer, **changes):
                pass
        except SnapshotIncompatibleError as error:
            expect(error.hint and {"expected", "found"} <= set(error.details), f"{error} says too little")
            continue
        expect(False, f"a layer of other {why} was taken")
    for broken in ("layer.json", "tmp"):
        (layer / broken).rename(layer / "gone")
        try:
            async with subject.box(layer=layer):
                pass
        except SnapshotCorruptError:
            (layer / "gone").rename(layer / broken)
            continue
        expect(False, f"a layer without {broken} was taken")


@check(isolated=True, needs=has_layers)
async def a_layer_of_many_files_is_saved_and_begun_with_in_seconds(subject: Subject) -> None:
    async with subject.box() as box, site_of(subject, box) as site:
        where = f"{site}/mine" if site else "/tmp"
        script = f"import os\nos.chdir({where!r})\nfor n in range({MANY}): open(str(n), 'w').write(str(n))"
        made = await box.run(subject.python, "-I", "-c", script)
        expect(made.exit_code == 0, made.stderr)
        began = time.monotonic()
        layer = await saved(subject, box, "layer")
        taken = time.monotonic() - began
        expect(taken < LONGEST_S, f"saving {MANY} files took {taken:.1f} s")
    async with subject.box(layer=layer) as box:
        count = await box.says(f"find {where} -maxdepth 1 -type f -name '[0-9]*' | wc -l")
        expect(count == str(MANY), f"{count} files are there of {MANY}")


@check(isolated=True, needs=has_layers)
async def a_copy_on_write_workspace_is_the_sandboxes_own(subject: Subject) -> None:
    folder = subject.folder("work")
    (folder / "given.txt").write_text("given")
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("inner")
    workspace = Workspace(path=str(folder), mode="cow")
    async with subject.box(workspace=workspace) as box:
        expect(await box.says(f"cat {folder}/given.txt") == "given", "a file of the host is not there")
        if box.instance.workspace_note:
            return
        await box.says(f"cd {folder} && echo changed > given.txt && rm -r inner && echo new > new.txt")
        async with subject.box(workspace=workspace) as other:
            expect(await other.says(f"cat {folder}/given.txt {folder}/inner/file") == "giveninner", "another sees it")
        layer = await saved(subject, box, "layer")
    expect(sorted(path.name for path in folder.iterdir()) == ["given.txt", "inner"], "the host's folder has changed")
    expect((folder / "given.txt").read_text() == "given", "the host's file has changed")
    async with subject.box(workspace=workspace, layer=layer) as box:
        expect(
            await box.says(f"cd {folder} && ls && cat given.txt new.txt") == "given.txt\nnew.txt\nchanged\nnew", "gone"
        )


@check(programs=True, needs=lambda subject: not has_layers(subject))
async def without_layers_nothing_is_saved_and_none_is_taken(subject: Subject) -> None:
    target = subject.folder("layer")
    async with subject.box() as box:
        try:
            await box.instance.save_layer(target)
        except UnsupportedOperationError as error:
            expect(error.hint, "it does not say what to do")
        else:
            expect(False, "it saved something")
    expect(not list(target.iterdir()), "something was saved")
    cow: dict[str, Any] = {"workspace": Workspace(path=str(target), mode="cow")}
    for changes in ({"layer": target}, *([] if subject.isolated else [cow])):
        place = subject.place()
        try:
            await (await subject.create(place=place, **changes)).stop()
        except UnsupportedOperationError:
            subject.nothing_is_left(*place)
            continue
        expect(False, f"it took {changes}")


def _walk(top: Path) -> list[str]:
    return [os.path.join(path, name) for path, _, names in os.walk(top) for name in names]


def _on_disk(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory, with what a change would change."""
    found: dict[str, tuple[object, ...]] = {}
    for path, directories, names in os.walk(top):
        for name in (*directories, *names):
            full = os.path.join(path, name)
            seen = os.lstat(full)
            found[full] = (seen.st_mode, seen.st_uid, seen.st_size, seen.st_mtime_ns, seen.st_ino)
    return found
