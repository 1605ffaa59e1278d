"""Results as files, and the tables that documents show of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks import machine
from benchmarks.rows import ENGINES, Engine, Row, Series

TOP = Path(__file__).parent.parent
RESULTS = TOP / "benchmarks" / "results"
README, PAGE = TOP / "README.md", TOP / "docs" / "reference" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FORMAT = 2

User = Literal["root", "ordinary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The rows of one run as one kind of user, with the machine they were measured on."""

    user: User
    at: str
    """When it was begun, in UTC."""
    machine: Mapping[str, Any]
    load_before: float
    rows: Sequence[Row]
    absent: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured, as in "P3 with criu", and why."""
    busy_pct: float | None = None
    """How much of the processors others used just before; the load tells of an earlier measurement of ours as well."""

    @property
    def date(self) -> str:
        return self.at[:10]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "user": self.user,
            "at": self.at,
            "machine": dict(self.machine),
            "load_before": self.load_before,
            "busy_pct": self.busy_pct,
            "rows": [row.to_json() for row in self.rows],
            "absent": dict(self.absent),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        if data.get("format") != FORMAT:
            raise ValueError(f"a result of format {data.get('format')!r}; this reads {FORMAT}")
        return cls(
            user=data["user"],
            at=data["at"],
            machine=data["machine"],
            load_before=data["load_before"],
            busy_pct=data["busy_pct"],
            rows=tuple(Row.from_json(row) for row in data["rows"]),
            absent=data["absent"],
        )


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def store(results: Sequence[Result], name: str, *, commit: str, directory: Path = RESULTS) -> Path:
    """Write one run to `<name>-<date>.json`; a second run of the same day and name replaces the first."""
    path = directory / f"{name}-{results[0].date}.json"
    content = {"commit": commit, "results": [result.to_json() for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def newest(directory: Path = RESULTS) -> list[Result]:
    """Of each kind of user the newest stored result, root's first."""
    found: dict[str, Result] = {}
    for path in sorted(directory.glob("*.json")):
        for one in json.loads(path.read_text()).get("results", ()):  # A sweep has none.
            result = Result.from_json(one)
            if result.user not in found or result.at > found[result.user].at:
                found[result.user] = result
    return [found[user] for user in ("root", "ordinary") if user in found]


def short_table(results: Sequence[Result]) -> str:
    """For the README: medians, ratio and goal of each engine; then the machine. Empty without results."""
    if not results:
        return ""
    lines = [
        "| | | as | plain | with `criu` | ratio (goal) | with `template` only | ratio (goal) |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for (promise, what), result, rows in _by_promise(results):
        cells = []
        for engine in ENGINES:
            row = rows.get(engine, rows.get("any"))
            cells += [_value(row.ours), f"{_ratio(row)}{_goal(row)}"] if row is not None else ["", ""]
        baseline = next(iter(rows.values())).baseline
        lines.append(f"| {promise} | {what} | {_who(result)} | {_value(baseline)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_made(results)])


def long_table(results: Sequence[Result]) -> str:
    """For the reference page: p95, samples, parts, phases and sizes too, and what is absent. Empty without results."""
    if not results:
        return ""
    lines = [
        "| | | as | engine | baseline: median, p95 | Warmcell: median, p95 | cold | n | ratio (goal) "
        "| of which | phases | sizes |",
        "|---|---|---|---|--:|--:|--:|--:|--:|---|---|---|",
    ]
    for (promise, what), result, rows in _by_promise(results):
        for row in rows.values():
            sizes = ", ".join(f"{name} {_bytes(size)}" for name, size in row.sizes_bytes.items())
            lines.append(
                f"| {promise} | {what} | {_who(result)} | {row.engine} | {_median_p95(row.baseline)} "
                f"| {_median_p95(row.ours)} | {'' if row.cold is None else _value(row.cold)} | {len(row.ours.samples)} "
                f"| {_ratio(row)}{_goal(row)} | {_times(row.parts_s)} | {_times(row.phases_s)} | {sizes} |"
            )
    return "\n".join([*lines, "", *_made(results), *_absent(results)])


def replaced(document: str, table: str, *, begin: str = BEGIN, end: str = END) -> str:
    """The document with the table between its two markers.

    Raises:
        ValueError: The markers are not there.
    """
    before, found, rest = document.partition(begin)
    _, also, after = rest.partition(end)
    if not found or not also:
        raise ValueError(f"the document has no place for the table between {begin} and {end}")
    return "\n".join([before + begin, *([table] if table else []), end + after])


def documents(results: Sequence[Result]) -> Mapping[Path, str]:
    """The documents that show results, as they should be."""
    return {
        README: replaced(README.read_text(), short_table(results)),
        PAGE: replaced(PAGE.read_text(), long_table(results)),
    }


def _by_promise(results: Sequence[Result]) -> list[tuple[tuple[str, str], Result, dict[Engine, Row]]]:
    """Both users' rows of a promise below each other, and of each its rows by engine."""
    found: dict[tuple[str, str], dict[int, dict[Engine, Row]]] = {}
    for number, result in enumerate(results):
        for row in result.rows:
            found.setdefault((row.promise, row.what), {}).setdefault(number, {})[row.engine] = row
    return [(key, results[number], rows) for key, by_user in found.items() for number, rows in by_user.items()]


def _made(results: Sequence[Result]) -> list[str]:
    """Where and when, once for users whose results were made together."""
    lines = (f"Medians; {result.date}, on {machine.sentence(dict(result.machine))}." for result in results)
    return list(dict.fromkeys(lines))


def _absent(results: Sequence[Result]) -> list[str]:
    lines = [f"- {what}, as {_who(result)}: {why}" for result in results for what, why in result.absent.items()]
    return ["", "Not measured:", "", *lines] if lines else []


def _who(result: Result) -> str:
    return "root" if result.user == "root" else "user"


def _value(series: Series) -> str:
    return _time(series.median) if series.unit == "s" else _bytes(series.median)


def _median_p95(series: Series) -> str:
    written = _time if series.unit == "s" else _bytes
    return f"{written(series.median)}, {written(series.p95)}"


def _time(seconds: float) -> str:
    if seconds < 0.01:
        return f"{1000 * seconds:.1f} ms"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: float) -> str:
    mebibytes = size / 2**20
    return f"{mebibytes:.1f} MiB" if mebibytes < 10 else f"{mebibytes:.0f} MiB"


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_time(took)}" for name, took in seconds.items())


def _ratio(row: Row) -> str:
    return f"**{row.ratio:.2f}×**" if row.ratio >= 0.2 else f"**{row.ratio:.3f}×**"


def _goal(row: Row) -> str:
    return "" if row.goal is None else f" (≤ {row.goal:g}×)"
