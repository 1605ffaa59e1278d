"""A guest that puts links where its private files are: nothing of the host is read, written or compared for it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import Dockerd
from tests.integration.docker.test_boxes import with_volumes
from tests.security.conftest import BACKENDS
from warmcell.sandbox.backends import layers, likeness
from warmcell.sandbox.backends.layers import Part, Parts, Saved
from warmcell.sandbox.errors import SnapshotError
from warmcell.sandbox.testing.contract import Subject

SECRET = "of the host"
PARTS = Parts(
    parts={"volume0": Part(place="tmp/a/secrets", most_bytes=2**20, most_entries=1000)}, marks="user", fits={}
)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A directory of the host's, with one that has a secret."""
    (tmp_path / "host" / "secrets").mkdir(parents=True)
    (tmp_path / "host" / "secrets" / "key").write_text(SECRET)
    return tmp_path / "host"


def a_root(top: Path, name: str) -> Path:
    """A sandbox's root, with a private directory of some steps."""
    made = top / name
    (made / "tmp" / "a" / "secrets").mkdir(parents=True)
    return made


@pytest.fixture
def base(tmp_path: Path, host: Path) -> Iterator[int]:
    """A root in which the guest has put a link in place of a directory on the way to its private files."""
    root = a_root(tmp_path, "root")
    (root / "tmp" / "a").rename(root / "tmp" / "b")
    (root / "tmp" / "a").symlink_to(host)
    handle = os.open(root, os.O_PATH | os.O_DIRECTORY)
    yield handle
    os.close(handle)


def test_what_is_saved_is_never_the_hosts(base: int, tmp_path: Path) -> None:
    """Neither is anything left of what was begun."""
    target = tmp_path / "layer"
    target.mkdir()
    with pytest.raises(SnapshotError):
        layers.save(base, PARTS, target, began_with=-1)
    assert not target.exists()


def test_what_a_sandbox_begins_with_is_never_written_to_the_host(base: int, tmp_path: Path, host: Path) -> None:
    """A layer may have any file of any content."""
    (tmp_path / "layer" / "volume0").mkdir(parents=True)
    (tmp_path / "layer" / "volume0" / "planted").write_text("by the guest")
    with pytest.raises(SnapshotError):
        layers.fill(base, Saved(path=tmp_path / "layer", bytes={"volume0": 4096}), PARTS)
    assert os.listdir(host / "secrets") == ["key"]


def test_nothing_is_alike_by_way_of_the_host(base: int, tmp_path: Path) -> None:
    """Else a guest learned which of its files are like the host's; nor is what it shows of it taken for shown."""
    other = a_root(tmp_path, "other")
    (other / "tmp" / "a" / "secrets" / "key").write_text(SECRET)
    handle = os.open(other, os.O_PATH | os.O_DIRECTORY)
    try:
        assert likeness.alike(handle, handle, [], PARTS)
        assert not likeness.alike(base, handle, [], PARTS)
        assert not likeness.alike(base, base, [], Parts(parts={}, marks="user", fits={}, shown=("tmp/a/secrets",)))
    finally:
        os.close(handle)


@pytest.mark.parametrize("subject", [BACKENDS["docker"]], indirect=True)
async def test_a_container_that_moves_its_volume_saves_nothing_of_the_hosts(
    subject: Subject, docker: Dockerd, host: Path
) -> None:
    """It moves the directory above the volume away, the mount with it, and puts a link to the host's there."""
    layer = subject.folder("layer")
    with with_volumes(docker, "/tmp/a/secrets") as image:
        async with subject.box(image=image) as box:
            await box.says(f"echo mine > /tmp/a/secrets/file && mv /tmp/a /tmp/b && ln -s {host} /tmp/a")
            with pytest.raises(SnapshotError):
                await box.instance.save_layer(layer)
            assert not layer.exists()
            await box.says("rm /tmp/a && mv /tmp/b /tmp/a")
            layer.mkdir()
            await box.instance.save_layer(layer)
        saved = {file.name: file.read_text() for file in layer.rglob("file")}
        assert saved == {"file": "mine\n"}
