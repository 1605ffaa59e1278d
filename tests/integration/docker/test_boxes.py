"""What is special about sandboxes that are containers."""

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import IMAGE, PYTHON, Dockerd
from tests.integration.docker.boxes import subject_of
from tests.lanes import as_ordinary_user, ordinary_uid
from tests.leaks import Places
from warmcell.sandbox.backends.docker import numbers
from warmcell.sandbox.errors import CapacityError, InvalidRequestError
from warmcell.sandbox.models import Limits, Mount, Workspace
from warmcell.sandbox.testing.contract import Subject

pytestmark = pytest.mark.docker

VOLUMES = "warmcell-test:volumes"
DENIED = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"userfaultfd": 323, "bpf": 321, "perf_event_open": 298, "keyctl": 250, "io_uring_setup": 425, "ptrace": 101}
told = {}
for name, number in numbers.items():
    made = libc.syscall(number, 0, 0, 0, 0, 0)
    told[name] = "allowed" if made >= 0 else os.strerror(ctypes.get_errno())
print(json.dumps(told))
"""


async def test_packages_go_home_and_come_before_the_images_own(docker: Dockerd, places: Places) -> None:
    """The image is read-only, and pip installs all the same, upgrades included."""
    async with subject_of(places, docker).box() as box:
        site = (await box.run(PYTHON, "-c", "import site; print(site.getusersitepackages())")).stdout.strip()
        await box.says(f"mkdir {site}/ipykernel && echo 'name = 42' > {site}/ipykernel/__init__.py")
        said = await box.run(PYTHON, "-c", "import ipykernel; print(ipykernel.name)")
        assert said.stdout == "42\n", said.stderr


async def test_the_filter_of_ours_is_there_beside_the_engines(docker: Dockerd, places: Places) -> None:
    """What the engine's profile of some versions lets through is refused by ours."""
    async with subject_of(places, docker).box() as box:
        told = json.loads((await box.run(PYTHON, "-c", DENIED)).stdout)
        assert set(told.values()) == {"Operation not permitted"}, told
        filters = await box.says("grep Seccomp_filters /proc/1/status")
        assert int(filters.split()[1]) >= 2


async def test_nothing_that_the_engine_adds_is_in_the_environment(docker: Dockerd, places: Places) -> None:
    """A clone has another name than its source, so none may be told by a variable."""
    async with subject_of(places, docker).box() as box:
        assert "HOSTNAME" not in await box.says("env")


@pytest.mark.root
async def test_a_folder_of_roots_is_read_only_and_says_why(docker: Dockerd, places: Places) -> None:
    """Nobody in a container is root, and engines cannot show root's files as somebody else's."""
    subject = subject_of(places, docker)
    async with subject.box(workspace=subject.folder("work")) as box:
        assert "chown" in box.instance.workspace_note
        assert (await box.shell(f"touch {subject.folder('work')}/new")).exit_code != 0
    closed = subject.folder("closed")
    closed.chmod(0o700)
    with pytest.raises(InvalidRequestError, match="by root alone"):
        await subject.create(workspace=Workspace(path=str(closed)))


async def test_what_belongs_to_the_keeper_is_covered_in_a_workspace_around_it(docker: Dockerd, places: Places) -> None:
    """A workspace that contains our directories shows nothing of them, and one inside them is refused."""
    subject = subject_of(places, docker)
    (places.state / "secret").write_text("secret")
    places.state.chmod(0o755)
    places.root.chmod(0o755)
    async with subject.box(workspace=places.root) as box:
        assert await box.says(f"stat --file-system --format %T {places.state} {places.runtime}") == "tmpfs\ntmpfs"
        assert (await box.shell(f"cat {places.state}/secret")).exit_code != 0
    with pytest.raises(InvalidRequestError, match="belongs to Warmcell"):
        await subject.create(workspace=places.state)


async def test_ten_sandboxes_start_at_once(docker: Dockerd, places: Places) -> None:
    """Each answers, and the loop goes on meanwhile: nothing of the engine's is waited for in it."""
    subject = subject_of(places, docker)
    made = await asyncio.gather(*(subject.create() for _ in range(10)))
    try:
        assert len({one.pid for one in made}) == 10
    finally:
        await asyncio.gather(*(one.stop() for one in made))


