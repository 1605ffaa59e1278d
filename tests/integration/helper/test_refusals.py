"""What the helper refuses: nobody reaches through it what they could not reach themselves."""

import asyncio
import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.helper.system import SystemHelper, User
from warmcell.sandbox.helper.program import IMPORTS_VARIABLE

pytestmark = [pytest.mark.user, pytest.mark.criu]

PLACES = (
    *("/", "/etc", "/etc/passwd", "/usr", "/usr/lib", "/usr/local/x", "/bin", "/lib64/x", "/proc", "/proc/sys", "/sys"),
    *("/dev", "/dev/shm/x", "/.warmcell", "/.warmcell/x", "/run/warmcell", "/run", "/tmp", "/var/tmp/x", "/home"),
    *("/srv/../etc", "//etc", "srv", "/srv/", "/srv/./x", "/srv//x", "", "/srv/\0x", "/srv/" + 1100 * "x", 7, None),
)
DESCRIBED: tuple[dict[str, Any], ...] = (
    {"id": "../../../../x"},
    {"id": "A" * 12},
    {"named": "one-two\n1.2.3"},
    {"named": None},
    {"network": "all"},
    {"home": "/etc"},
    {"home": "/root/../etc"},
    {"user": "root"},
    {"user": "a:0:0\nb"},
    {"user": 7},
    {"python": "--bind"},
    {"python": "/usr/../x"},
    {"links": {"/etc/ld.so.preload": "/tmp/x"}},
    {"links": {"/bin": "/tmp/x"}},
    {"links": {"/srv": "/oldroot/etc"}, "covered": ["/srv/x/.."]},
    {"links": {"/srv/l": "/srv/w"}, "covered": ["/srv/l/x"]},
    {"covered": ["/etc"]},
    {"skeleton": ["../../etc"]},
    {"skeleton": ["/etc"]},
    {"trees": []},
    {"trees": [{"name": "etc", "fd": 0, "target": "/srv/x", "writable": True}]},
    {"trees": [{"name": "root", "fd": 0, "target": "/srv/x", "writable": True}]},
    {"trees": [{"name": "../x", "fd": 0, "target": "/srv/x", "writable": True}]},
    {"trees": [{"name": "x", "fd": 99, "target": "/srv/x", "writable": True}]},
    {"trees": [{"name": "x", "fd": -1, "target": "/srv/x", "writable": True}]},
    {"trees": "x"},
    {
        "overlays": [
            {"name": "tmp", "lowers": ["lower"], "target": "/srv/x", "size_bytes": 1, "mode": 1, "skeleton": []}
        ]
    },
    {"fills": [{"fd": 0, "path": "../x", "only_top": False, "most_bytes": 1, "most_entries": 1}]},
    {"fills": [{"fd": 0, "path": "etc", "only_top": False, "most_bytes": 1, "most_entries": 1}]},
    {"limits": {"memory_bytes": -1, "pids": 1, "cpus": 1, "layer_bytes": 1, "shm_bytes": 1}},
    {"limits": {"memory_bytes": None, "pids": None, "cpus": None, "layer_bytes": 1 << 60, "shm_bytes": 1}},
    {"limits": {}},
    {"mounts": 0},
)


async def ask(user: User, *cases: dict[str, Any], **told: Any) -> list[Any]:
    """The answers to requests that are each changed in one way."""
    return await user.run("asked", told={"cases": [*cases], **told})


async def test_places_that_are_not_the_senders(user: User) -> None:
    """A tree of a user's covers nothing of the machine's or the sandbox's own, where root's programs still run."""
    folder = user.folder("w")
    answers = await ask(user, *({"tree": {"target": place}} for place in PLACES), workspace=str(folder))
    taken = [place for place, said in zip(PLACES, answers, strict=True) if place != "" and said.get("ok")]
    assert taken == []


async def test_descriptions_that_are_none(user: User) -> None:
    """Whatever else of a request is not as it must be, the helper says so, and serves the next one."""
    folder = user.folder("w")
    *answers, last = await ask(user, *({"set": change} for change in DESCRIBED), {}, workspace=str(folder))
    taken = [change for change, said in zip(DESCRIBED, answers, strict=True) if said is None or said.get("ok")]
    assert taken == []
    assert last["ok"], last


async def test_trees_that_the_sender_may_not_read(user: User) -> None:
    """A descriptor can be had of a directory that may not be read; that gives no right to see it."""
    folder = user.folder("w")
    closed = user.home / "closed"
    closed.mkdir(mode=0o700)
    (closed / "key").write_text("secret")
    traversable = user.home / "through"
    traversable.mkdir(mode=0o711)
    cases = [closed, traversable, "/root", "/proc", "/proc/self", "/sys/kernel", "/dev", "/dev/null", "/dev/pts"]
    answers = await ask(user, *({"open": str(path)} for path in cases), workspace=str(folder))
    taken = [path for path, said in zip(cases, answers, strict=True) if said.get("ok")]
    assert taken in ([], ["/dev"])  # It has no devices inside.


async def test_mounts_of_a_users_own(user: User) -> None:
    """In a mount namespace that a user has made, nothing is what it seems: its trees are refused."""
    folder = user.folder("w")
    cases = [{"mounts": "own"}, {"mounts": "/proc/self/ns/net"}, {"mounts": "/etc/passwd"}]
    answers = await ask(user, *cases, workspace=str(folder))
    assert [said.get("code") for said in answers] == ["unsupported"] * 3


