"""What of the host's files a sandbox has."""

import contextlib
import os
from pathlib import Path

from warmcell.sandbox import guest_files
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import Mount, Workspace
from warmcell.sandbox.testing.contract.subject import Register, Subject, expect

check = Register()


@check(programs=True)
async def a_writable_workspace_is_at_its_own_path(subject: Subject) -> None:
    folder = subject.folder("work")
    (folder / "given.txt").write_text("given")
    async with subject.box(workspace=folder) as box:
        expect(await box.says(f"cat {folder}/given.txt") == "given", "a file of the host is not there")
        note = box.instance.workspace_note
        written = await box.shell(f"printf made > {folder}/made.txt")
        expect((written.exit_code == 0) != bool(note), f"writing gave {written}, the note says {note!r}")
        if not note:
            made = folder / "made.txt"
            expect(made.read_text() == "made", "what the guest wrote is not on the host")
            expect(made.stat().st_uid == folder.stat().st_uid, f"it belongs to uid {made.stat().st_uid}")


@check(programs=True)
async def what_is_made_has_the_umask_that_was_asked_for(subject: Subject) -> None:
    made = "umask; python=$1; : > plain; mkdir folder; stat -c %a plain folder; rm -r plain folder"
    for umask, expected in ((None, "0022 644 755"), (0o077, "0077 600 700"), (0o002, "0002 664 775")):
        async with subject.box(umask=umask) as box:
            found = (await box.says(f"cd /tmp && {made}")).split()
            expect(" ".join(found) == expected, f"umask {umask} gave {found}")


@check(isolated=True)
async def a_read_only_workspace_cannot_be_written(subject: Subject) -> None:
    folder = subject.folder("work")
    (folder / "given.txt").write_text("given")
    async with subject.box(workspace=Workspace(path=str(folder), mode="ro")) as box:
        expect(await box.says(f"cat {folder}/given.txt") == "given", "it cannot be read")
        for script in (f"echo more >> {folder}/given.txt", f"touch {folder}/new", f"rm {folder}/given.txt"):
            expect((await box.shell(script)).exit_code != 0, f"{script!r} succeeded")
        expect(not box.instance.workspace_note, "read-only was asked for; there is nothing to note")
    expect([path.name for path in folder.iterdir()] == ["given.txt"], "the host's folder has changed")


@check(isolated=True)
async def a_workspace_of_mode_none_is_not_there(subject: Subject) -> None:
    folder = subject.folder("work")
    (folder / "given.txt").write_text("given")
    async with subject.box(workspace=Workspace(path=str(folder), mode="none")) as box:
        expect((await box.shell(f"ls {folder}")).exit_code != 0, "it can be listed")


@check(isolated=True)
async def a_workspace_is_found_by_its_link_too(subject: Subject) -> None:
    real, link = subject.folder("real"), subject.directory / "w" / "link"
    (real / "given.txt").write_text("given")
    link.symlink_to(real)
    async with subject.box(workspace=link) as box:
        expect(await box.says(f"cat {link}/given.txt {real}/given.txt") == "givengiven", "it is not at both paths")


@check(isolated=True)
async def what_lies_beside_the_workspace_is_not_there(subject: Subject) -> None:
    folder, beside = subject.folder("work"), subject.folder("beside")
    (beside / "secret.txt").write_text("secret")
    async with subject.box(workspace=folder) as box:
        expect((await box.shell(f"cat {beside}/secret.txt")).exit_code != 0, "its neighbour can be read")


@check(isolated=True)
async def mounts_are_there_read_only_or_writable_as_asked(subject: Subject) -> None:
    shown, given = subject.folder("shown"), subject.folder("given")
    (shown / "data.txt").write_text("data")
    (shown / "data.txt").chmod(0o644)
    mounts = (Mount(source=str(shown), target="/data/shown"), Mount(source=str(given), mode="rw"))
    async with subject.box(mounts=mounts) as box:
        expect(await box.says("cat /data/shown/data.txt") == "data", "the one is not there")
        expect((await box.shell("touch /data/shown/new")).exit_code != 0, "the read-only one can be written")
        if not box.instance.workspace_note:
            await box.says(f"printf made > {given}/made.txt")
            expect((given / "made.txt").read_text() == "made", "the writable one does not reach the host")


@check(isolated=True)
async def a_single_file_can_be_mounted(subject: Subject) -> None:
    file = subject.folder("given") / "settings.ini"
    file.write_text("[settings]")
    file.chmod(0o644)
    async with subject.box(mounts=(Mount(source=str(file), target="/data/settings.ini"),)) as box:
        expect(await box.says("cat /data/settings.ini") == "[settings]", "it is not there")


@check(isolated=True)
async def the_environment_can_be_written_and_the_host_does_not_see_it(subject: Subject) -> None:
    site = _writable_site(subject)
    async with subject.box() as box:
        if site is None or not box.instance.limits["layer"].enforced:
            return
        await box.says(f"mkdir {site}/planted && echo 'answer = 42' > {site}/planted/__init__.py")
        said = await box.run(subject.python, "-c", "import planted; print(planted.answer)")
        expect(said.stdout == "42\n", f"a new package cannot be imported: {said.stderr}")
        async with subject.box() as other:
            unseen = await other.run(subject.python, "-c", "import planted")
            expect(unseen.exit_code != 0, "another sandbox sees it")
    expect(not (site / "planted").exists(), "the host sees it")


