"""Chart data read from figures that the real matplotlib drew (e2b.md 4.4: every key that clients index must exist)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from fumehood.agent import chart
from fumehood.agent.chart import chart_of

pytestmark = pytest.mark.data
TWO_D = {"type", "title", "elements", "x_label", "y_label", "x_unit", "y_unit"}
POINTS = TWO_D | {f"{a}_{k}" for a in "xy" for k in ("ticks", "tick_labels", "scale")}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def made() -> Any:
    found = chart_of(plt.gcf())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_a_line_chart_has_its_labels_units_ticks_and_points():
    plt.plot([1, 2, 3], [1, 4, 9], label="squares")
    plt.plot([1, 2], [0, float("nan")])
    plt.xlabel("Time (s)")
    plt.ylabel("Height [m]")
    plt.title("T")
    found = made()
    assert set(found) == POINTS
    assert (found["type"], found["title"], found["x_unit"], found["y_unit"]) == ("line", "T", "s", "m")
    assert (found["x_label"], found["y_label"], found["x_scale"]) == ("Time (s)", "Height [m]", "linear")
    assert found["elements"] == [
        {"label": "squares", "points": [[1, 1], [2, 4], [3, 9]]},
        {"label": "Line 1", "points": [[1, 0], [2, None]]},
    ]
    assert len(found["x_ticks"]) == len(found["x_tick_labels"]) > 0


def test_without_labels_the_keys_are_there_and_null():
    plt.plot([1])
    found = made()
    assert [found[k] for k in ("title", "x_label", "y_label", "x_unit", "y_unit")] == [None] * 5


def test_dates_are_iso_text_and_scales_are_named():
    plt.plot([datetime.date(2024, 1, d) for d in (1, 2)], [1, 10])
    plt.yscale("log")
    found = made()
    assert (found["x_scale"], found["y_scale"]) == ("datetime", "log")
    assert found["elements"][0]["points"] == [["2024-01-01T00:00:00", 1], ["2024-01-02T00:00:00", 10]]
    assert all(isinstance(t, str) for t in found["x_ticks"])


def test_a_pandas_plot_of_monthly_periods_has_its_dates():
    pd.DataFrame({"a": [1, 2]}, index=pd.date_range("2024-01-01", periods=2, freq="MS")).plot()
    assert made()["elements"][0]["points"] == [["2024-01-01T00:00:00", 1], ["2024-02-01T00:00:00", 2]]


def test_a_scatter_over_categories_has_their_names():
    plt.scatter(["a", "b"], [1, 2], label="p")
    found = made()
    assert set(found) == POINTS
    assert (found["type"], found["x_scale"], found["x_ticks"]) == ("scatter", "categorical", ["a", "b"])
    assert found["elements"] == [{"label": "p", "points": [["a", 1], ["b", 2]]}]


def test_a_scatter_with_a_fitted_line_is_a_scatter():
    plt.scatter([1, 2], [1, 2])
    plt.plot([1, 2], [1, 2])
    assert made()["type"] == "scatter"


@pytest.mark.parametrize("draw", [plt.bar, plt.barh])
def test_bars_have_label_group_and_value(draw: Any):
    draw(["x", "y"], [3, 4], label="g")
    found = made()
    assert set(found) == TWO_D
    assert found["elements"] == [{"label": "x", "group": "g", "value": 3}, {"label": "y", "group": "g", "value": 4}]


def test_grouped_bars_take_the_name_of_the_tick_they_stand_beside():
    pd.DataFrame({"a": [1, 2], "b": [3, 4]}, index=["k", "l"]).plot.bar()
    assert [tuple(e.values()) for e in made()["elements"]] == [("k", "a", 1), ("l", "a", 2), ("k", "b", 3), ("l", "b", 4)]


def test_a_histogram_is_bars_labelled_by_their_centres():
    plt.hist([1, 2, 2, 3], bins=2)
    assert [(e["label"], e["value"]) for e in made()["elements"]] == [("1.5", 1), ("2.5", 3)]


def test_a_pie_has_angles_and_radius():
    plt.pie([1, 3], labels=["p", "q"])
    found = made()
    assert set(found) == {"type", "title", "elements"}
    assert found["elements"] == [{"label": "p", "angle": 90, "radius": 1}, {"label": "q", "angle": 270, "radius": 1}]


@pytest.mark.parametrize(
    "style", [{}, {"patch_artist": True}, {"notch": True}, {"showmeans": True}, {"orientation": "horizontal"}]
)
def test_boxes_have_their_five_numbers_and_outliers(style: dict[str, Any]):
    plt.boxplot([[1, 2, 3, 4, 50], [2, 3, 4]], tick_labels=["u", "v"], **style)
    found = made()
    assert (found["type"], set(found)) == ("box_and_whisker", TWO_D)
    keys = ("label", "min", "first_quartile", "median", "third_quartile", "max", "outliers")
    assert [tuple(e[k] for k in keys) for e in found["elements"]] == [("u", 1, 2, 3, 4, 4, [50]), ("v", 2, 2.5, 3, 3.5, 4, [])]


def test_a_closed_line_is_a_line_and_no_box():
    plt.plot([0, 1, 1, 0, 0], [0, 0, 1, 1, 0])
    plt.plot([0, 1])
    assert made()["type"] == "line"


def test_several_axes_are_a_superchart_and_a_colorbar_is_none_of_them():
    figure, (left, right) = plt.subplots(1, 2)
    left.plot([1, 2])
    figure.colorbar(right.imshow(np.eye(2)))
    figure.suptitle("S")
    found = made()
    assert (found["type"], found["title"], [c["type"] for c in found["elements"]]) == ("superchart", "S", ["line", "unknown"])


def test_what_this_code_can_not_read_is_unknown_and_not_an_error():
    plt.plot([1, 2])
    plt.gca().get_lines()[0].get_xdata = None  # an artist that breaks every promise
    assert made() == {"type": "unknown", "title": None, "elements": []}


def test_a_figure_without_axes_or_with_too_many_points_has_no_chart():
    assert chart_of(plt.figure()) is None
    plt.plot(np.zeros(chart.MAX_POINTS + 1))
    assert chart_of(plt.gcf()) is None
