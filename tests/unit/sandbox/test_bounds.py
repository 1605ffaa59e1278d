"""The operator's bounds."""

import sys
from pathlib import Path

import pytest

from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import GIB, Limits, Mount, SandboxSpec, Workspace


def spec(**fields: object) -> SandboxSpec:
    return SandboxSpec(python=sys.executable, **fields)  # type: ignore[arg-type]


def test_what_asks_for_no_cap_gets_the_operators() -> None:
    """A cap of the operator holds for every sandbox, and a smaller wish is kept."""
    bounds = Bounds(max_memory_bytes=4 * GIB, max_cpus=2.0)
    assert bounds.check(spec()).limits == Limits(memory_bytes=4 * GIB, cpus=2.0)
    assert bounds.check(spec(limits=Limits(memory_bytes=GIB))).limits.memory_bytes == GIB


@pytest.mark.parametrize(
    ("bounds", "fields", "says"),
    [
        (Bounds(max_memory_bytes=GIB), {"limits": Limits(memory_bytes=2 * GIB)}, "more than the operator's"),
        (Bounds(), {"limits": Limits(memory_bytes=1)}, "too few for a kernel"),
        (Bounds(), {"limits": Limits(cpus=-1.0)}, "more than nothing"),
        (Bounds(networks=("none",)), {"network": "host"}, "network 'host' is not allowed"),
        (Bounds(), {"backend": "process"}, "backend 'process' is not allowed"),
        (Bounds(workspace_modes=("ro",)), {"workspace": Workspace(path="/", mode="rw")}, "mode 'rw' is not allowed"),
        (Bounds(), {"workspace": Workspace(path="/no/such/folder")}, "/no/such/folder does not exist"),
        (Bounds(), {"umask": 0o1000}, "umask cannot be 512"),
        (Bounds(), {"umask": -1}, "umask cannot be -1"),
        (Bounds(mounts=("/",)), {"mounts": (Mount(source="/no/such"),)}, "/no/such does not exist"),
        (Bounds(), {"mounts": (Mount(source="/usr"),)}, "Mounting /usr is not allowed"),
        (Bounds(), {"user": "root"}, "'root' is no name"),
        (Bounds(), {"user": "../etc"}, "'../etc' is no name"),
        (Bounds(), {"user": "a:0:0\nb"}, "is no name"),
        (Bounds(), {"user": "ann", "home": "persistent"}, "A persistent home"),
    ],
)
def test_more_than_the_bounds_is_refused_with_what_is_allowed(
    bounds: Bounds, fields: dict[str, object], says: str
) -> None:
    """One error, and its hint says what would do."""
    with pytest.raises(InvalidRequestError) as caught:
        bounds.check(spec(**fields))
    assert says in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("keepers", "asked", "made"),
    [(0o022, 0o000, 0o022), (0o077, 0o002, 0o022), (0o002, 0o000, 0o002), (0o000, 0o000, 0o000), (0o022, 0o077, 0o077)],
)
def test_others_may_write_only_what_the_keepers_user_lets_them(keepers: int, asked: int, made: int) -> None:
    """Whoever asks for a sandbox; who may read is theirs to say."""
    bounds = Bounds(umask=keepers)
    assert bounds.check(spec(umask=asked)).umask == made
    assert bounds.check(spec()).umask is None


def test_a_link_out_of_an_allowed_folder_is_no_way_round(tmp_path: Path) -> None:
    """Mounts are held against where they really lead."""
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "door").symlink_to("/etc")
    bounds = Bounds(mounts=(str(tmp_path / "allowed"),))
    with pytest.raises(InvalidRequestError, match="is not allowed here"):
        bounds.check(spec(mounts=(Mount(source=str(tmp_path / "allowed" / "door")),)))
    inside = spec(mounts=(Mount(source=str(tmp_path / "allowed")),))
    assert bounds.check(inside) == inside


@pytest.mark.parametrize("python", ["python3", "/", __file__])
def test_the_interpreter_must_be_one(python: str) -> None:
    """A relative name, a folder or a plain file is no interpreter."""
    with pytest.raises(InvalidRequestError, match="is no Python interpreter"):
        Bounds().check(SandboxSpec(python=python))


@pytest.mark.parametrize("image", ["", "--privileged", "two words", "a\0b"])
def test_what_is_no_name_of_an_image_is_refused(image: str) -> None:
    """No image's name can be taken for an option or for two words."""
    with pytest.raises(InvalidRequestError):
        Bounds().check(SandboxSpec(python="", image=image))


def test_an_images_interpreter_is_none_of_the_hosts() -> None:
    """With an image its own interpreter is taken, or one that is named by a path in it."""
    for python in ("", "/opt/in/the/image/python"):
        assert Bounds().check(SandboxSpec(python=python, image="analysis")).python == python
    with pytest.raises(InvalidRequestError, match="no absolute path"):
        Bounds().check(SandboxSpec(python="python3", image="analysis"))
