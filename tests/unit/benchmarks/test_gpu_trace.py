"""The replay of a day of notebooks: what it adds up, and what giving GPUs back is worth in it."""

import statistics

import pytest

from benchmarks.gpu_trace import (
    CELL_MEDIAN_S,
    PLAIN_START_S,
    POLICIES,
    SEEDS,
    Run,
    Session,
    generate,
    measure,
)
from warmcell.extension.config import Warmcell
from warmcell.sandbox.models import GIB, GpuDevice

GPU = (GpuDevice(uuid="GPU-sim-0", index=0, name="A100", memory_total_bytes=80 * GIB, simulated=True),)


def test_one_session_adds_up_by_hand() -> None:
    """Ten minutes of thought, a cell of one, and an hour of nothing: held for all of it, or for what is used."""
    day = [Session(0.0, ((600.0, 60.0),), 3600.0)]
    never, asked, always = (Run(day, GPU, policy).go() for policy in POLICIES[:3])
    assert (never.held_s, never.active_s, never.idle_s) == (4260.0, 60.0, 4200.0)
    assert asked.held_s == never.held_s
    assert always.held_s == 60.0 + 1.0 + (0.5 + 60.0 + 60.0) + 1.0
    assert always.wake_delays_s == [0.5]


def test_one_waits_for_the_other_or_has_it_make_room() -> None:
    """Two sessions and one GPU: the second starts at the end of the first, or once that has been idle for a minute."""
    day = [Session(0.0, (), 1000.0), Session(10.0, (), 1000.0)]
    never, asked = (Run(day, GPU, policy).go() for policy in POLICIES[:2])
    assert never.start_waits_s == [0.0, 990.0]
    assert asked.start_waits_s == [0.0, 50.0]


def test_the_generator_has_the_distributions_that_it_cites() -> None:
    """Medians and quarters of many days, and the same day for the same seed."""
    cells = [length for seed in range(30) for one in generate(seed) for _, length in one.cells]
    quarters = statistics.quantiles(cells, n=4)
    assert quarters[1] == pytest.approx(CELL_MEDIAN_S, rel=0.1)
    assert quarters[2] == pytest.approx(300.0, rel=0.1)
    assert generate(1) == generate(1) != generate(2)


@pytest.mark.parametrize("seed", SEEDS)
def test_most_of_what_is_held_idle_is_given_back(seed: int) -> None:
    """At least 70 % after a minute of idleness, with a wake-up that is within 0.3 of a plain start; no work is lost."""
    never, asked, always, *parking = measure(seed, gpus=8)
    assert never["used_gpu_hours"] == asked["used_gpu_hours"] == always["used_gpu_hours"]
    assert never["used_gpu_hours"] / never["held_gpu_hours"] < 0.19  # "idle for more than 81 % of the time"
    assert always["given_back"] >= 0.7
    assert always["wake_delay_p95_s"] <= 0.3 * PLAIN_START_S
    by_default = parking[-1]
    assert by_default["policy"] == f"parked after {Warmcell().park_after:.0f} s with 16 GiB"
    assert by_default["given_back"] >= 0.9
    assert [row["wake_delay_p95_s"] <= 0.3 * PLAIN_START_S for row in parking] == [True, True, False, False]
    assert asked["start_wait_p95_s"] < never["start_wait_p95_s"]
