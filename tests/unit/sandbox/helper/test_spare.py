"""Page files that are written over: only those that nobody can see any more, of a good size, and not for ever."""

import contextlib
import fcntl
import mmap
import os
import signal
from pathlib import Path

import pytest

from warmcell.sandbox.helper import spare as spares
from warmcell.sandbox.helper.spare import Spare

PAGE = 4096


@pytest.fixture
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spare:
    monkeypatch.setattr(spares, "LEAST_BYTES", 4 * PAGE)
    return Spare(str(tmp_path))


def made(tmp_path: Path, *, pages: int = 8) -> str:
    """A page file as it is left: longer than it is."""
    path = tmp_path / "pages"
    path.write_bytes(b"x" * pages * PAGE)
    os.truncate(path, 1 << 40)
    return str(path)


def kept(spare: Spare, path: str, *, pages: int = 8) -> bool:
    return spare.keep(path, length_bytes=pages * PAGE)


def test_it_is_kept_and_written_over(spare: Spare, tmp_path: Path) -> None:
    """The very file, at its old length, for one of about its size; only once."""
    path, new = made(tmp_path), str(tmp_path / "new")
    inode = os.stat(path).st_ino
    assert kept(spare, path)
    assert not os.path.exists(path)
    assert spare.take(new, length_bytes=3 * PAGE) is None
    fd = spare.take(new, length_bytes=6 * PAGE)
    assert fd is not None
    found = os.fstat(fd)
    os.close(fd)
    assert (found.st_ino, found.st_size) == (inode, 8 * PAGE)
    assert not spare.is_there()
    assert spare.take(str(tmp_path / "other"), length_bytes=6 * PAGE) is None


def test_who_has_it_open_or_mapped_keeps_it(spare: Spare, tmp_path: Path) -> None:
    """Then it is not taken: what is seen of it must not change."""
    path = made(tmp_path)
    with open(path, "rb") as file:
        assert not kept(spare, path)
        mapped = mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    assert not kept(spare, path)
    mapped.close()
    assert kept(spare, path)


def test_the_larger_one_stays(spare: Spare, tmp_path: Path) -> None:
    """There is one at most, and none that is too small or too large, or that a disk needs which gets full."""
    assert not kept(spare, made(tmp_path, pages=2), pages=2)
    assert kept(spare, made(tmp_path))
    assert not kept(spare, made(tmp_path, pages=6), pages=6)
    assert kept(spare, made(tmp_path, pages=12), pages=12)
    spare.discard()
    spare.discard()
    assert not spare.is_there()


@pytest.mark.parametrize(("name", "value"), [("MOST_BYTES", 4 * PAGE), ("ROOM", 1 << 40)])
def test_it_takes_little(spare: Spare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    """Of a disk with little room nothing."""
    monkeypatch.setattr(spares, name, value)
    assert not kept(spare, made(tmp_path))


@pytest.mark.parametrize(("name", "value"), [("KEPT_S", -1.0), ("ROOM", 1 << 40), ("KEPT_S", 60.0)])
def test_it_goes(spare: Spare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """When it was not needed for long, or when the disk has no room for it any more."""
    assert kept(spare, made(tmp_path))
    monkeypatch.setattr(spares, name, value)
    spare.expire()
    assert spare.is_there() == (value == 60.0)


def test_who_opens_it_just_then_ends_nobody(spare: Spare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease that shows that nobody has it open is ended by a signal, which must not end who has the lease."""
    path = made(tmp_path)
    control = fcntl.fcntl
    opened: list[int] = []

    def interrupted(fd: int, command: int, argument: int) -> int:
        done = control(fd, command, argument)
        if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_WRLCK):
            with contextlib.suppress(BlockingIOError):
                opened.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        return done

    monkeypatch.setattr(fcntl, "fcntl", interrupted)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGIO, signal.SIG_DFL)
        kept(spare, path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
