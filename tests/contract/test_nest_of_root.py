"""The contract for sandboxes of root's that kernels of a template's process can enter; the file beside has users'."""

import asyncio
import json
import os
import sys

import pytest

from tests.lanes import TOP

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root]

TIMEOUT_S = 240.0


@pytest.mark.timeout(TIMEOUT_S + 20)
async def test_a_nest_takes_no_promise_away() -> None:
    """What holds for root's sandboxes holds for those whose root is nobody but the guest."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "warmcell.sandbox.testing.contract", "tests.contract.nested:make"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(TOP)},
        cwd="/",
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    results = [json.loads(line) for line in stdout.splitlines()]
    broken = [f"{result['check']}: {result['why']}" for result in results if not result["ok"]]
    assert not broken, "\n".join(broken)
    assert process.returncode == 0, stderr.decode()
    assert len(results) >= 60