@check(isolated=True)
async def a_file_of_the_environment_can_be_replaced_in_the_layer(subject: Subject) -> None:
    site = _writable_site(subject)
    async with subject.box() as box:
        owned = site is not None and await box.shell(f"test -O {site}/pip/__init__.py")
        if not owned or owned.exit_code != 0 or not box.instance.limits["layer"].enforced:
            return
        before = (site / "pip" / "__init__.py").read_text() if site else ""
        await box.says(f"echo changed = True > {site}/pip/__init__.py && rm -r {site}/pip/_internal")
        said = await box.run(subject.python, "-c", "import pip; print(pip.changed)")
        expect(said.stdout == "True\n", f"the change is not seen inside: {said.stderr}")
        expect(site is not None and (site / "pip" / "__init__.py").read_text() == before, "the host's file changed")


@check(isolated=True)
async def a_private_home_is_empty_and_ends_with_its_sandbox(subject: Subject) -> None:
    for _ in range(2):
        async with subject.box() as box:
            expect(await box.says("find ~ -xdev -type f") == "", "it is not empty")
            await box.says("echo mine > ~/mine.txt")


@check(isolated=True)
async def a_persistent_home_is_there_again(subject: Subject) -> None:
    async with subject.box(home="persistent") as box:
        await box.says("mkdir -p ~/kept && echo kept > ~/kept/note.txt")
    async with subject.box(home="persistent") as box:
        expect(await box.says("cat ~/kept/note.txt; rm -r ~/kept") == "kept", "what was kept is gone")


@check(isolated=True)
async def a_home_is_the_guests_own(subject: Subject) -> None:
    async with subject.box() as box:
        expect(
            await box.says("cd && pwd && stat -c %a .") == f"{await box.says('echo ~')}\n700", "it is open to others"
        )


@check(isolated=True)
async def a_user_and_its_home_have_the_name_that_is_asked_for(subject: Subject) -> None:
    async with subject.box(user="somebody") as box:
        said = await box.says("cd && id -un && echo $USER ~ && pwd && touch mine && stat -c '%U %a' .")
        wanted = "somebody\nsomebody /home/somebody\n/home/somebody\nsomebody 700"
        expect(said == wanted, f"it is another: {said!r}")


@check(isolated=True)
async def a_workspace_at_the_place_of_the_home_is_not_the_home(subject: Subject) -> None:
    async with subject.box() as box:
        name = await box.says("id -un")
    if Path(subject.python).is_relative_to(f"/home/{name}"):
        return  # The environment is there, so nothing else can be.
    async with subject.box(
        mounts=(Mount(source=str(subject.folder("home")), target=f"/home/{name}", mode="rw"),)
    ) as box:
        await box.says("echo private > ~/private.txt")
    expect(not list(subject.folder("home").iterdir()), "what went home is on the host")


@check(isolated=True)
async def the_system_is_read_only(subject: Subject) -> None:
    async with subject.box() as box:
        for path in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/run", "/home", "/var", "/warmcell"):
            expect((await box.shell(f"touch {path}/new")).exit_code != 0, f"{path} can be written")
        expect((await box.shell("echo x > /etc/passwd")).exit_code != 0, "/etc/passwd can be written")


@check(isolated=True)
async def temporary_files_are_private(subject: Subject) -> None:
    async with subject.box() as one, subject.box() as other:
        await one.says("echo secret > /tmp/secret.txt; echo secret > /dev/shm/secret.txt")
        expect(await other.says("find /tmp /dev/shm -name secret.txt") == "", "the other sandbox sees them")
    expect(not os.path.exists("/tmp/secret.txt") and not os.path.exists("/dev/shm/secret.txt"), "the host sees them")


@check(isolated=True)
async def links_in_the_run_directory_lead_the_host_nowhere(subject: Subject) -> None:
    victim = subject.folder("victim") / "file.txt"
    victim.write_text("before")
    async with subject.box() as box:
        await box.says(f"ln -s {victim} {box.instance.guest_run_directory}/trap")
        trap = box.instance.run_directory / "trap"
        with contextlib.suppress(WarmcellError), guest_files.create(trap) as file:
            file.write(b"after")
        with contextlib.suppress(WarmcellError):
            expect(guest_files.open_existing(trap) is None, "the host read through a link that the guest had made")
        expect(victim.read_text() == "before", "the host wrote through a link that the guest had made")


def _writable_site(subject: Subject) -> Path | None:
    """Where packages of the subject's environment are, unless it is the system's own."""
    prefix = Path(subject.python).parent.parent
    found = sorted(prefix.resolve().glob("lib/python3*/site-packages"))
    return None if prefix == Path("/usr") or not found else found[-1]
