"""What a run of the tests says about lanes that the machine does not have."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser
from tests.lanes import TOP

NEEDS_ROOT = "tests/integration/test_leak_check.py::test_mount_is_a_leak"


def _run(user: OrdinaryUser, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        user.argv(sys.executable, "-m", "pytest", NEEDS_ROOT),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=TOP,
        env={**{name: value for name, value in user.env.items() if name != "CI"}, **env},
    )


@pytest.mark.user
def test_an_absent_lane_is_named_with_the_command_that_adds_it(ordinary_user: OrdinaryUser) -> None:
    """An ordinary user's run passes, and its end says which lane is absent and what adds it."""
    done = _run(ordinary_user)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
    assert "root: not root" in done.stdout
    assert "To add them: sudo make test" in done.stdout


@pytest.mark.user
def test_an_absent_lane_fails_where_it_is_promised(ordinary_user: OrdinaryUser) -> None:
    """With CI=true nothing is skipped silently."""
    done = _run(ordinary_user, CI="true")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 error" in done.stdout
    assert "lane root is absent" in done.stdout


@pytest.mark.root
def test_a_checkout_behind_a_closed_door_can_be_reached(tmp_path: Path) -> None:
    """An ordinary user reads a checkout in a private directory, and nothing else there."""
    closed = tmp_path / "closed"
    checkout = closed / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    closed.chmod(0o700)
    (closed / "secret").write_text("secret")
    (checkout / "pyproject.toml").write_text("found\n")
    script = shutil.copy(TOP / "scripts" / "as-ordinary-user", checkout / "scripts")
    read = f"id -u; pwd; cat {checkout}/pyproject.toml; ls {closed}"
    done = subprocess.run(
        [script, "1001", "sh", "-c", read], capture_output=True, text=True, timeout=60, cwd=checkout, check=True
    )
    assert done.stdout.split() == ["1001", str(checkout), "found", "checkout"]
