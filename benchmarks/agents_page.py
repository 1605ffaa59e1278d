"""The reference page's tables of many sandboxes for agents, made from what `benchmarks.agents` has stored."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, results

NAME = "agents"
BEGIN, END = "<!-- agents:begin -->", "<!-- agents:end -->"
GOALS: Mapping[int, float] = {64: 0.6}
"""Most of a plain start with its imports that so many clones may take."""


def newest(directory: Path = results.RESULTS) -> dict[str, Any] | None:
    """The newest that is stored, if there is one."""
    found = sorted(directory.glob(f"{NAME}-*.json"))
    return json.loads(found[-1].read_text()) if found else None


def write() -> None:
    """Put the newest into the reference page."""
    content = newest()
    if content is not None:
        results.PAGE.write_text(page(results.PAGE.read_text(), content))


def page(document: str, content: Mapping[str, Any]) -> str:
    """The document with the tables of this measurement."""
    return results.replaced(document, tables(content), begin=BEGIN, end=END)


def tables(content: Mapping[str, Any]) -> str:
    """Of all that was measured, then when and where."""
    parts = []
    if "first_commands" in content:
        parts.append(_table("| | n | median | p95 | p99 | per second |", _first(content)))
    if "idle" in content:
        parts.append(
            _table("| that wait | memory of each | made per second | keeper | answer: median, p99 |", _idle(content))
        )
    if "forks" in content:
        parts.append(_table("| clones | all have answered | plain start | ratio (goal) | phases |", _forks(content)))
    made = f"{content['at'][:10]}, on {machine.sentence(content['machine'])}."
    return "\n\n".join([*parts, made])


def _table(head: str, rows: Iterator[Sequence[str]]) -> str:
    columns = head.count("|") - 1
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|--:" * (columns - 1) + "|", *lines])


def _first(content: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for found in content["first_commands"]:
        name = found["backend"]
        yield _row(f"{name}: one after another", found["sequential"])
        yield _row(f"{name}: one after another, until it is gone", found["sequential_until_gone"])
        yield _row(f"{name}: at once", found["burst"])
    if content["docker_run"] is not None:
        yield _row("`docker run --rm`: one after another, until it is gone", content["docker_run"]["sequential"])
        yield _row("`docker run --rm`: at once, until it is gone", content["docker_run"]["burst"])


def _row(what: str, found: Mapping[str, Any]) -> Sequence[str]:
    times = [_time(found[f"{name}_s"]) for name in ("median", "p95", "p99")]
    rate = found.get("per_second", 1 / found["median_s"])
    return [what, str(found["n"]), *times, f"{rate:.1f}"]


def _idle(content: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    found = content["idle"]
    count = f"{found['made']}" if not found["left_out"] else f"{found['made']} of {found['asked']}: {found['left_out']}"
    yield [
        count,
        f"{found['memory_bytes_each'] / 10**6:.1f} MB",
        f"{found['per_second']:.1f}",
        f"{found['keeper_busy_pct']:.1f} % of a processor",
        f"{_time(found['answer']['median_s'])}, {_time(found['answer']['p99_s'])}",
    ]


def _forks(content: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for found in content["forks"]:
        goal = GOALS.get(found["clones"])
        yield [
            str(found["clones"]),
            _time(found["all_answered_s"]),
            _time(found["plain_start_with_imports_s"]),
            f"**{found['ratio']:.2f}×**" + ("" if goal is None else f" (≤ {goal}×)"),
            ", ".join(f"{name} {ms:.0f} ms" for name, ms in found["phases_ms"].items()),
        ]


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
