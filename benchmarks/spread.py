"""What a warm cell and its values cost on one to eight ranks, beside ipyparallel: measured, as a table, as a picture.

`python -m benchmarks --ranks` stores `ranks-DATE.json`, of which the reference page has both.
"""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.ranks import Pair, pair

NAME = "ranks"
IMAGE = results.TOP / "docs" / "images" / "sending.svg"
BEGIN, END = "<!-- ranks:begin -->", "<!-- ranks:end -->"

RANKS = (1, 2, 4, 8)
SIZES_BYTES = (10**3, 10**5, 10**7, 10**8, 10**9)
SMALL_BYTES = 10**7
TIMES, TIMES_LARGE = 7, 3
TRIVIAL_TIMES = 20
ROOM = 3
"""A size is left out where less than this many times what all engines take of it is free."""


async def run(sizes: tuple[int, ...] = SIZES_BYTES) -> int:
    """Measure, store, and put it into the documents; 0."""
    at, found, left_out = results.now(), [], {}
    async with pair() as both:
        for ranks in RANKS:
            await both.started(ranks)
            found.append(await _trivial(both, ranks))
            for size in sizes:
                free = 1024 * int(machine.field("/proc/meminfo", "MemAvailable").split()[0])
                if free < ROOM * size + (ranks + 1) * size:
                    left_out[f"{_size(size)} to {ranks}"] = f"{free / 2**30:.0f} GiB of memory are too little"
                    continue
                print(f"{_size(size)} to {ranks} …", file=sys.stderr, flush=True)
                found.append(await _sent(both, ranks, size))
            await both.ended()
    content = {
        "format": results.FORMAT,
        "at": at,
        "commit": machine.commit(),
        "machine": machine.describe(),
        "costs": found,
        "left_out": left_out,
    }
    (results.RESULTS / f"{NAME}-{at[:10]}.json").write_text(json.dumps(content, indent=1) + "\n")
    write()
    return 0


async def _trivial(both: Pair, ranks: int) -> dict[str, Any]:
    await both.trivial(ranks)
    samples = [await both.trivial(ranks) for _ in range(TRIVIAL_TIMES)]
    return _row(ranks, 0, [ours for ours, _ in samples], [theirs for _, theirs in samples])


async def _sent(both: Pair, ranks: int, size: int) -> dict[str, Any]:
    await both.filled(size)
    times = TIMES if size <= SMALL_BYTES else TIMES_LARGE
    samples = [
        (await both.sent(ranks, number, size), await both.pushed(ranks, number, size)) for number in range(times + 1)
    ]
    return _row(ranks, size, [ours for ours, _ in samples[1:]], [theirs for _, theirs in samples[1:]])


def _row(ranks: int, size: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    return {
        "ranks": ranks,
        "bytes": size,
        "n": len(ours),
        "remote_s": [round(one, 5) for one in ours],
        "ipyparallel_s": [round(one, 5) for one in theirs],
    }


def newest(directory: Path = results.RESULTS) -> dict[str, Any] | None:
    """The newest that is stored, if there is one."""
    found = sorted(directory.glob(f"{NAME}-*.json"))
    return json.loads(found[-1].read_text()) if found else None


def write() -> None:
    """Draw the newest, and put its table into the reference page."""
    content = newest()
    if content is not None:
        draw(content, IMAGE)
        results.PAGE.write_text(page(results.PAGE.read_text(), content))


def page(document: str, content: Mapping[str, Any]) -> str:
    """The document with the table of this measurement."""
    return results.replaced(document, table(content), begin=BEGIN, end=END)


def table(content: Mapping[str, Any]) -> str:
    """A line for each size, with both times and their ratio for each number of ranks; then when and where."""
    rows = {(row["bytes"], row["ranks"]): row for row in content["costs"]}
    ranks = sorted({number for _, number in rows})
    lines = [
        f"| | {' | '.join(_ranks(number) for number in ranks)} |",
        f"|---|{'--:|' * len(ranks)}",
    ]
    for size in sorted({size for size, _ in rows}):
        cells = [_cell(rows[size, number]) if (size, number) in rows else "–" for number in ranks]
        lines.append(f"| {_size(size)} | {' | '.join(cells)} |")
    made = f"Medians of `%%remote` / ipyparallel (ratio); {content['at'][:10]}, on "
    left_out = [f"Left out: {what}, since {why}." for what, why in content["left_out"].items()]
    return "\n".join([*lines, "", " ".join([f"{made}{machine.sentence(content['machine'])}.", *left_out])])


def draw(content: Mapping[str, Any], path: Path) -> None:
    """The picture of what is stored; the same bytes for the same content."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "warmcell", "svg.fonttype": "none", "font.size": 9}):
        figure, both = pyplot.subplots(1, 2, figsize=(8, 3.8), layout="constrained", sharey=True)
        names = {"remote_s": "%%remote", "ipyparallel_s": "ipyparallel push"}
        for axes, (key, title) in zip(both, names.items(), strict=True):
            for ranks, mark in zip(RANKS, "os^D", strict=True):
                rows = [row for row in content["costs"] if row["ranks"] == ranks and row["bytes"]]
                medians = [statistics.median(row[key]) for row in rows]
                axes.plot([row["bytes"] / 10**6 for row in rows], medians, marker=mark, label=_ranks(ranks))
            axes.set(xscale="log", yscale="log", xlabel="MB sent", title=title)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
            axes.grid(visible=True, which="major", alpha=0.3)
        both[0].set_ylabel("seconds")
        both[1].legend()
        figure.suptitle(f"{content['at'][:10]}, {machine.sentence(content['machine'])}", fontsize=6)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "warmcell benchmarks"})
        pyplot.close(figure)


def _cell(row: Mapping[str, Any]) -> str:
    ours, theirs = statistics.median(row["remote_s"]), statistics.median(row["ipyparallel_s"])
    return f"{_time(ours)} / {_time(theirs)} ({ours / theirs:.2f}×)"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' if number > 1 else ''}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _size(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return "`pass`" if not size else f"{size} B"
