"""`warmcell clean` on keepers that behave, hang, are killed, or are not there."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.leaks import Places
from warmcell.extension.cleaning import Cleaning
from warmcell.extension.cli import main
from warmcell.sandbox.errors import BackendError
from warmcell.sandbox.gpus.allocator import Grant
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.models import GpuDevice, SandboxId
from warmcell.sandbox.paths import Paths

# What can be seen of a keeper from outside: its lock, its socket, its arguments, and how it takes a signal.
STAND_IN = """
import fcntl, json, os, signal, socket, sys
runtime, manner = sys.argv[1:3]
if manner != "obedient":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
lock = open(f"{runtime}/keeper.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(json.dumps({"pid": os.getpid()}))
lock.flush()
if manner != "deaf":
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{runtime}/keeper.sock")
    listener.listen()
print("up", flush=True)
signal.pause()
"""


@contextmanager
def stand_in(paths: Paths, manner: str) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-c", STAND_IN, str(paths.runtime), manner, "warmcell.extension.keeper"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 30)[0]
        assert process.stdout.readline() == "up\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def paths(places: Places) -> Paths:
    return Paths.default().make()


def litter(paths: Paths) -> list[Path]:
    """What a killed keeper leaves below its directories."""
    run = paths.sandboxes / "abcdefghijkl" / "run"
    run.mkdir(parents=True)
    (run / "init.sock").touch()
    kernel = paths.kernels / "8d0f2a31-7f1c-4a51-93f6-0a1b2c3d4e5f"
    kernel.mkdir()
    (kernel / "shell").touch()
    gpu = GpuDevice(uuid="GPU-1", index=0, name="T4", memory_total_bytes=1)
    lock = LeaseDirectory(paths.leases).acquire(
        ["GPU-1"], lambda sight: Grant((gpu,)), holder=SandboxId("abcdefghijkl")
    )
    lock[0].release()
    return [run.parent, kernel]


def test_a_keeper_is_ended_and_what_it_left_is_removed(paths: Paths) -> None:
    """It gets the chance to end by itself; then nothing is left but logs and homes."""
    left = litter(paths)
    paths.keeper_log.write_text("said")
    with stand_in(paths, "obedient") as keeper:
        report = Cleaning(paths, answer_timeout=1.0).clean()
        assert keeper.wait(timeout=60) == -signal.SIGTERM
    assert (report.keeper, report.killed) == (keeper.pid, False)
    told = "\n".join(report.removed)
    assert all(str(path) in told for path in left)
    assert "GPU-1.lock" in told
    assert not paths.runtime.exists()
    assert not list(paths.leases.glob("*"))
    assert paths.keeper_log.read_text() == "said"


@pytest.mark.parametrize("manner", ["stubborn", "deaf"])
def test_a_keeper_that_does_not_end_is_killed(paths: Paths, manner: str) -> None:
    """One that ignores the signal, or has lost its socket, is found and killed at the deadline."""
    with stand_in(paths, manner) as keeper:
        report = Cleaning(paths, end_timeout=0.1, answer_timeout=1.0).clean()
        assert keeper.wait(timeout=60) == -signal.SIGKILL
    assert (report.keeper, report.killed) == (keeper.pid, True)


def test_after_a_killed_keeper_there_is_no_keeper_but_its_litter(paths: Paths) -> None:
    """A stale socket and lock are no keeper, and go."""
    litter(paths)
    with stand_in(paths, "stubborn") as keeper:
        keeper.kill()
        keeper.wait(timeout=60)
    assert paths.keeper_socket.exists()
    assert Cleaning(paths).running() == ""
    report = Cleaning(paths).clean()
    assert report.keeper is None
    assert str(paths.keeper_socket) in report.removed
    assert not paths.runtime.exists()


def test_a_number_in_a_stale_lock_is_not_mistaken_for_a_keeper(paths: Paths) -> None:
    """A pid that meanwhile belongs to another program of the user is never signalled."""
    paths.keeper_lock.write_text(json.dumps({"pid": os.getpid()}))
    assert Cleaning(paths).running() == ""
    assert Cleaning(paths).clean().keeper is None


def test_cleaning_twice_finds_nothing(paths: Paths) -> None:
    """The second time there is nothing to do, and nothing is made."""
    litter(paths)
    Cleaning(paths).clean()
    assert Cleaning(paths).clean().removed == ()
    assert not paths.runtime.exists()


def test_nobody_starts_a_keeper_meanwhile(paths: Paths) -> None:
    """Cleaning waits for a start that is under way, as starts wait for each other."""
    lock = os.open(paths.runtime, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = threading.Event()

    def clean() -> None:
        Cleaning(paths).clean()
        done.set()

    thread = threading.Thread(target=clean)
    thread.start()
    try:
        assert not done.wait(0.2)
    finally:
        os.close(lock)
        thread.join(timeout=60)
    assert done.is_set()


def test_what_is_not_ours_stays(paths: Paths) -> None:
    """With a directory that holds other things too, only what has our names is removed."""
    foreign = [paths.runtime / "notes.txt", paths.kernels / "not one.txt", paths.leases / "other"]
    for path in foreign:
        path.write_text("mine")
    litter(paths)
    report = Cleaning(paths).clean()
    assert [path.read_text() for path in foreign] == ["mine"] * 3
    assert len(report.removed) == 3
    for path in foreign:
        path.unlink()


@pytest.mark.root
def test_nothing_is_deleted_through_a_mount(paths: Paths, places: Places) -> None:
    """A folder of the user that is still mounted below a run directory is safe, and the cure is named."""
    precious = places.root / "precious folder"
    precious.mkdir()
    (precious / "thesis").write_text("years")
    litter(paths)
    target = paths.sandboxes / "abcdefghijkl" / "a mount"
    target.mkdir()
    subprocess.run(["mount", "--bind", str(precious), str(target)], check=True, timeout=60)
    try:
        with pytest.raises(BackendError, match=r"a mount is still mounted.*umount"):
            Cleaning(paths).clean()
        assert (precious / "thesis").read_text() == "years"
        assert target.parent.exists()
    finally:
        subprocess.run(["umount", str(target)], check=True, timeout=60)
    Cleaning(paths).clean()
    assert (precious / "thesis").read_text() == "years"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in never answers, so there is no use in waiting for it."""
    monkeypatch.setattr("warmcell.extension.cli.clean.Cleaning", partial(Cleaning, answer_timeout=0.1))


@pytest.mark.usefixtures("impatient")
def test_without_a_terminal_it_asks_for_yes(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that would lose running kernels has to say so; nothing is touched before."""
    with stand_in(paths, "stubborn") as keeper:
        assert main(["clean"]) == 1
        assert "warmcell clean --yes" in capsys.readouterr().err
        assert keeper.poll() is None
        keeper.kill()
    assert main(["clean"]) == 0


@pytest.mark.usefixtures("impatient")
def test_an_answer_of_no_changes_nothing(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever presses return keeps their kernels."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin.readline", lambda: "\n", raising=False)
    with stand_in(paths, "obedient") as keeper:
        assert main(["clean"]) == 1
        assert keeper.poll() is None
        asked = capsys.readouterr().err
        assert f"A keeper (process {keeper.pid}) runs, but does not answer" in asked
        assert "Nothing was removed." in asked
        monkeypatch.setattr("sys.stdin.readline", lambda: "y\n", raising=False)
        assert main(["clean"]) == 0
        assert keeper.wait(timeout=60) == -signal.SIGTERM
    assert f"Ended the keeper (process {keeper.pid})." in capsys.readouterr().out


def test_json_lists_what_was_removed(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    """A program can read what went."""
    litter(paths)
    assert main(["clean", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["keeper"] is None
    assert len(told["removed"]) >= 3
    assert main(["clean"]) == 0
    assert capsys.readouterr().out == "There was nothing to remove.\n"
