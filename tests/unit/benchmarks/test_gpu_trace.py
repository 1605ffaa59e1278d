"""The replay of a day of notebooks: what it adds up, and what giving GPUs back is worth in it."""

import statistics

import pytest

from benchmarks.gpu_trace import (
    CELL_MEDIAN_S,
    PLAIN_START_S,
    POLICIES,
    SEEDS,
    Policy,
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


def test_a_sign_ahead_of_the_cell_hides_the_way_back() -> None:
    """By as much as it comes before the cell, if it comes while the kernel is parked and before it is parked again."""
    day = [Session(0.0, ((600.0, 60.0),), 3600.0)]

    def delays(ahead_s: float) -> list[float]:
        policy = Policy("", 60.0, 60.0, give_back_s=3.0, come_back_s=3.0, sign_s=lambda chance: ahead_s)
        return Run(day, GPU, policy).go().wake_delays_s

    assert (delays(0.0), delays(2.0), delays(10.0)) == ([3.0], [1.0], [0.0])
    assert delays(100.0) == [3.0]  # Given back again, after a minute in which nothing ran.


def test_coming_back_brings_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever touches a notebook that was left has its kernel on its way, or not parked just then."""

    def run(thought: float, back_s: float, looks_s: float | None = None) -> Run:
        day = [Session(0.0, ((thought, 60.0),), 3600.0)]
        monkeypatch.setattr("benchmarks.gpu_trace.returning", lambda chance: back_s)
        monkeypatch.setattr("benchmarks.gpu_trace.LOOKS_AROUND", float(looks_s is not None))
        monkeypatch.setattr("random.Random.uniform", lambda self, a, b: thought - (looks_s or 0.0))
        policy = Policy("", 300.0, give_back_s=3.0, come_back_s=3.0, sign_s=lambda chance: 1.0, heeds_returns=True)
        return Run(day, GPU, policy).go()

    assert [run(600.0, back_s).wake_delays_s for back_s in (0.0, 1.0, 60.0)] == [[2.0], [1.0], [0.0]]
    assert run(330.0, 60.0).wake_delays_s == []  # It was not parked 30 s before its cell.
    assert run(600.0, 0.0, 100.0).wake_delays_s == [0.0]


def test_a_sign_takes_a_gpu_from_nobody() -> None:
    """While somebody else has the only one, it changes nothing; the cell then waits as it would have."""
    first, second = Session(0.0, ((600.0, 60.0),), 0.0), Session(100.0, ((1.0, 5000.0),), 0.0)
    told = []
    for sign_s in (None, lambda chance: 10.0):
        policy = Policy("", 60.0, 60.0, give_back_s=3.0, come_back_s=3.0, sign_s=sign_s)
        told.append(Run([first, second], GPU[:1], policy).go().wake_delays_s)
    assert told[0] == told[1] != []


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
    rows = {row["policy"]: row for row in parking}
    at_cell = f"parked after {Warmcell().park_after:.0f} s with 16 GiB"
    assert rows[at_cell]["given_back"] >= 0.9
    assert [row["wake_delay_p95_s"] <= 0.3 * PLAIN_START_S for row in parking[:4]] == [True, True, False, False]
    for which in ("", ", a fifth run as they stand"):
        back = rows[f"{at_cell}, woken by typing{which}, or by coming back"]
        assert back["given_back"] >= 0.8
        assert back["wake_delay_p95_s"] <= 0.3 * PLAIN_START_S
    typed = rows[f"{at_cell}, woken by typing"]
    assert typed["given_back"] >= rows[at_cell]["given_back"] - 0.01
    assert typed["wake_delay_p95_s"] < 0.5 * rows[at_cell]["wake_delay_p95_s"]
    assert asked["start_wait_p95_s"] < never["start_wait_p95_s"]
