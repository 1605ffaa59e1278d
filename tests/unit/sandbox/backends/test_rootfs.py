"""What a sandbox is planned to see."""

from pathlib import Path

import pytest

from warmcell.sandbox.backends import etc
from warmcell.sandbox.backends.bubblewrap import rootfs
from warmcell.sandbox.backends.bubblewrap.rootfs import View
from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.backends.places import check_places, check_target, links_on
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import Mount

GUEST = Identity(uid=4321, gid=4321, name="guest")


@pytest.fixture
def view(tmp_path: Path) -> View:
    return View(base=tmp_path / "m", identity=GUEST, as_root=False)


def targets(view: View) -> list[str]:
    """Guest paths in the order in which they are made."""
    return [f"/{made['place']}" for made in view.plan()["entries"]]


def test_parents_are_made_before_what_lies_in_them(view: View, tmp_path: Path) -> None:
    """A mount in a mount would else be covered."""
    for name in ("a/b/c", "a", "a/b"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        view.show(tmp_path / name)
    assert targets(view) == [str(tmp_path / name) for name in ("a", "a/b", "a/b/c")]


def test_directories_are_made_in_what_is_the_sandboxs_own_only(view: View, tmp_path: Path) -> None:
    """Never on the host, whatever is shown of it."""
    rootfs.system(view)
    view.show(tmp_path)
    view.entries["/tmp"] = view.tmpfs("tmp", size_bytes=4096, mode="1777", owned=False)
    view.clone("workspace", tmp_path, Path("/tmp/folder"), mode="rw", owner=None, recursive=True)
    view.entries["/home/me"] = rootfs.home(tmp_path)
    for place in (
        tmp_path / "a",
        "/tmp/b",
        "/tmp/folder/c",
        "/tmp/folder/c/d/e",
        "/home/me/f",
        "/opt/g",
        "/dev/h",
        "/etc/i",
    ):
        view.entries[str(place)] = rootfs.own("nothing")
    view.entries["/etc"] = rootfs.own("etc")
    made = {entry["place"]: entry["make"] for entry in view.plan()["entries"]}
    assert all(made[place] for place in ("tmp/b", "home/me/f", "opt/g", "dev/h", "usr", "proc"))
    assert not any(made[place] for place in (f"{tmp_path}/a"[1:], "tmp/folder/c", "tmp/folder/c/d/e", "etc/i"))


def test_a_mount_behind_a_link_of_the_sandboxs_own_is_refused(view: View, tmp_path: Path) -> None:
    """Links are not followed when the root is put together; better said before anything is made."""
    rootfs.system(view)
    rootfs.extra_mount(view, Mount(source=str(tmp_path), target="/var/tmp/data"), 0)
    with pytest.raises(InvalidRequestError, match=r"/var/tmp is a link in a sandbox, to /tmp"):
        view.plan()


def test_bubblewrap_is_told_of_one_tree(view: View) -> None:
    """For each further one it reads the list of mounts again, which is what it spends most of its time with."""
    rootfs.system(view)
    assert view.masked
    masks = [word for masked in view.masked for word in ("--ro-bind", "/dev/null", masked)]
    assert view.words() == ["--dev-bind", str(view.base / rootfs.ROOT), "/", "--proc", "/proc", *masks]


def test_links_on_the_way_are_made_as_they_are(view: View, tmp_path: Path) -> None:
    """A path is good inside if it is good outside."""
    (tmp_path / "real").mkdir()
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to(tmp_path / "real")
    view.show(tmp_path / "real")
    view.aliases.append(tmp_path / "one" / "below")
    made = {f"/{entry['place']}": entry.get("link") for entry in view.plan()["entries"]}
    assert made[str(tmp_path / "one")] == "two"
    assert made[str(tmp_path / "two")] == str(tmp_path / "real")


def test_a_link_that_a_tree_has_is_not_made_again(view: View, tmp_path: Path) -> None:
    """bin/python in a virtual environment, say."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("elsewhere")
    view.show(tmp_path / "tree")
    view.aliases.append(tmp_path / "tree" / "link")
    assert str(tmp_path / "tree" / "link") not in targets(view)


def test_links_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    """As they do in the kernel."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert len(list(links_on(tmp_path / "a" / "x"))) <= 255


@pytest.mark.parametrize(
    "path", ["/", "/usr", "/run", "/etc", "/etc/ssl", "/proc/1", "/dev/shm", "/sys", "/warmcell/kernel"]
)
def test_a_place_that_every_sandbox_needs_is_refused(path: str) -> None:
    """Or it could be covered, or given away."""
    with pytest.raises(InvalidRequestError) as raised:
        check_target(Path(path), what="mount")
    assert raised.value.hint


@pytest.mark.parametrize("path", ["/home/alice", "/srv/data", "/tmp/x", "/usr/share/notebooks", "/root", "/mnt"])
def test_other_places_are_free(path: str) -> None:
    """A workspace may lie anywhere else."""
    check_target(Path(path), what="workspace")


def test_a_mount_in_a_tree_that_has_no_such_place_is_refused(view: View, tmp_path: Path) -> None:
    """It would have to be made on the host."""
    (tmp_path / "work").mkdir()
    (tmp_path / "data").mkdir()
    view.show(tmp_path / "work", mode="rw")
    mount = Mount(source=str(tmp_path / "data"), target=str(tmp_path / "work" / "data"))
    rootfs.extra_mount(view, mount, 0)
    with pytest.raises(InvalidRequestError, match="no such place"):
        check_places(view.host_trees)
    (tmp_path / "work" / "data").symlink_to(tmp_path / "data")
    with pytest.raises(InvalidRequestError, match="a link leads"):
        check_places(view.host_trees)
    (tmp_path / "work" / "data").unlink()
    (tmp_path / "work" / "data").mkdir()
    check_places(view.host_trees)
    assert mount.target in view.entries


def test_the_keepers_own_files_are_covered(view: View, tmp_path: Path) -> None:
    """A workspace that is the whole home must not show the socket that commands the keeper."""
    state = tmp_path / "home" / ".local" / "state" / "warmcell"
    state.mkdir(parents=True)
    view.show(tmp_path / "home", mode="rw")
    rootfs.hide(view, [state, tmp_path / "not-there"])
    assert view.entries[str(state)] == {"own": "nothing", "mode": "ro"}


def test_a_mount_of_the_keepers_own_files_is_refused(view: View, tmp_path: Path) -> None:
    """They belong to nobody's sandbox."""
    (tmp_path / "state" / "homes").mkdir(parents=True)
    view.show(tmp_path / "state" / "homes")
    view.asked.add(tmp_path / "state" / "homes")
    with pytest.raises(InvalidRequestError, match="Warmcell"):
        rootfs.hide(view, [tmp_path / "state"])


def test_the_etc_of_a_sandbox_knows_only_the_guest() -> None:
    """And a name server only where there is a network."""
    closed = etc.compose(GUEST, home="/home/guest", name="box", network="none")
    users = [line.split(b":")[0] for line in closed.files["passwd"].splitlines()]
    assert users == [b"root", b"guest", b"nobody"]
    assert "resolv.conf" not in closed.files
    assert b"retries = 0" in closed.files["pip.conf"]


def test_private_files_of_etc_are_left_out(tmp_path: Path) -> None:
    """What only its owner may read on the host is no part of a sandbox."""
    for name, mode in (("services", 0o600), ("protocols", 0o644), ("resolv.conf", 0o644)):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(mode)
    found = etc.compose(GUEST, home="/home/guest", name="box", network="host", host=tmp_path)
    assert "services" not in found.files
    assert found.files["protocols"] == b"protocols"
    assert found.files["resolv.conf"] == b"resolv.conf"