def owned_folder(subject: Subject, name: str) -> Path:
    """A folder of an ordinary user's, with files."""
    folder = subject.folder(name)
    (folder / "inner").mkdir()
    for path in (folder / "given.txt", folder / "inner" / "file"):
        path.write_text("given")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, ordinary_uid(), ordinary_uid())
    return folder


@pytest.mark.root
async def test_a_copy_on_write_folder_is_the_sandboxes_own(docker: Dockerd, places: Places) -> None:
    """What is changed, removed and made in it is in its saved layer, again and again, and never on the host."""
    subject = subject_of(places, docker)
    folder = owned_folder(subject, "work")
    workspace = Workspace(path=str(folder), mode="cow")
    first, second = subject.folder("first"), subject.folder("second")
    async with subject.box(workspace=workspace) as box:
        assert box.instance.workspace_note == ""
        await box.says(f"cd {folder} && echo changed > given.txt && rm -r inner && echo new > new.txt")
        async with subject.box(workspace=workspace) as other:
            assert await other.says(f"cat {folder}/given.txt {folder}/inner/file") == "givengiven"
        await box.instance.save_layer(first)
        assert (await box.shell("ls /.changes")).exit_code != 0
    async with subject.box(workspace=workspace, layer=first) as box:
        assert await box.says(f"cd {folder} && ls && cat given.txt new.txt") == "given.txt\nnew.txt\nchanged\nnew"
        await box.says(f"cd {folder} && rm given.txt && echo more >> new.txt && mkdir inner")
        await box.instance.save_layer(second)
    async with subject.box(workspace=workspace, layer=second) as box:
        assert await box.says(f"cd {folder} && ls && cat new.txt") == "inner\nnew.txt\nnew\nmore"
    assert sorted(path.name for path in folder.iterdir()) == ["given.txt", "inner"]
    assert (folder / "given.txt").read_text() == (folder / "inner" / "file").read_text() == "given"


@pytest.mark.root
async def test_a_copy_on_write_folder_with_mounts_in_it_is_read_only(docker: Dockerd, places: Places) -> None:
    """A copy would show what they cover; so there is none, and it is said why."""
    subject = subject_of(places, docker)
    folder = owned_folder(subject, "work")
    workspace = Workspace(path=str(folder), mode="cow")
    below = Mount(source=str(owned_folder(subject, "other")), target=str(folder / "inner"))
    async with subject.box(workspace=workspace, mounts=(below,)) as box:
        assert f"{folder}/inner lies in it" in box.instance.workspace_note
        assert await box.says(f"cat {folder}/inner/given.txt") == "given"
        assert (await box.shell(f"touch {folder}/new")).exit_code != 0


@contextlib.contextmanager
def with_volumes(docker: Dockerd, *volumes: str) -> Iterator[str]:
    """The test image, with these volumes declared."""
    made = docker.docker("create", IMAGE, "true")
    docker.docker("commit", "--change", f"VOLUME {json.dumps(volumes)}", made, VOLUMES)
    docker.docker("rm", made)
    try:
        yield VOLUMES
    finally:
        docker.docker("rmi", "--force", VOLUMES)


async def test_volumes_of_an_image_are_saved(docker: Dockerd, places: Places) -> None:
    """They are private files like any others, also where a link leads to them; none of the engine's is made."""
    volumes = ("/data", "/srv/more", "/var/lock/linked", "/var/run", "/home")  # /var/lock and /var/run are links.
    with with_volumes(docker, *volumes) as image:
        subject = subject_of(places, docker)
        layer = subject.folder("layer")
        async with subject.box(image=image) as box:
            await box.says("echo first > /data/file && mkdir /srv/more/inner && echo second > /srv/more/inner/file")
            await box.says("echo third > /run/lock/linked/file; echo fourth > ~/file")
            assert await box.says("stat --format %U /run /run/warmcell") != "root\nroot"
            await box.instance.save_layer(layer)
            assert docker.docker("volume", "ls", "--quiet") == ""
        async with subject.box(image=image, layer=layer) as box:
            told = await box.says("cat /data/file /srv/more/inner/file /var/lock/linked/file ~/file")
            assert told == "first\nsecond\nthird\nfourth"


FILLED = """
FROM {image}
RUN mkdir -p /data/inner /data/closed /srv/more/deep /none && echo one > /data/file && chmod 4750 /data/file \\
 && ln -s file /data/link && ln /data/file /data/same && echo two > /data/closed/file && chmod 500 /data/closed \\
 && echo hidden > /data/inner/file && echo three > /srv/more/deep/file && ln -s /srv /linked
VOLUME {volumes}
"""


