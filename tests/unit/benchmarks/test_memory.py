"""What processes take, looked at for those who may not look themselves."""

import os
import subprocess
import sys

import pytest

from benchmarks import memory
from tests.lanes import TOP, as_ordinary_user

ASK = "import sys; from benchmarks.memory import WHOLE, memory_bytes; print(memory_bytes(int(sys.argv[1]), WHOLE))"


@pytest.mark.root
@pytest.mark.user
def test_root_looks_for_an_ordinary_user() -> None:
    """A child of ours hears of a process of root's what root sees; without that it is an error."""
    ask = as_ordinary_user(sys.executable, "-c", ASK, str(os.getpid()))
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(TOP), "PYTHONDONTWRITEBYTECODE": "1"}
    with memory.looker() as (fd, variable):
        for _ in range(2):
            said = subprocess.run(ask, env={**env, **variable}, pass_fds=[fd], capture_output=True, check=True).stdout
            assert float(said) == pytest.approx(memory.memory_bytes(os.getpid(), memory.WHOLE), rel=0.5)
    refused = subprocess.run(ask, env=env, capture_output=True, text=True)
    assert "may not be looked at" in refused.stderr
