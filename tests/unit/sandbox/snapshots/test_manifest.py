"""A manifest is read as it was written, or refused."""

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.sandbox.snapshots.making import manifest
from warmcell.sandbox.errors import SnapshotCorruptError, SnapshotIncompatibleError
from warmcell.sandbox.models import Mount, SnapshotId
from warmcell.sandbox.snapshots import manifest as manifests
from warmcell.sandbox.snapshots.manifest import GuestIdentity, LayerSummary, Manifest

ID = "abcdefghijkl"


@pytest.fixture
def whole() -> Manifest:
    """One with something in every field."""
    plain = manifest("before \N{SNOWMAN} \ud800", image_bytes=5)
    return dataclasses.replace(
        plain,
        info=dataclasses.replace(plain.info, id=SnapshotId(ID)),
        uid=os.getuid(),
        versions={"criu": "4.2.1"},
        mounts=(Mount(source="/data"),),
        gpus=("GPU-1",),
        gpu_driver="580.65",
        environment={"prefix": "/opt/env"},
        kernel={"connection": {"key": "secret", "ports": [1, 2]}, "cwd": "/w", "since": 1.5, "env": {}},
        guest=GuestIdentity(socket_prefix=".e1003", pid=1003, generation=2, token="t"),
        layer=LayerSummary(entries=3, sha256="00"),
    )


@pytest.fixture
def directory(tmp_path: Path, whole: Manifest) -> Path:
    made = tmp_path / ID
    made.mkdir(mode=0o700)
    manifests.write(made, whole)
    return made


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the file as somebody would who knows its checksum."""
    path = directory / manifests.MANIFEST
    envelope = json.loads(path.read_bytes())
    change(envelope)
    body = json.dumps(envelope["manifest"], sort_keys=True, separators=(",", ":")).encode()
    envelope["sha256"] = hashlib.sha256(body).hexdigest()
    path.write_text(json.dumps(envelope))


def test_it_is_read_as_it_was_written(directory: Path, whole: Manifest) -> None:
    """Every field comes back, and the file is its owner's alone."""
    assert manifests.read(directory) == whole
    assert (directory / manifests.MANIFEST).stat().st_mode & 0o777 == 0o600
    assert os.listdir(directory) == [manifests.MANIFEST]


def test_a_flipped_bit_is_found(directory: Path) -> None:
    """Whichever bit flips, the manifest is refused or says the same."""
    path = directory / manifests.MANIFEST
    good, said = path.read_bytes(), manifests.read(directory)
    rng = random.Random(7)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert manifests.read(directory) == said  # White space, for example.
        except (SnapshotCorruptError, SnapshotIncompatibleError) as error:
            assert error.hint
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("length", [0, 1, 100, -2])
def test_a_part_of_it_is_refused(directory: Path, length: int) -> None:
    """A file that was cut off is no manifest."""
    path = directory / manifests.MANIFEST
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SnapshotCorruptError):
        manifests.read(directory)


def test_a_newer_format_is_refused_with_both_versions(directory: Path) -> None:
    """Expected and found are in the details, the cure in the hint."""
    rewrite(directory, lambda envelope: envelope.update(format=manifests.FORMAT + 1))
    with pytest.raises(SnapshotIncompatibleError) as raised:
        manifests.read(directory)
    assert (raised.value.details["expected"], raised.value.details["found"]) == (1, 2)
    assert "version" in raised.value.hint


def test_a_field_that_nobody_knows_is_another_version(directory: Path) -> None:
    """A whole manifest with fields of the future is incompatible, not corrupt."""
    rewrite(directory, lambda envelope: envelope["manifest"].update(quantum=1))
    with pytest.raises(SnapshotIncompatibleError, match="quantum"):
        manifests.read(directory)


def test_somebody_elses_is_refused(directory: Path) -> None:
    """By what it says, and by whose file it is."""
    rewrite(directory, lambda envelope: envelope["manifest"].update(uid=os.getuid() + 1))
    with pytest.raises(SnapshotIncompatibleError, match="belongs to user"):
        manifests.read(directory)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(directory: Path) -> None:
    """Whatever it says."""
    os.chown(directory / manifests.MANIFEST, 12345, -1)
    with pytest.raises(SnapshotIncompatibleError) as raised:
        manifests.read(directory)
    assert raised.value.details == {"what": "owner", "expected": 0, "found": 12345}


def test_what_is_no_file_of_ours_is_refused(directory: Path, tmp_path: Path) -> None:
    """A link, a pipe, a file that others may write, one of another snapshot, and none at all."""
    path = directory / manifests.MANIFEST
    path.chmod(0o644)
    with pytest.raises(SnapshotCorruptError, match="by others"):
        manifests.read(directory)
    path.chmod(0o600)
    other = directory.rename(tmp_path / ("b" * 12)) / manifests.MANIFEST
    with pytest.raises(SnapshotCorruptError, match="another snapshot"):
        manifests.read(other.parent)
    elsewhere = other.rename(tmp_path / "elsewhere")
    with pytest.raises(SnapshotCorruptError):
        manifests.read(other.parent)
    other.symlink_to(elsewhere)
    with pytest.raises(SnapshotCorruptError):
        manifests.read(other.parent)
    other.unlink()
    os.mkfifo(other, 0o600)
    with pytest.raises(SnapshotCorruptError):
        manifests.read(other.parent)
