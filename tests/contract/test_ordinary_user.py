"""The contract suite as an ordinary user: root becomes one for it."""

import asyncio
import json
import sys

import pytest

from tests.conftest import OrdinaryUser
from tests.lanes import TOP

TIMEOUT_S = 600


@pytest.mark.user
@pytest.mark.timeout(TIMEOUT_S + 20)
async def test_bubblewrap_keeps_every_promise_to_an_ordinary_user(ordinary_user: OrdinaryUser) -> None:
    """What holds for root's sandboxes holds for those of a user without any rights."""
    process = await asyncio.create_subprocess_exec(
        *ordinary_user.argv(sys.executable, "-m", "warmcell.sandbox.testing.contract", "bubblewrap"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(ordinary_user.env),
        cwd="/",
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    results = [json.loads(line) for line in stdout.splitlines()]
    broken = [f"{result['check']}: {result['why']}" for result in results if not result["ok"]]
    assert not broken, "\n".join(broken)
    assert process.returncode == 0, stderr.decode()
    assert len(results) >= 60


@pytest.mark.user
@pytest.mark.timeout(TIMEOUT_S + 20)
async def test_a_nest_takes_no_promise_away(ordinary_user: OrdinaryUser) -> None:
    """What holds for sandboxes holds for those that kernels of a template's process can enter."""
    process = await asyncio.create_subprocess_exec(
        *ordinary_user.argv(sys.executable, "-m", "warmcell.sandbox.testing.contract", "tests.contract.nested:make"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**ordinary_user.env, "PYTHONPATH": str(TOP)},
        cwd="/",
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    results = [json.loads(line) for line in stdout.splitlines()]
    broken = [f"{result['check']}: {result['why']}" for result in results if not result["ok"]]
    assert not broken, "\n".join(broken)
    assert process.returncode == 0, stderr.decode()
    assert len(results) >= 60


@pytest.mark.user
@pytest.mark.gvisor
async def test_a_backend_that_is_roots_alone_refuses_an_ordinary_user(ordinary_user: OrdinaryUser) -> None:
    """It declares so, says so with its cure, and makes nothing."""
    process = await asyncio.create_subprocess_exec(
        *ordinary_user.argv(sys.executable, "-m", "warmcell.sandbox.testing.contract", "gvisor"),
        *("--only", "an ordinary user"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(ordinary_user.env),
        cwd="/",
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    (result,) = [json.loads(line) for line in stdout.splitlines()]
    assert result["ok"], result["why"]
    assert process.returncode == 0, stderr.decode()
