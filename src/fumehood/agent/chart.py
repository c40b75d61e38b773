"""Structured data of a matplotlib figure: line, scatter, bar, pie, box_and_whisker, superchart, unknown.

`{"type", "title", "elements", ...}`; two-dimensional types add labels and units, line and scatter also ticks and scales.
Elements: line and scatter {label, points: [[x, y]...]}; bar {label, group, value}; pie {label, angle, radius};
box_and_whisker {label, min, first_quartile, median, third_quartile, max, outliers}; superchart: charts.
Reads the artists that matplotlib drew, so it works for seaborn and pandas plots too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

Chart = dict[str, Any]
MAX_POINTS = 100_000  # over that the picture alone tells the story
_AUTOMATIC = re.compile(r"_(?:child|container|nolegend_)")
_UNIT = re.compile(r"\s*[(\[]([^()\[\]]+)[)\]]\s*$")


def chart_of(figure: Any) -> Chart | None:
    """None for a figure without axes or with more than MAX_POINTS points; unknown for what this code can't read."""
    try:
        return _figure_chart(figure)
    except Exception:  # artists come from any library and any version: a surprise must not cost the user the picture
        return {"type": "unknown", "title": None, "elements": []}


def _figure_chart(figure: Any) -> Chart | None:
    axes = [a for a in figure.axes if a.get_visible() and not hasattr(a, "_colorbar")]
    if not axes or sum(len(line.get_xdata()) for a in axes for line in a.get_lines()) > MAX_POINTS:
        return None
    if sum(len(c.get_offsets()) for a in axes for c in a.collections) > MAX_POINTS:
        return None
    charts = [_axes_chart(a) for a in axes]
    if len(charts) == 1:
        return charts[0]
    return {"type": "superchart", "title": figure.get_suptitle() or None, "elements": charts}


def _axes_chart(axes: Any) -> Chart:
    kind = _kind(axes)
    chart: Chart = {"type": kind, "title": axes.get_title() or None, "elements": []}
    if kind == "pie":
        return chart | {"elements": _pie(axes)}
    if kind == "unknown":
        return chart
    chart |= _labels(axes)
    if kind == "bar":
        return chart | {"elements": _bars(axes)}
    if kind == "box_and_whisker":
        return chart | {"elements": [_box(group, axes) for group in _box_groups(axes)]}
    chart |= _axis("x", axes.xaxis) | _axis("y", axes.yaxis)
    return chart | {"elements": _lines(axes) if kind == "line" else _scatters(axes)}


def _kind(axes: Any) -> str:
    patches = [type(p).__name__ for p in axes.patches]
    collections = [type(c).__name__ for c in axes.collections]
    if axes.images or "QuadMesh" in collections:
        return "unknown"
    if patches and all(p == "Wedge" for p in patches):
        return "pie"
    if _box_groups(axes):
        return "box_and_whisker"
    if any(type(c).__name__ == "BarContainer" for c in axes.containers):
        return "bar"
    if "PathCollection" in collections:
        return "scatter"
    return "line" if axes.get_lines() and not patches else "unknown"


def _labels(axes: Any) -> Chart:
    x, y = axes.get_xlabel() or None, axes.get_ylabel() or None
    return {"x_label": x, "y_label": y, "x_unit": _unit(x), "y_unit": _unit(y)}


def _unit(label: str | None) -> str | None:
    found = _UNIT.search(label or "")
    return found.group(1) if found else None


def _label(artist: Any, kind: str, number: int) -> str:
    label = str(artist.get_label())
    return f"{kind} {number}" if not label or _AUTOMATIC.match(label) else label


def _scale(axis: Any) -> str:
    # get_converter is matplotlib 3.10; the attribute is older, and warns there.
    converter = axis.get_converter() if hasattr(axis, "get_converter") else axis.converter
    name = type(converter).__name__
    if "Category" in name:
        return "categorical"
    return "datetime" if "Date" in name or "Timestamp" in name or "Period" in name else str(axis.get_scale())


def _number(value: Any) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _reader(axis: Any) -> Callable[[Any], Any]:
    """From a place on the axis to what the user gave: a category's name, a date as ISO text, or the number."""
    scale = _scale(axis)
    if scale == "categorical":
        names: dict[int, str] = {place: name for name, place in axis.units._mapping.items()}
        return lambda value: names.get(round(float(value)), str(value))
    if scale != "datetime":
        return _number
    if getattr(axis, "freq", None):  # pandas counts periods of its own length
        period: Any = import_module("pandas").Period
        return lambda value: period(ordinal=int(value), freq=axis.freq).to_timestamp().isoformat()
    num2date: Any = import_module("matplotlib.dates").num2date
    return lambda value: num2date(float(value)).replace(tzinfo=None).isoformat() if math.isfinite(value) else None


