"""What may be a pipe or without an end is read by nobody who could wait for it, or run out of memory."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.sandbox.backends.test_environment import interpreter, virtual_environment
from warmcell.kernel_provisioner.wishes import read_choice
from warmcell.sandbox.backends.environment import discover
from warmcell.sandbox.backends.fingerprint import fingerprint
from warmcell.sandbox.backends.layers import ABOUT, DEVICES_MAX, look_at
from warmcell.sandbox.errors import SnapshotCorruptError
from warmcell.sandbox.plain_files import read_plain

FITS = {"uid": "1"}


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fails where something waits for the other end of a pipe."""

    def too_late(*_: object) -> None:
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_plain_files_are_read_and_nothing_else(tmp_path: Path) -> None:
    """Also by a link, and up to their bound."""
    plain, pipe, link, endless = (tmp_path / name for name in ("plain", "pipe", "link", "endless"))
    plain.write_bytes(b"12345")
    os.mkfifo(pipe)
    link.symlink_to(plain)
    endless.symlink_to("/dev/zero")
    assert read_plain(link, most_bytes=5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_plain(plain, most_bytes=4)
    for odd in (pipe, endless):
        with in_time(), pytest.raises(OSError, match="no plain file"):
            read_plain(odd, most_bytes=5)
    with pytest.raises(IsADirectoryError):
        read_plain(tmp_path, most_bytes=5)


def _settings(place: Path) -> None:
    python = virtual_environment(place / "venv", interpreter(place / "base").parent.parent)
    (place / "venv" / "pyvenv.cfg").unlink()
    os.mkfifo(place / "venv" / "pyvenv.cfg")
    assert discover(str(python)).trees == ()


def _pointer(place: Path) -> None:
    python = virtual_environment(place / "venv", interpreter(place / "base").parent.parent)
    os.mkfifo(place / "venv" / "lib" / "python3.12" / "site-packages" / "mine.pth")
    assert fingerprint(str(python), ("mine",))


def _notebook(place: Path) -> None:
    os.mkfifo(place / "a.ipynb")
    assert read_choice(str(place / "a.ipynb")) == {}


def _layer(place: Path) -> None:
    os.mkfifo(place / ABOUT)
    with pytest.raises(SnapshotCorruptError):
        look_at(place, fits=FITS)


@pytest.mark.parametrize("reads", [_settings, _pointer, _notebook, _layer])
def test_a_pipe_is_waited_for_by_nobody(tmp_path: Path, reads: Callable[[Path], None]) -> None:
    """In an environment, a notebook's folder or a layer."""
    with in_time():
        reads(tmp_path)


@pytest.mark.parametrize("size", ["-1000000000000", "Infinity"])
def test_a_layer_cannot_say_that_it_takes_less_than_nothing(tmp_path: Path, size: str) -> None:
    """What is left for the sandbox's own files would be more than it may have."""
    (tmp_path / "environment").mkdir()
    (tmp_path / ABOUT).write_text(f'{{"version": 1, "fits": {{"uid": "1"}}, "bytes": {{"environment": {size}}}}}')
    with pytest.raises(SnapshotCorruptError):
        look_at(tmp_path, fits=FITS)


def test_a_layer_says_of_no_more_devices_than_a_start_avoids(tmp_path: Path) -> None:
    """Each that is avoided is one more file system, held until the sandbox is made; the helper takes no longer list."""
    (tmp_path / "environment").mkdir()
    about = {"version": 1, "fits": {"uid": "1"}, "bytes": {"environment": 0}, "devices": list(range(100_000))}
    (tmp_path / ABOUT).write_text(json.dumps(about))
    assert look_at(tmp_path, fits=FITS).devices == tuple(range(100_000 - DEVICES_MAX, 100_000))
