"""The examples that use sandboxes run as they stand."""

import re
import subprocess
import sys

import pytest

from tests.lanes import TOP
from warmcell import Sandbox

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]


def test_rollouts_get_better_from_copies_of_the_best(at_home: None) -> None:
    """Two rounds of 16 copies each; the second does not end worse than the first; nothing is left of them."""
    done = subprocess.run(
        [sys.executable, str(TOP / "examples" / "rollouts.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rounds = re.findall(r"^round \d: 16 copies in \d+ ms, best reward (-\d+\.\d+), worst", done.stdout, re.M)
    assert len(rounds) == 2
    assert [float(one) for one in rounds] == sorted(float(one) for one in rounds)
    assert "found [" in done.stdout
    assert Sandbox.list(tags={"example": "rollouts"}) == []
