"""The promises in short: few rounds, and limits that a busy machine keeps too. `make bench` has the real ones."""

import pytest

from benchmarks import p1_start, p2_restart, p9_proxy

P1_LIMIT, P2_LIMIT = 0.5, 0.2
P9_LIMITS = {"trivial execute": 1.5, "100 MB of output": 2.0}


@pytest.mark.bubblewrap
async def test_a_new_kernel_answers_sooner_than_a_plain_one() -> None:
    """With a sandbox prepared the first reply takes at most half of what a plain kernel takes."""
    prepared, empty = await p1_start.measure(rounds=3, engines=["template"])
    assert prepared.ratio <= P1_LIMIT, prepared.to_json()
    assert empty.ours.median > prepared.ours.median


@pytest.mark.bubblewrap
async def test_a_restart_has_the_libraries_at_once() -> None:
    """A restart with torch, numpy and pandas ready takes at most a fifth of a plain one with its imports."""
    (restart,) = await p2_restart.measure(rounds=3, engines=["template"])
    assert restart.ratio <= P2_LIMIT, restart.to_json()


async def test_the_proxy_costs_little() -> None:
    """A trivial execute, and 100 MB of output, take little longer through the proxy."""
    for row in await p9_proxy.measure(rounds=3):
        assert row.ratio <= P9_LIMITS[row.what], row.to_json()
