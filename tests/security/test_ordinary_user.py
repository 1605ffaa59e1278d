"""The same for an ordinary user's sandboxes: root becomes one and runs the other files of this folder."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser
from tests.lanes import TOP

TIMEOUT_S = 600


@pytest.mark.user
@pytest.mark.timeout(TIMEOUT_S + 20)
async def test_an_ordinary_users_sandboxes_are_as_tight(ordinary_user: OrdinaryUser) -> None:
    """None of these tests fails; those of limits that only a control group can hold may be left out."""
    here = Path(__file__)
    process = await asyncio.create_subprocess_exec(
        *ordinary_user.argv(sys.executable, "-m", "pytest", "-q", str(here.parent), f"--ignore={here}"),
        stdout=asyncio.subprocess.PIPE,
        env=dict(ordinary_user.env),
        cwd=TOP,
    )
    stdout, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    said = stdout.decode()
    assert process.returncode == 0, said
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) >= 30, said
