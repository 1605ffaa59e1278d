"""What a run of the tests says about lanes that the machine does not have."""

import subprocess
import sys

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
