"""Results as files, and the tables that documents show of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks import machine
from benchmarks.rows import Row, Series

TOP = Path(__file__).parent.parent
RESULTS = TOP / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FORMAT = 1

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
            busy_pct=data.get("busy_pct"),
            rows=tuple(Row.from_json(row) for row in data["rows"]),
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
        for one in json.loads(path.read_text())["results"]:
            result = Result.from_json(one)
            if result.user not in found or result.at > found[result.user].at:
                found[result.user] = result
    return [found[user] for user in ("root", "ordinary") if user in found]


def short_table(results: Sequence[Result]) -> str:
    """For the README: medians, ratio, goal; then the machine. Empty without results."""
    if not results:
        return ""
    lines = [
        "| | | as | plain | Warmcell | ratio | must be | goal |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for result, row in _by_promise(results):
        lines.append(
            f"| {row.promise} | {row.what} | {_who(result)} "
            f"| {_time(row.baseline.median_s)} | {_time(row.ours.median_s)} | **{row.ratio:.2f}×** "
            f"| {_bound(row.limit)} | {_bound(row.goal)} |"
        )
    return "\n".join([*lines, "", _made(results)])


def long_table(results: Sequence[Result]) -> str:
    """For the reference page: p95, number of samples and parts too. Empty without results."""
    if not results:
        return ""
    lines = [
        "| | | as | plain: median, p95 | Warmcell: median, p95 | n | ratio | of which, in ms |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for result, row in _by_promise(results):
        parts = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in row.parts_s.items())
        lines.append(
            f"| {row.promise} | {row.what} | {_who(result)} | {_median_p95(row.baseline)} | {_median_p95(row.ours)} "
            f"| {len(row.ours.samples_s)} | **{row.ratio:.3f}×** | {parts} |"
        )
    return "\n".join([*lines, "", _made(results)])


def replaced(document: str, table: str) -> str:
    """The document with the table between its two markers.

    Raises:
        ValueError: The markers are not there.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no place for the table between {BEGIN} and {END}")
    return "\n".join([before + BEGIN, *([table] if table else []), END + after])


def documents(results: Sequence[Result]) -> Mapping[Path, str]:
    """The documents that show results, as they should be."""
    readme, page = TOP / "README.md", TOP / "docs" / "reference" / "benchmarks.md"
    return {
        readme: replaced(readme.read_text(), short_table(results)),
        page: replaced(page.read_text(), long_table(results)),
    }


def _by_promise(results: Sequence[Result]) -> list[tuple[Result, Row]]:
    """Both users' rows of a promise below each other."""
    pairs = [(result, row) for result in results for row in result.rows]
    order = list(dict.fromkeys((row.promise, row.what) for _, row in pairs))
    return sorted(pairs, key=lambda pair: order.index((pair[1].promise, pair[1].what)))


def _made(results: Sequence[Result]) -> str:
    """Where and when, once for users whose results were made together."""
    lines = dict.fromkeys(f"Medians; {result.date}, on {machine.sentence(dict(result.machine))}." for result in results)
    return "\n".join(lines)


def _who(result: Result) -> str:
    return "root" if result.user == "root" else "user"


def _time(seconds: float) -> str:
    if seconds < 0.01:
        return f"{1000 * seconds:.1f} ms"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _median_p95(series: Series) -> str:
    return f"{_time(series.median_s)}, {_time(series.p95_s)}"


def _bound(value: float | None) -> str:
    return "" if value is None else f"≤ {value:g}×"
