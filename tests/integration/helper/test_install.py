"""The helper as a service: installed where only root can change it, from files that only root can have changed."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.helper.system import AS_IN_ITS_UNIT, NOTIFY, SystemHelper, listening
from tests.lanes import TOP
from tests.leaks import Places
from warmcell.extension import helper_setup
from warmcell.extension.cli.helper import look
from warmcell.extension.helper_setup import UNIT, Setup, check_trusted
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.helper import program
from warmcell.sandbox.snapshots.criu import SOCKET_VARIABLE, helper_environment

pytestmark = [pytest.mark.root, pytest.mark.criu]


@pytest.fixture
def setup(places: Places, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Places of the test's own, on a machine without a service manager."""
    monkeypatch.setattr(helper_setup, "has_manager", lambda: False)
    root = places.root
    return Setup(
        prefix=root / "opt", units=root / "units", socket=root / "h" / "s", images=root / "images", criu=root / "criu"
    )


async def test_what_is_installed_runs(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy runs by the command that is printed, with no other capabilities than the unit leaves it."""
    done = await asyncio.to_thread(setup.install)
    words = done[-1].partition("env ")[2].split()
    check_trusted(setup.prefix)
    with listening() as told:
        bounded = [*AS_IN_ITS_UNIT, "env", "-i", f"{NOTIFY}={told.name}"]
        process = await asyncio.create_subprocess_exec(*bounded, *words, cwd="/")
        await asyncio.to_thread(told.wait)
    try:
        monkeypatch.setenv(SOCKET_VARIABLE, str(setup.socket))
        said = await look()
        assert (said["running"], said["ready"], said["makes"]) == (True, True, True), said["why_not"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not setup.socket.exists()
    assert any(str(setup.prefix) in line for line in await asyncio.to_thread(setup.uninstall))
    assert not setup.prefix.exists()
    assert setup.images.exists()  # Users' snapshots stay.


def test_the_unit(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a service manager the unit is written, enabled and started; it kills what is left, and filters nothing."""
    ran: list[Sequence[str]] = []
    monkeypatch.setattr(helper_setup, "has_manager", lambda: True)
    monkeypatch.setattr(helper_setup, "_run", ran.append)
    setup.install()
    unit = (setup.units / UNIT).read_text()
    assert ["systemctl", "enable", "--now", UNIT] in ran
    assert "KillMode=mixed" in unit
    assert f"-I -S {setup.start}" in unit
    assert not any(word in unit for word in ("SystemCallFilter", "ProtectSystem", "PrivateTmp", "RestrictNamespaces"))
    verifier = shutil.which("systemd-analyze")
    if verifier is not None:
        checked = subprocess.run([verifier, "verify", str(setup.units / UNIT)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
    setup.uninstall()
    assert not (setup.units / UNIT).exists()


def test_criu_is_installed_by_a_command(tmp_path: Path) -> None:
    """One that is there is found; without one, and with no mirror to be had, the error says what to do."""
    prefix = tmp_path / "criu"

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "warmcell.extension.cli", "criu", str(prefix), "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            cwd=TOP,
            timeout=120,
            check=False,
        )

    carried = program.find(helper_environment())
    if not carried.loader:
        pytest.skip("the system's own CRIU is new enough: nothing is installed")
    failed = run(WARMCELL_CRIU_MIRROR="http://127.0.0.1:9/debian")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["error"]["code"] == "backend_unavailable"
    assert "127.0.0.1" in failed.stderr
    assert not prefix.exists()
    prefix.mkdir()
    (prefix / "mine").write_text("mine")
    refused = run(WARMCELL_CRIU_MIRROR="http://127.0.0.1:9/debian")
    assert refused.returncode == 1
    assert f"{prefix} has other files" in refused.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["criu", "mine"]
    shutil.rmtree(prefix)
    shutil.copytree(Path(carried.path).parents[1], prefix)
    done = run()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"path": str(prefix / "sbin" / "criu"), "version": carried.version}


@pytest.mark.parametrize("change", ["owner", "mode", "parent"])
def test_files_that_others_can_change(tmp_path: Path, change: str) -> None:
    """Root does not run what somebody else could have written, and says how to make an environment of its own."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "code.py").write_text("")
    check_trusted(folder)
    if change == "owner":
        os.chown(folder / "code.py", 1001, 1001)
    elif change == "mode":
        (folder / "code.py").chmod(0o666)
    else:
        folder.parent.chmod(0o777)
    with pytest.raises(BackendUnavailableError) as caught:
        check_trusted(folder)
    assert "venv" in caught.value.hint


def test_links_are_followed(tmp_path: Path) -> None:
    """A link to what others can change is as bad."""
    (tmp_path / "bad").write_text("")
    (tmp_path / "bad").chmod(0o666)
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "bad")
    with pytest.raises(BackendUnavailableError):
        check_trusted(folder)


async def test_status(helper: SystemHelper) -> None:
    """`warmcell helper status --json` says that it runs, and where none does why not, with the cure."""
    for socket, code in ((str(helper.path), 0), ("/nowhere", 3)):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "warmcell.extension.cli", "helper", "status", "--json"),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, SOCKET_VARIABLE: socket},
            cwd=TOP,
        )
        stdout, _ = await asyncio.wait_for(process.communicate(), 60)
        said = json.loads(stdout)
        assert process.returncode == code
        assert said["running"] is (code == 0)
        assert said["hint"] or code == 0
