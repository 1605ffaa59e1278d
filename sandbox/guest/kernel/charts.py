"""What is in a figure of matplotlib, as the charts that E2B's clients draw anew.

A chart is told for each pair of axes: lines, points, bars, a pie, or boxes with whiskers; anything else is `unknown`,
with its title alone. Axes that bars or boxes stand on are told as the x axis, also where they lie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

ELEMENTS_MAX = 100_000
"""Of all points in a figure. One with more is told as a picture alone."""

NEAR = 1e-6
MISSING = ("NaTType", "NAType")
"""What pandas has where there is nothing."""

UNIT = re.compile(r"[(\[](.*?)[)\]]")


class TooManyError(Exception):
    """More points than are told."""


def chart_of(figure: Any) -> dict[str, Any] | None:
    """The charts in a figure; None where there are none, or more than is told."""
    try:
        charts = [_Axes(axes).chart() for axes in figure.axes]
    except TooManyError:
        return None
    if len(charts) < 2:
        return charts[0] if charts else None
    heading = getattr(figure, "_suptitle", None)
    return {"type": "superchart", "title": heading.get_text() if heading is not None else None, "elements": charts}


def plain(value: Any) -> Any:
    """A value as JSON has it; times as ISO has them, and no number that is none."""
    if type(value).__name__ in MISSING:
        return None
    if getattr(getattr(value, "dtype", None), "kind", "") == "M":
        return str(value.astype("datetime64[s]"))
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "item") and hasattr(value, "dtype"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


class _Axes:
    """One pair of axes, and what is drawn on it."""

    def __init__(self, axes: Any) -> None:
        from matplotlib.container import BarContainer, ErrorbarContainer

        self.axes = axes
        errors = [one for one in axes.containers if isinstance(one, ErrorbarContainer)]
        aside = {id(artist) for one in errors for group in one.lines[1:] for artist in group}
        # A line across all of it, as of `axhline`, is no data.
        across = axes.transData
        self.lines = [one for one in axes.lines if id(one) not in aside and one.get_transform() == across]
        self.collections = [one for one in axes.collections if id(one) not in aside]
        self.bars = [one for one in axes.containers if isinstance(one, BarContainer)]

    def chart(self) -> dict[str, Any]:
        """What it is, with what is in it."""
        from matplotlib.collections import PathCollection
        from matplotlib.patches import PathPatch, Rectangle, Wedge

        patches = list(self.axes.patches)
        if self.axes.images or self.axes.tables:
            return self._told("unknown", [])
        if patches and not self.collections:
            if all(isinstance(one, PathPatch) for one in patches):
                return self._boxes(patches)
            if not self.lines and all(isinstance(one, Wedge) for one in patches):
                return self._told("pie", [_wedge(one) for one in patches])
            if not self.lines and self.bars and all(isinstance(one, Rectangle) for one in patches):
                return self._bars()
        elif not patches and self.lines and not self.collections:
            return self._points("line", self._of_lines())
        elif not patches and self.collections and not self.lines and self._are(PathCollection):
            return self._points("scatter", self._of_collections())
        return self._told("unknown", [])

    def _are(self, kind: type) -> bool:
        return all(isinstance(one, kind) for one in self.collections)

    def _told(self, kind: str, elements: list[Any], **more: Any) -> dict[str, Any]:
        if sum(len(one.get("points", ())) or 1 for one in elements) > ELEMENTS_MAX:
            raise TooManyError
        return {"type": kind, "title": self.axes.get_title() or None, **more, "elements": elements}

    def _labels(self, *, lying: bool = False) -> dict[str, Any]:
        names = [self.axes.get_xlabel() or None, self.axes.get_ylabel() or None]
        told: dict[str, Any] = {}
        for axis, name in zip("xy", reversed(names) if lying else names):
            unit = UNIT.search(name or "")
            told[f"{axis}_label"], told[f"{axis}_unit"] = name, unit[1] if unit else None
        return told

    def _points(self, kind: str, elements: list[Any]) -> dict[str, Any]:
        more = self._labels()
        for name in "xy":
            axis = getattr(self.axes, f"{name}axis")
            ticks, labels = _ticks(axis)
            more[f"{name}_tick_labels"], more[f"{name}_scale"] = labels, _scale(axis, ticks, labels)
            more[f"{name}_ticks"] = [_date(tick) if _is_dated(axis) else float(tick) for tick in ticks]
        return self._told(kind, elements, **more)

    def _of_lines(self) -> list[Any]:
        return [
            {
                "label": _named(line, f"Line {number}"),
                "points": [[plain(x), plain(y)] for x, y in _counted(line.get_xdata(), line.get_ydata())],
            }
            for number, line in enumerate(self.lines)
        ]

    def _of_collections(self) -> list[Any]:
        dated = [_is_dated(axis) for axis in (self.axes.xaxis, self.axes.yaxis)]

        def place(value: Any, is_date: bool) -> Any:
            return _date(value) if is_date and plain(value) is not None else plain(float(value))

        return [
            {
                "label": _named(one, f"Group {number}"),
                "points": [
                    [place(x, dated[0]), place(y, dated[1])] for x, y in _counted(*one.get_offsets().filled(math.nan).T)
                ],
            }
            for number, one in enumerate(self.collections)
        ]

    def _bars(self) -> dict[str, Any]:
        elements = []
        lying = any(getattr(one, "orientation", None) == "horizontal" for one in self.bars)
        axis = self.axes.yaxis if lying else self.axes.xaxis
        for number, bars in enumerate(self.bars):
            group = _named(bars, f"Group {number}")
            for bar in bars:
                begin, size = (bar.get_y(), bar.get_height()) if lying else (bar.get_x(), bar.get_width())
                value = plain(bar.get_width() if lying else bar.get_height())
                elements.append({"label": _label(axis, begin, begin + size), "group": group, "value": value})
        return self._told("bar", elements, **self._labels(lying=lying))

    def _boxes(self, patches: Sequence[Any]) -> dict[str, Any]:
        for lying in (False, True):
            axis = self.axes.yaxis if lying else self.axes.xaxis
            elements = [_box(patch, self.lines, axis, lying=lying) for patch in patches]
            if None not in elements:
                return self._told("box_and_whisker", elements, **self._labels(lying=lying))
        return self._told("unknown", [])


def _wedge(wedge: Any) -> dict[str, Any]:
    label = wedge.get_label()
    angle = abs(round(float(wedge.theta2 - wedge.theta1), 4))
    return {"label": "" if label.startswith("_") else label, "angle": angle, "radius": float(wedge.r)}


def _box(patch: Any, lines: Iterable[Any], axis: Any, *, lying: bool) -> dict[str, Any] | None:
    """One box: its sides, the line across it, those that lead away from it, and single points; None: it is no such."""
    corners = patch.get_path().vertices
    side, along = (1, 0) if lying else (0, 1)
    left, right = float(corners[:, side].min()), float(corners[:, side].max())
    low, high = float(corners[:, along].min()), float(corners[:, along].max())
    near = NEAR * max(1.0, abs(low), abs(high))
    median, widest = None, 0.0
    found: dict[str, float] = {}
    outliers: list[float] = []
    for line in lines:
        data = [[float(value) for value in line.get_data(orig=False)[which]] for which in (side, along)]
        if not data[0] or min(data[0]) < left - near or max(data[0]) > right + near:
            continue
        begin, end, width = min(data[1]), max(data[1]), max(data[0]) - min(data[0])
        if line.get_linestyle() in ("None", "none", "", " "):
            outliers += data[1]
        elif len(data[0]) == 2 and end - begin <= near and low - near <= begin <= high + near and width > widest:
            median, widest = begin, width  # The cap of a whisker without length is shorter.
        elif len(data[0]) == 2 and width <= near and abs(end - low) <= near:
            found["min"] = begin
        elif len(data[0]) == 2 and width <= near and abs(begin - high) <= near:
            found["max"] = end
    if median is None or len(found) < 2:
        return None
    quartiles = {"first_quartile": low, "median": median, "third_quartile": high}
    return {"label": _label(axis, left, right), **found, **quartiles, "outliers": outliers}


def _counted(xs: Any, ys: Any) -> Iterable[tuple[Any, Any]]:
    if len(xs) > ELEMENTS_MAX:
        raise TooManyError
    return zip(xs, ys)


def _named(artist: Any, instead: str) -> str:
    label = str(artist.get_label())
    return instead if not label or label.startswith("_") else label


def _ticks(axis: Any) -> tuple[list[Any], list[str]]:
    ticks = list(axis.get_majorticklocs())
    labels = [one.get_text() for one in axis.get_majorticklabels()]
    if not any(labels):  # It was never drawn.
        labels = list(axis.get_major_formatter().format_ticks(ticks))
    return ticks, labels


def _label(axis: Any, begin: float, end: float) -> str:
    """The label of what stands there: of the tick below it, or else where that is."""
    middle = (begin + end) / 2
    ticks = [(abs(float(tick) - middle), label) for tick, label in zip(*_ticks(axis))]
    distance, label = min(ticks, default=(math.inf, ""))
    if label and distance <= abs(end - begin) / 2 + NEAR:
        return label
    return _date(middle) if _is_dated(axis) else f"{middle:g}"


def _converter(axis: Any) -> str:
    found = axis.get_converter() if hasattr(axis, "get_converter") else axis.converter
    return type(found).__name__


def _is_dated(axis: Any) -> bool:
    return "Date" in _converter(axis)


def _date(number: Any) -> str:
    from matplotlib import dates

    found: Any = dates
    return str(found.num2date(float(number)).isoformat())


def _scale(axis: Any, ticks: Sequence[Any], labels: Sequence[str]) -> str:
    if _is_dated(axis):
        return "datetime"
    counted = bool(ticks) and all(
        float(tick) == number and label != str(number) for number, (tick, label) in enumerate(zip(ticks, labels))
    )
    scale = str(axis.get_scale())
    return "categorical" if scale == "linear" and ("Category" in _converter(axis) or counted) else scale