async def test_root_and_strangers(helper: SystemHelper, user: User) -> None:
    """Root's keeper makes its own; and who sends no descriptors gets no sandbox."""
    for uid, code in ((0, "unsupported"), (user.uid, "protocol")):
        said = await helper.ask({"op": "create"}, uid=uid)
        assert (said["ok"], said["code"]) == (False, code), said


async def test_images_from_elsewhere(helper: SystemHelper, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user brings in what this helper has handed out to them, and nothing else: CRIU does as root what it says.

    Unless root has said that all users may.
    """
    own, other, *left = await user.run("carried", told={"workspace": str(user.folder("w"))})
    assert own == {"verified": True}
    assert (other["code"], "WARMCELL_HELPER_IMPORTS=1" in other["hint"]) == ("unsupported", True)
    assert left == ["brought00000", "first0000000"]
    assert helper.end() == 0
    monkeypatch.setenv(IMPORTS_VARIABLE, "1")
    helper.start()
    own, other, *left = await user.run("carried", told={"workspace": str(user.folder("again"))})
    assert (own, other) == ({"verified": True}, {"verified": True})
    assert left == ["brought00000", "brought00001", "first0000000"]
    assert helper.end() == 0


async def test_programs_of_another_users_rights_give_none(user: User) -> None:
    """A program with root's set-user-ID bit in the user's folder runs as the user, without capabilities."""
    folder = user.folder("w")
    program = folder / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    assert program.stat().st_mode & stat.S_ISUID
    told = {
        "workspace": str(folder),
        "scripts": [f"{program} -u; {program} -G", "grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status"],
    }
    _, ids, status = await user.run("box", told=told)
    assert ids["out"].split() == [str(user.uid)] * 2
    values = dict(line.split(":\t") for line in status["out"].splitlines())
    assert {values.pop("NoNewPrivs"), values.pop("Seccomp")} == {"1", "2"}
    assert {int(value, 16) for value in values.values()} == {0}


async def test_devices_in_a_users_folder_are_none(user: User) -> None:
    """A device node that lies in a folder cannot be opened inside."""
    folder = user.folder("w")
    os.mknod(folder / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    os.chmod(folder / "zero", 0o666)
    _, said = await user.run("box", told={"workspace": str(folder), "scripts": [f"head -c1 {folder}/zero"]})
    assert said["code"] != 0


async def test_a_layer_of_the_users_opens_no_closed_directory(user: User) -> None:
    """An overlay shows a directory by the rights of its upper half; the lower half keeps its own."""
    folder = user.folder("w")
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "key").write_text("secret")
    (closed / "key").chmod(0o644)
    # The user's half is made on the stage, as a saved layer could have it, before the overlay is.
    told = {"workspace": str(folder), "mode": "cow", "upper": ["closed"], "scripts": [f"cat {closed}/key; ls {closed}"]}
    _, said = await user.run("box", told=told)
    assert "secret" not in said["out"]
    assert "key" not in said["out"]


@contextlib.contextmanager
def covered(path: Path) -> Iterator[None]:
    """Something mounted over a directory, which hides what lies in it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("mode", ["rw", "ro", "cow"])
async def test_what_a_mount_covers_stays_covered(user: User, mode: str) -> None:
    """A folder is shown with what is mounted in it, never with what that hides."""
    folder = user.folder("w")
    (folder / "in").mkdir()
    (folder / "in" / "hidden").write_text("secret")
    with covered(folder / "in"):
        told = {"workspace": str(folder), "mode": mode, "scripts": [f"ls -A {folder}/in"]}
        _, said = await user.run("box", told=told)
    assert "hidden" not in said["out"]


async def test_links_on_the_way_to_a_place_are_not_followed(user: User) -> None:
    """Nothing is made, and nothing mounted, where a user's link leads to."""
    folder = user.folder("w")
    target = user.home / "elsewhere"
    target.mkdir(mode=0o755)
    (folder / "link").symlink_to(target)
    case = {"set": {"covered": [f"{folder}/link/made"]}}
    (said,) = await ask(user, case, workspace=str(folder))
    assert said["code"] == "sandbox_start"
    assert list(target.iterdir()) == []


async def test_a_sandbox_of_a_users_is_that_users_to_stop_only(helper: SystemHelper, user: User) -> None:
    """Another user can neither signal nor look into its processes."""
    box = await user.start_box({"wait": True, "scripts": ["sleep 300 >/dev/null 2>&1 & echo"]})
    stranger = user.uid + 1
    for pid in box.about["processes"]:
        script = f"kill -0 {pid} || cat /proc/{pid}/environ || ls /proc/{pid}/root || ls /proc/{pid}/fd"
        drop = ["setpriv", f"--reuid={stranger}", f"--regid={stranger}", "--clear-groups", "--inh-caps=-all"]
        tried = await asyncio.to_thread(subprocess.run, [*drop, "sh", "-c", script], capture_output=True, check=False)
        assert tried.returncode != 0
        assert tried.stdout == b""
    await box.hang_up()


async def test_a_user_who_connects_without_end_keeps_nobody_waiting(helper: SystemHelper, user: User) -> None:
    """Whoever opens connections and says nothing is refused further ones; another user is served at once."""
    held = await user.start("connect", "40")
    assert held.stdin is not None
    held.stdin.write(b"null")
    held.stdin.write_eof()
    assert held.stdout is not None
    assert await asyncio.wait_for(held.stdout.readline(), 60) == b"40\n"
    refused = await helper.ask({"op": "hello"}, uid=user.uid)
    assert refused["code"] == "capacity"
    async with asyncio.timeout(60):
        assert (await helper.ask({"op": "hello"}, uid=user.uid + 1))["ok"]
    held.kill()
    await held.communicate()