async def test_a_volume_begins_with_what_the_image_has_there(docker: Dockerd, places: Places, tmp_path: Path) -> None:
    """As the engine's own would: files, links and rights, and each volume what lies in it. It is the guest's own, and
    saved with its changes. What does not fit is refused by name.
    """
    volumes = json.dumps(["/data", "/data/inner", "/linked/more", "/none"])
    (tmp_path / "Dockerfile").write_text(FILLED.format(image=IMAGE, volumes=volumes))
    docker.docker("build", "--quiet", "--tag", VOLUMES, str(tmp_path))
    try:
        subject = subject_of(places, docker)
        layer = subject.folder("layer")
        look = "cat /data/file /data/link /data/same /data/inner/file /data/closed/file /linked/more/deep/file"
        async with subject.box(image=VOLUMES) as box:
            assert await box.says(look) == "one\none\none\nhidden\ntwo\nthree"
            told = await box.says("stat --format '%a %h' /data/file /data/closed; ls -A /none; readlink /data/link")
            assert told == "750 2\n500 2\nfile"
            await box.says("echo mine > /data/file && rm /data/inner/file && touch /srv/more/deep/new")
            await box.instance.save_layer(layer)
        async with subject.box(image=VOLUMES, layer=layer) as box:
            assert await box.says("cat /data/same; ls /data/inner /srv/more/deep") == (
                "mine\n/data/inner:\n\n/srv/more/deep:\nfile\nnew"
            )
        with pytest.raises(CapacityError, match="volume /data "):
            await subject.create(image=VOLUMES, limits=Limits(layer_bytes=4096))
        assert docker.docker("volume", "ls", "--quiet") == ""
    finally:
        docker.docker("rmi", "--force", VOLUMES)


async def test_a_folder_at_an_images_volume_is_the_folder(docker: Dockerd, places: Places) -> None:
    """What was asked for comes before what the image declares."""
    subject = subject_of(places, docker)
    folder = owned_folder(subject, "work") if os.getuid() == 0 else subject.folder("work")
    with with_volumes(docker, str(folder)) as image:
        async with subject.box(image=image, workspace=folder) as box:
            await box.says(f"echo made > {folder}/made")
    assert (folder / "made").read_text() == "made\n"


@pytest.mark.root
async def test_no_file_system_is_on_a_device_that_processes_know(docker: Dockerd, places: Places) -> None:
    """Who comes back takes no new file for one of before: numbers of the layer are not given again, though free."""
    subject = subject_of(places, docker)
    async with subject.box() as box:
        first = int(await box.says("stat -c %d /dev/shm"))
        saved = subject.folder("saved")
        await box.instance.save_layer(saved)
    about = saved / "layer.json"
    told = json.loads(about.read_text())
    assert told["devices"] == [first]
    lowest = max(0, os.minor(first) - 32)
    told["devices"] = [os.makedev(0, lowest + number) for number in range(64)]
    about.write_text(json.dumps(told))
    async with subject.box(layer=saved) as box:
        has = [int(await box.says(f"stat -c %d {place}")) for place in ("/dev", "/dev/shm", "/tmp", "/run/warmcell")]
    assert not {*has} & {*told["devices"]}


@pytest.mark.user
def test_whoever_may_make_namespaces_holds_numbers() -> None:
    """As an ordinary user's keeper does it."""
    wanted = [os.makedev(0, number) for number in range(1, 256)]
    found = subprocess.run(
        as_ordinary_user("/usr/bin/python3", "-I", "-S", "-c", Path(numbers.__file__).read_text(), *map(str, wanted)),
        input=b"",
        capture_output=True,
        timeout=30,
        check=True,
    )
    said, *taken = found.stdout.split()
    assert said == numbers.DONE
    assert taken
    assert {*map(int, taken)} <= {*wanted}


@pytest.mark.root
def test_numbers_are_held_until_the_last_start_that_must_not_get_them() -> None:
    """Clones of a snapshot start at once, and the first of them is there before the others."""
    number = made_now()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as later:
        assert first.enter_context(numbers.held([number])) == ""
        assert made_now() != number
        assert later.enter_context(numbers.held([number])) == ""
        first.close()
        assert made_now() != number
    assert numbers._holding == []


def made_now() -> int:
    """The number that a file system gets that is made now, and goes."""
    shown = subprocess.run(
        ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt && stat -c %d /mnt"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(shown.stdout)
