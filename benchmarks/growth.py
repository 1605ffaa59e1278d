"""The stored sweep in documents: a picture of what snapshots cost as state grows, and what mapped memory costs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine, results

NAME = "sweep"
IMAGE = results.TOP / "docs" / "images" / "snapshots.svg"
COSTS = ("first snapshot", "second snapshot", "resume → reply", "its pages copied")
BEGIN, END = "<!-- price:begin -->", "<!-- price:end -->"


def newest(directory: Path = results.RESULTS) -> dict[str, Any] | None:
    """The newest stored sweep, if there is one."""
    found = sorted(directory.glob(f"{NAME}-*.json"))
    return json.loads(found[-1].read_text()) if found else None


def write() -> None:
    """Draw the newest sweep, and put its table into the reference page."""
    content = newest()
    if content is not None:
        draw(content, IMAGE)
        results.PAGE.write_text(page(results.PAGE.read_text(), content))


def page(document: str, content: Mapping[str, Any]) -> str:
    """The document with the table of this sweep."""
    return results.replaced(document, price_table(content), begin=BEGIN, end=END)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """The picture of a stored sweep; the same bytes for the same content."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "warmcell", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        rows = content["costs"]
        for name, mark in zip(COSTS, "os^x", strict=True):
            axes.plot([row["state_mb"] for row in rows], [row[name] for row in rows], marker=mark, label=name)
        axes.set(xscale="log", yscale="log", xlabel="state in MB", ylabel="seconds", ylim=(0.02, None))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        axes.set_title(f"{content['at'][:10]}, {machine.sentence(content['machine'])}", fontsize=6)
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "warmcell benchmarks"})
        pyplot.close(figure)


def price_table(content: Mapping[str, Any]) -> str:
    """Seconds of using all of a state, by how it was restored; then when and where."""
    steps = ("before", "resume", "first time", "again")
    lines = [
        "| | restored memory is | before it was saved | resume → reply | first time after it | again |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for use in next(iter(content["price"].values())):
        for kind, uses in content["price"].items():
            seconds = " | ".join(f"{uses[use][step]:.2f} s" for step in steps)
            lines.append(f"| {use} | {kind} | {seconds} |")
    made = f"{content['at'][:10]}, on {machine.sentence(content['machine'])}."
    left_out = [f"Left out: {size}, since {why}." for size, why in content["left_out"].items()]
    return "\n".join([*lines, "", " ".join([made, *left_out])])
