"""Who the guest is, and whose its files are on the host."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import folder, subject_of
from tests.lanes import ordinary_uid
from tests.leaks import Places
from warmcell.sandbox.backends.identity import UNUSED_UID
from warmcell.sandbox.models import Mount, Workspace

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root]


async def test_the_guest_is_the_owner_of_the_workspace(places: Places) -> None:
    """Root's sandbox of somebody's folder runs as that somebody."""
    uid = ordinary_uid()
    work = folder(places, "work", owner=uid)
    async with subject_of(places).box(workspace=work) as box:
        assert await box.says("id -u") == str(uid)
        await box.says(f"echo hello > {work}/made.txt")
        assert not box.instance.workspace_note
    assert (work / "made.txt").stat().st_uid == uid


async def test_roots_workspace_is_written_by_an_unused_uid_as_root(places: Places) -> None:
    """Files belong to root on the host, and no process of the sandbox is root."""
    work = folder(places, "work")
    private = work / "private.txt"
    private.write_text("root's")
    private.chmod(0o600)
    async with subject_of(places).box(workspace=work) as box:
        assert await box.says("id -u") == str(UNUSED_UID)
        assert await box.says(f"cat {private}; echo more >> {private}; mkdir {work}/new; stat -c %u {private}") == (
            f"root's{UNUSED_UID}"
        )
        # Before it come only bubblewrap outside and its reaper, who have no capabilities.
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in box.instance.processes()[2:]} == {UNUSED_UID}
    assert (work / "new").stat().st_uid == 0
    assert private.read_text() == "root'smore\n"


async def test_without_a_workspace_the_guest_is_nobody(places: Places) -> None:
    """An unused uid, the same each time, so that a persistent home stays its own."""
    for _ in range(2):
        async with subject_of(places).box() as box:
            assert await box.says("id -u; id -g; id -un") == f"{UNUSED_UID}\n{UNUSED_UID}\nwarmcell"


async def test_a_set_user_id_program_cannot_be_made_in_a_workspace(places: Places) -> None:
    """It would run as root on the host."""
    work = folder(places, "work")
    async with subject_of(places).box(workspace=work) as box:
        for script in (
            f"cp /bin/true {work}/x && chmod 4755 {work}/x",
            f"cp /bin/true {work}/x && chmod 2755 {work}/x",
            f"install -m 4755 /bin/true {work}/y",
        ):
            assert (await box.shell(script)).exit_code != 0
        made = "import os, sys; os.close(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY, 0o4755))"
        assert (await box.run(sys.executable, "-c", made, f"{work}/z")).exit_code != 0
    assert not [path for path in work.iterdir() if path.stat().st_mode & 0o6000]


@pytest.fixture
def refusing(places: Places) -> Iterator[Path]:
    """A folder of root's on a file system that knows no mapped owners."""
    path = folder(places, "refusing")
    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=755", "ramfs", path], check=True, timeout=60)
    yield path
    subprocess.run(["umount", path], check=True, timeout=60)


async def test_where_owners_cannot_be_mapped_the_workspace_is_read_only_and_says_why(
    places: Places, refusing: Path
) -> None:
    """Rather than writable as root, or silently closed."""
    (refusing / "given.txt").write_text("given")
    async with subject_of(places).box(workspace=refusing) as box:
        assert "read-only" in box.instance.workspace_note
        assert "idmapped mount" in box.instance.workspace_note
        assert "chown" in box.instance.workspace_note
        assert await box.says(f"cat {refusing}/given.txt") == "given"
        assert (await box.shell(f"touch {refusing}/new")).exit_code != 0


async def test_a_read_only_workspace_has_nothing_to_say(places: Places, refusing: Path) -> None:
    """It is as asked for."""
    async with subject_of(places).box(workspace=Workspace(path=str(refusing), mode="ro")) as box:
        assert not box.instance.workspace_note


async def test_a_read_only_mount_keeps_what_only_root_may_read(places: Places) -> None:
    """Mounting something for reading gives away no rights."""
    data = folder(places, "data")
    (data / "secret.txt").write_text("secret")
    (data / "secret.txt").chmod(0o600)
    async with subject_of(places).box(mounts=(Mount(source=str(data)),)) as box:
        assert (await box.shell(f"cat {data}/secret.txt")).exit_code != 0


async def test_a_persistent_home_belongs_to_the_guest_and_to_nobody_else(places: Places) -> None:
    """Below root's own state directory, which no other user can enter."""
    async with subject_of(places).box(home="persistent") as box:
        await box.says("echo kept > ~/note.txt")
    (home,) = (places.state / "homes").iterdir()
    assert home.stat().st_uid == UNUSED_UID
    assert (home / "note.txt").read_text() == "kept\n"
    assert (places.state / "homes").stat().st_mode & 0o077 == 0
    assert os.getuid() == 0


async def test_links_that_a_guest_makes_in_the_run_directory_are_not_followed(places: Places) -> None:
    """Whoever forgets to look at what is opened there is led nowhere either."""
    victim = folder(places, "victim") / "file.txt"
    victim.write_text("before")
    async with subject_of(places).box() as box:
        await box.says(f"ln -s {victim} {box.instance.guest_run_directory}/trap")
        with pytest.raises(OSError):
            (box.instance.run_directory / "trap").write_text("after")
    assert victim.read_text() == "before"