def _axis(letter: str, axis: Any) -> Chart:
    ticks = [_reader(axis)(t) for t in axis.get_ticklocs()]
    labels = [str(t.get_text()) for t in axis.get_ticklabels()]
    return {f"{letter}_ticks": ticks, f"{letter}_tick_labels": labels, f"{letter}_scale": _scale(axis)}


def _points(xs: Any, ys: Any, axes: Any) -> list[list[Any]]:
    read_x, read_y = _reader(axes.xaxis), _reader(axes.yaxis)
    return [[read_x(x), read_y(y)] for x, y in zip(xs, ys, strict=True)]


def _lines(axes: Any) -> list[Chart]:
    # orig=False: after unit conversion, so that dates and categories are places on the axis whatever type they had.
    return [
        {
            "label": _label(line, "Line", i),
            "points": _points(line.get_xdata(orig=False), line.get_ydata(orig=False), axes),
        }
        for i, line in enumerate(axes.get_lines())
    ]


def _scatters(axes: Any) -> list[Chart]:
    clouds = [c for c in axes.collections if type(c).__name__ == "PathCollection"]
    return [
        {"label": _label(c, "Scatter", i), "points": _points(c.get_offsets()[:, 0], c.get_offsets()[:, 1], axes)}
        for i, c in enumerate(clouds)
    ]


def _tick_name(axis: Any, place: float) -> str:
    """The label of the nearest tick where labels were set by name (bars of a group stand beside it), else the number."""
    if type(axis.get_major_formatter()).__name__ in ("FixedFormatter", "FuncFormatter", "StrCategoryFormatter"):
        ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        at, label = min(ticks, key=lambda tick: abs(tick[0] - place))
        if abs(at - place) <= 0.5 and label.get_text():
            return label.get_text()
    value = _reader(axis)(place)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _bars(axes: Any) -> list[Chart]:
    elements: list[Chart] = []
    for i, bars in enumerate(c for c in axes.containers if type(c).__name__ == "BarContainer"):
        upright = bars.orientation != "horizontal"
        for bar in bars.patches:
            x, y, width, height = bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()
            name = _tick_name(axes.xaxis, x + width / 2) if upright else _tick_name(axes.yaxis, y + height / 2)
            value = _number(height if upright else width)
            elements.append({"label": name, "group": _label(bars, "Group", i), "value": value})
    return elements


def _pie(axes: Any) -> list[Chart]:
    return [
        {"label": _label(w, "Slice", i), "angle": _number(abs(w.theta2 - w.theta1)), "radius": _number(w.r)}
        for i, w in enumerate(axes.patches)
    ]


def _box_groups(axes: Any) -> list[list[Any]]:
    """Axes.bxp draws, for each box, the closed outline and then whiskers, caps, median, mean, outliers as lines."""
    groups: list[list[Any]] = []
    for artist in axes._children:
        is_line = type(artist).__name__ == "Line2D"
        path = artist.get_path() if is_line or type(artist).__name__ == "PathPatch" else None
        if path is not None and len(path.vertices) in (5, 6, 11, 12) and (path.vertices[0] == path.vertices[-1]).all():
            groups.append([artist])
        elif is_line and groups:
            groups[-1].append(artist)
    return [g for g in groups if len(g) >= 6]


def _box(group: list[Any], axes: Any) -> Chart:
    box, lines = group[0].get_path().vertices, [line.get_path().vertices for line in group[1:]]
    upright = bool(lines[0][0, 0] == lines[0][-1, 0])  # a whisker runs along the value axis
    value, place = (1, 0) if upright else (0, 1)
    ends = [v for whisker in lines[:2] for v in whisker[:, value]]
    across = [line for line in lines[4:] if len(line) == 2 and line[0, value] == line[1, value]]
    centre = (box[:, place].min() + box[:, place].max()) / 2
    quarter, three_quarters = box[0, value], box[5 if len(box) > 6 else 2, value]  # a notch may reach beyond both
    fliers = [line for line, artist in zip(lines, group[1:], strict=True) if artist.get_linestyle() == "None"][
        -1:
    ]  # after a mean
    return {
        "label": _tick_name(axes.xaxis if upright else axes.yaxis, centre),
        "min": _number(min(ends)),
        "first_quartile": _number(quarter),
        "median": _number(across[0][0, value]) if across else None,
        "third_quartile": _number(three_quarters),
        "max": _number(max(ends)),
        "outliers": [_number(v) for line in fliers for v in line[:, value] if not min(ends) <= v <= max(ends)],
    }
