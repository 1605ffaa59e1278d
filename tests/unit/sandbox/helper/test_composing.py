"""What the helper has the stage make for somebody else."""

from pathlib import Path

from warmcell.sandbox.backends.bubblewrap.rootfs import ROOT
from warmcell.sandbox.helper.create import compose
from warmcell.sandbox.helper.wanted import OWN, Overlay, Tree, Wanted
from warmcell.sandbox.models import Limits

PLACES = {"lower": "", "folder": "/data/folder", "inner": "/data/folder/inner", "mine": "/tmp/mine"}


def asked() -> Wanted:
    trees = tuple(Tree(name=name, fd=0, target=target, writable=True) for name, target in PLACES.items())
    overlays = tuple(
        Overlay(name=name, lowers=("lower",), target=target, size_bytes=1 << 20, mode=0o755, skeleton=())
        for name, target in (("layer", "/opt/env"), ("changes", "/data/changed"))
    )
    return Wanted(
        id="abcdefghijkl",
        named="abcdefghijkl",
        network="none",
        limits=Limits(),
        python="/opt/env/bin/python",
        home="/home/me",
        private_home=True,
        user="somebody",
        umask=0o027,
        devices=(49,),
        trees=trees,
        overlays=overlays,
        fills=(),
        links={"/tmp/link": "/data", "/data/folder/link": "/data", "/data/name": "/data/folder"},
        covered=("/data/folder/secret", "/data/else"),
        skeleton=("x",),
        mounts=0,
        later=True,
    )


def composed(tmp_path: Path) -> dict[str, dict[str, object]]:
    made = compose(asked(), dict.fromkeys(PLACES, 0), uid=4321, gid=4321, runtime=str(tmp_path), bwrap=Path("/bwrap"))
    return {f"/{entry['place']}": entry for entry in made["mounts"]["root"]["entries"]}


def test_no_tree_can_have_a_name_that_the_stage_makes(tmp_path: Path) -> None:
    """It would be in the way, or be taken for what is the sandbox's own."""
    made = compose(asked(), dict.fromkeys(PLACES, 0), uid=4321, gid=4321, runtime=str(tmp_path), bwrap=Path("/bwrap"))
    mounts = made["mounts"]
    kinds = ("file_systems", "directories", "files", "links", "overlays", "pipes")
    names = {str(one["path"]).split("/")[0] for kind in kinds for one in mounts[kind]}
    names |= {mounts["root"]["path"], mounts["run"]}
    assert ROOT in names
    assert names <= {*OWN}


def test_init_and_shared_memory_are_as_asked_for(tmp_path: Path) -> None:
    """With the user's umask, and on a device that no process of a restored kernel knows."""
    made = compose(asked(), dict.fromkeys(PLACES, 0), uid=4321, gid=4321, runtime=str(tmp_path), bwrap=Path("/bwrap"))
    assert made["argv"][-2:] == ["--umask", "27"]
    devices = {one["path"]: one["devices"] for one in made["mounts"]["file_systems"]}
    assert devices == {name: [49] if name == "shm" else [] for name in devices}


def test_nothing_is_made_in_trees_of_the_users(tmp_path: Path) -> None:
    """Only in the sandbox's own memory."""
    made = composed(tmp_path)
    assert made["/tmp/mine"]["make"]
    assert made["/data/folder"]["make"]
    assert not made["/data/folder/inner"]["make"]
    assert made["/data/folder/secret"]["own"] == "nothing"
    assert not made["/data/folder/secret"]["make"]
    assert made["/tmp/link"]["link"] == made["/data/name"]["link"].removesuffix("/folder")  # type: ignore[attr-defined]
    # A link in a user's tree, or a cover over nothing, is not made at all.
    assert not {"/data/folder/link", "/data/else"} & {*made}


def test_the_user_has_the_name_that_is_asked_for_and_the_callers_number(tmp_path: Path) -> None:
    """A name is all that the caller chooses."""
    made = compose(asked(), dict.fromkeys(PLACES, 0), uid=4321, gid=4321, runtime=str(tmp_path), bwrap=Path("/bwrap"))
    passwd = next(one["content"] for one in made["mounts"]["files"] if one["path"] == "etc/passwd")
    assert b"somebody:x:4321:4321:somebody:/home/me:/bin/bash" in passwd
