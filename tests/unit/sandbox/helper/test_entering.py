"""What enters a sandbox finds that it has ended."""

import subprocess

import pytest

from warmcell.sandbox.helper import enter
from warmcell.sandbox.helper.places import Place
from warmcell.sandbox.helper.problems import HelperError


def test_the_limits_of_a_sandbox_that_has_ended() -> None:
    """That is said, and not which file is not there; processes that have ended are passed over."""
    with subprocess.Popen(["true"]) as ended:
        pass
    with pytest.raises(HelperError, match="has ended"):
        enter.hold_limits(Place(ended.pid, -1, {}), [])
    with subprocess.Popen(["sleep", "600"]) as living:
        enter.hold_limits(Place(living.pid, -1, {}), [ended.pid])
        living.kill()
