"""The tables that documents show of many sandboxes for agents."""

from typing import Any

import pytest

from benchmarks import agents_page, results

MACHINE = {"cpu": "C", "cores": 2, "memory_gib": 4.0, "linux": "6", "python": "3"}
TIMES = {"n": 100, "median_s": 0.05, "p95_s": 0.5, "p99_s": 2.0}


def measured(**changes: Any) -> dict[str, Any]:
    return {
        "at": "2026-01-02T03:04:05+00:00",
        "machine": {**MACHINE, "packages": {"ipykernel": "7", "torch": "2"}},
        "first_commands": [
            {
                "backend": "bubblewrap",
                "sequential": TIMES,
                "sequential_until_gone": TIMES,
                "burst": {**TIMES, "per_second": 33.3, "phases_ms": {"queue": 1.0}},
            }
        ],
        "docker_run": {"sequential": TIMES, "burst": {**TIMES, "per_second": 3.0}},
        "idle": {
            "asked": 1000,
            "made": 900,
            "left_out": "less than 2 GiB of memory are left",
            "per_second": 5.0,
            "memory_bytes_each": 18_000_000,
            "keeper_busy_pct": 0.7,
            "answer": TIMES,
        },
        "forks": [
            {
                "clones": 64,
                "all_answered_s": 3.0,
                "plain_start_with_imports_s": 6.0,
                "ratio": 0.5,
                "phases_ms": {"create": 50.0, "restore": 40.0},
            }
        ],
        **changes,
    }


def test_all_that_was_measured_is_told() -> None:
    """Times to the first command beside Docker's, what waiting takes, how long forks take, when and where."""
    lines = agents_page.tables(measured()).splitlines()
    assert "| bubblewrap: one after another | 100 | 50 ms | 500 ms | 2.0 s | 20.0 |" in lines
    assert "| bubblewrap: at once | 100 | 50 ms | 500 ms | 2.0 s | 33.3 |" in lines
    assert "| `docker run --rm`: at once, until it is gone | 100 | 50 ms | 500 ms | 2.0 s | 3.0 |" in lines
    assert any(line.startswith("| 900 of 1000: less than 2 GiB of memory are left | 18.0 MB |") for line in lines)
    assert "| 64 | 3.0 s | 6.0 s | **0.50×** (≤ 0.6×) | create 50 ms, restore 40 ms |" in lines
    assert lines[-1].startswith("2026-01-02, on C, 2 cores")


@pytest.mark.parametrize("left_out", ["first_commands", "idle", "forks"])
def test_what_was_not_measured_is_not_told(left_out: str) -> None:
    """A run of a part has the tables of that part; where there is no Docker there are no rows of it."""
    content = measured(docker_run=None)
    del content[left_out]
    told = agents_page.tables(content)
    assert "docker" not in told
    assert told.count("|---") == 2


def test_the_page_shows_the_newest() -> None:
    """There is a place for it, and what is there is what was stored last."""
    content = agents_page.newest()
    document = results.PAGE.read_text()
    assert agents_page.page(document, measured()) != document
    if content is not None:
        assert agents_page.page(document, content) == document, "run: python -m benchmarks --tables"
