"""What an engine says that an image has in a volume goes into that volume alone."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from warmcell.sandbox.backends.docker.volumes import put
from warmcell.sandbox.errors import SandboxStartError

KINDS = {"d": tarfile.DIRTYPE, "f": tarfile.REGTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE, "p": tarfile.FIFOTYPE}


def archive(*entries: str) -> io.BytesIO:
    """Entries as `KIND NAME TARGET`; a file has its name as its content."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as members:
        for entry in entries:
            kind, name, *target = entry.split()
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = KINDS[kind], "".join(target), 0o6754
            content = name.encode() if kind == "f" else b""
            member.size = len(content)
            members.addfile(member, io.BytesIO(content))
    made.seek(0)
    return made


def filled(directory: Path, *entries: str) -> Mapping[str, str]:
    """What is there afterwards: rights, and what links say or files have."""
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        put(archive(*entries), top, owner=None)
    finally:
        os.close(top)
    told = {}
    for path in sorted(directory.rglob("*")):
        what = os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "/"
        told[str(path.relative_to(directory))] = f"{path.lstat().st_mode & 0o7777:o} {what}"
    return told


def test_files_links_and_directories_are_there(tmp_path: Path) -> None:
    """Without the rights that come with an owner; what is neither is left out."""
    entries = ("d .", "d ./sub", "f ./sub/file", "l ./link /etc/passwd", "h ./same ./sub/file", "p ./pipe")
    assert filled(tmp_path, *entries) == {
        "link": "777 /etc/passwd",
        "same": "754 ./sub/file",
        "sub": "754 /",
        "sub/file": "754 ./sub/file",
    }


@pytest.mark.parametrize(
    "entries",
    [
        ("f ../out",),
        ("f /out",),
        ("d a", "f a/../../out"),
        ("l a {out}", "f a/out"),
        ("l a ..", "f a/out"),
        ("l a ../out", "h b a/x"),
        ("f a", "f a/out"),
    ],
)
def test_nothing_is_written_elsewhere(tmp_path: Path, entries: tuple[str, ...]) -> None:
    """Whatever names and links an archive has."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    with pytest.raises(SandboxStartError, match="archive"):
        filled(tmp_path / "in", *(entry.format(out=tmp_path / "out") for entry in entries))
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
