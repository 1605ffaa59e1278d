"""What is mounted in a bubblewrap sandbox: how, whose it is, and that nobody leads a mount elsewhere."""

import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import folder, subject_of
from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap import plan
from warmcell.sandbox.errors import SandboxStartError
from warmcell.sandbox.models import Mount

pytestmark = pytest.mark.bubblewrap

NS_GET_USERNS = 0xB701
OWN = ("/tmp", "/dev/shm", "/run/warmcell")


def mounts(pid: int) -> dict[str, tuple[set[str], str]]:
    """Of each place: its options, and how it passes mounts on."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        words = line.split()
        found[words[4]] = (set(words[5].split(",")), " ".join(words[6 : words.index("-")]))
    return found


@pytest.fixture
def nested(places: Places) -> Iterator[Path]:
    """A folder of the host's in which a file system is mounted that lets everything be done."""
    data = folder(places, "data")
    inner = data / "inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "rw,suid,dev", "none", inner], check=True)
    try:
        yield data
    finally:
        subprocess.run(["umount", inner], check=True)


@pytest.mark.root
async def test_what_is_mounted_in_a_tree_is_as_closed_as_the_tree(places: Places, nested: Path) -> None:
    """Attributes of a mount do not hold for those in it by themselves."""
    wanted = [
        Mount(source=str(nested), target="/opt/ro", mode="ro"),
        Mount(source=str(nested), target="/opt/rw", mode="rw"),
    ]
    async with subject_of(places).box(mounts=wanted) as box:
        found = mounts(box.instance.pid)
        for place in ("/opt/ro", "/opt/ro/inner", "/usr", "/etc", "/warmcell"):
            assert {"ro", "nosuid", "nodev"} <= found[place][0], place
        for place in ("/opt/rw/inner", *OWN):
            assert {"rw", "nosuid", "nodev"} <= found[place][0], place
        await box.says("! touch /opt/ro/inner/x 2>/dev/null")


async def test_all_mounts_are_private_and_the_root_is_closed(places: Places) -> None:
    """Nothing that the host mounts later shows in a sandbox, and no directory is added to its root."""
    async with subject_of(places).box(workspace=folder(places, "work")) as box:
        found = mounts(box.instance.pid)
        assert {passed for _, passed in found.values()} == {""}
        for place in ("/", "/dev"):
            assert {"ro", "nosuid", "nodev"} <= found[place][0], place
        assert "nosymfollow" in found["/run/warmcell"][0]
        assert all("nosuid" in options for options, _ in found.values())
        await box.says("! mkdir /x 2>/dev/null && ! touch /dev/x 2>/dev/null")


async def test_the_guests_user_namespace_owns_no_other(places: Places) -> None:
    """With rights in it, were there ever a way to them, nothing could be mounted or joined."""
    async with subject_of(places).box() as box:
        space = f"/proc/{box.instance.pid}/ns"
        own = os.stat(f"{space}/user").st_ino
        owners = set()
        for name in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
            with open(f"{space}/{name}") as opened, os.fdopen(fcntl.ioctl(opened, NS_GET_USERNS)) as owner:
                owners.add(os.fstat(owner.fileno()).st_ino)
        if os.getuid() == 0:
            assert owners == {own} == {os.stat("/proc/self/ns/user").st_ino}  # In which no guest has a right.
        else:
            assert own not in owners
            assert len(owners) == 1


@pytest.mark.parametrize("there", ["/usr/bin", "other", "nothing"])
async def test_a_place_that_is_taken_away_meanwhile(
    places: Places, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """The owner of a workspace can put a link where a mount belongs, once that was looked at; root follows none."""
    monkeypatch.setattr(plan, "check_places", lambda trees: None)  # It has looked, before the link was there.
    work, data = folder(places, "work"), folder(places, "data")
    (work / "other").mkdir()
    if there != "nothing":
        (work / "sub").symlink_to(there)
    wanted = Mount(source=str(data), target=str(work / "sub" / "in" if there == "nothing" else work / "sub"))
    with pytest.raises(SandboxStartError, match=r"make /.*/sub"):
        async with subject_of(places).box(workspace=work, mounts=[wanted]):
            pass
    assert {path.name for path in work.iterdir()} == {"other"} | ({"sub"} if there != "nothing" else set())
