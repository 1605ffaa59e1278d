"""Figures are told as the charts that were drawn, in the form in which E2B's clients read them."""

import datetime
import json
import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from warmcell.sandbox.guest.kernel import charts, displays

mpl.use("Agg")


@pytest.fixture
def figure() -> Any:
    """An empty one."""
    return Figure()


def told(figure: Any) -> Any:
    """Its chart as it goes over the wire."""
    return json.loads(json.dumps(charts.chart_of(figure), allow_nan=False))


def test_lines_are_points_with_their_axes(figure: Any) -> None:
    """Labels, units, ticks and scales; lines across everything and error bars are no lines; no number is null."""
    axes = figure.subplots()
    axes.plot([1, 10, 100], [0.5, math.nan, 2], label="first")
    axes.errorbar([1, 2], [3, 4], yerr=0.5)
    axes.axhline(1)
    axes.set(title="A title", xlabel="Time (s)", ylabel="Speed [m/s]", xscale="log")
    chart = told(figure)
    assert (chart["type"], chart["title"]) == ("line", "A title")
    assert (chart["x_label"], chart["x_unit"], chart["y_unit"]) == ("Time (s)", "s", "m/s")
    assert (chart["x_scale"], chart["y_scale"]) == ("log", "linear")
    assert [one["label"] for one in chart["elements"]] == ["first", "Line 1"]
    assert chart["elements"][0]["points"] == [[1, 0.5], [10, None], [100, 2]]
    assert len(chart["y_ticks"]) == len(chart["y_tick_labels"]) > 2
    assert "1" in "".join(chart["y_tick_labels"])


def test_times_and_names_are_what_they_were(figure: Any) -> None:
    """Dates of every kind in ISO's form; categories by name."""
    dated, named = figure.subplots(1, 2)
    days = [datetime.date(2030, 1, day) for day in (1, 2)]
    dated.plot(days, [1, 2])
    dated.plot(np.array(days, dtype="datetime64[ns]"), [1, 2])
    named.scatter(["a", "b"], [1, 2])
    figure.suptitle("Both")
    both = told(figure)
    assert (both["type"], both["title"]) == ("superchart", "Both")
    lines, points = both["elements"]
    assert (lines["x_scale"], points["x_scale"]) == ("datetime", "categorical")
    assert lines["elements"][0]["points"][0] == ["2030-01-01", 1]
    assert lines["elements"][1]["points"][0] == ["2030-01-01T00:00:00", 1]
    assert lines["x_ticks"][0].startswith(("2029-", "2030-"))
    assert points["type"] == "scatter"
    assert points["elements"] == [{"label": "Group 0", "points": [[0, 1], [1, 2]]}]
    assert points["x_tick_labels"] == ["a", "b"]


@pytest.mark.parametrize("lying", [False, True])
def test_bars_have_labels_groups_and_values(figure: Any, lying: bool) -> None:
    """The names below them and their groups, standing or lying; what they stand on is the x axis."""
    axes = figure.subplots()
    draw, ticks = (axes.barh, axes.set_yticks) if lying else (axes.bar, axes.set_xticks)
    draw([-0.2, 0.8], [3, 5], 0.4, label="A")
    draw([0.2, 1.2], [4, 4], 0.4)
    ticks([0, 1], ["one", "two"])
    axes.set(**{"ylabel" if lying else "xlabel": "kinds", "xlabel" if lying else "ylabel": "count (n)"})
    chart = told(figure)
    assert (chart["type"], chart["x_label"], chart["y_unit"]) == ("bar", "kinds", "n")
    assert [(one["label"], one["group"], one["value"]) for one in chart["elements"]] == [
        ("one", "A", 3),
        ("two", "A", 5),
        ("one", "Group 1", 4),
        ("two", "Group 1", 4),
    ]


def test_pies_have_angles(figure: Any) -> None:
    """And labels, and a radius."""
    figure.subplots().pie([1, 3], labels=["a", "b"], radius=2, autopct="%d")
    chart = told(figure)
    assert chart["type"] == "pie"
    assert chart["elements"] == [
        {"label": "a", "angle": 90, "radius": 2},
        {"label": "b", "angle": 270, "radius": 2},
    ]


@pytest.mark.parametrize("lying", [False, True])
def test_boxes_have_quartiles_whiskers_and_outliers(figure: Any, lying: bool) -> None:
    """Of each box, standing or lying, also where a whisker has no length."""
    axes = figure.subplots()
    data = [[1, 2, 3, 4, 5, 40], [2, 2, 2, 3, 4]]
    drawn = axes.boxplot(data, patch_artist=True, **({"orientation": "horizontal"} if lying else {}))
    (axes.set_yticklabels if lying else axes.set_xticklabels)(["a", "b"])
    chart = told(figure)
    assert (chart["type"], len(drawn["boxes"])) == ("box_and_whisker", 2)
    assert chart["elements"] == [
        {
            "label": "a",
            "min": 1,
            "first_quartile": 2.25,
            "median": 3.5,
            "third_quartile": 4.75,
            "max": 5,
            "outliers": [40],
        },
        {"label": "b", "min": 2, "first_quartile": 2, "median": 2, "third_quartile": 3, "max": 4, "outliers": []},
    ]


def test_what_is_none_of_these_is_told_by_its_title(figure: Any) -> None:
    """Pictures, surfaces, mixtures; an empty figure is nothing at all, and neither is one with too many points."""
    assert charts.chart_of(figure) is None
    for draw in (
        lambda axes: axes.imshow(np.zeros((2, 2))),
        lambda axes: (axes.bar([1], [1]), axes.plot([1, 2], [1, 2])),
        lambda axes: axes.fill_between([1, 2], [1, 2]),
        lambda axes: axes.set_title("t"),
    ):
        figure.clear()
        axes = figure.subplots()
        draw(axes)  # type: ignore[no-untyped-call]
        assert told(figure) == {"type": "unknown", "title": axes.get_title() or None, "elements": []}
    figure.clear()
    figure.subplots().plot(np.zeros(charts.ELEMENTS_MAX + 1))
    assert charts.chart_of(figure) is None


def test_tables_are_told_by_column() -> None:
    """Every kind of value as JSON has it; none of a table that is too large."""
    frame = pd.DataFrame(
        {"n": [1, 2], 3: [0.5, math.nan], "at": pd.to_datetime(["2030-01-01", None]), "s": ["a", pd.NA]}
    )
    data = json.loads(json.dumps(displays.data_of(frame), allow_nan=False))
    assert data["n"] == [1, 2]
    assert data["3"] == [0.5, None]
    assert data["at"][0] == "2030-01-01T00:00:00"
    assert data["s"][0] == "a"
    assert data["at"][1] is data["s"][1] is None
    assert displays.data_of(pd.DataFrame(np.zeros((displays.CELLS_MAX + 1, 1)))) is None
