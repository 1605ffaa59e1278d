"""The guard against waiting in an event loop: it must catch our code and leave others' alone."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from blockbuster import BlockingError

import warmcell

PLANTED = """
import time
def nap(child):
    time.sleep(0.001)
def wait(child):
    child.wait()
"""


@pytest.mark.parametrize("name", ["nap", "wait"])
async def test_a_wait_of_ours_is_caught(name: str) -> None:
    """Code below the package's folder that sleeps, or waits for a process, in a loop raises."""
    namespace: dict[str, object] = {}
    exec(compile(PLANTED, str(Path(warmcell.__file__).parent / "sandbox" / "planted.py"), "exec"), namespace)
    planted = namespace[name]
    assert callable(planted)
    child = subprocess.Popen([sys.executable, "-c", ""])
    with pytest.raises(BlockingError):
        planted(child)
    await asyncio.to_thread(planted, child)
    assert child.wait(timeout=60) == 0


async def test_a_wait_of_a_test_is_not() -> None:
    """A test itself may run a process."""
    assert subprocess.run([sys.executable, "-c", ""], timeout=60).returncode == 0
