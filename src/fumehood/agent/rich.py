"""Rich results: MIME bundles for values, the same with and without IPython.

A bundle maps MIME types to JSON values; binary types are base64 text. Two types are ours:
`application/vnd.fumehood.chart+json` (see chart.py) and `application/vnd.fumehood.data+json` ({column: [values]}).
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from . import wire
from .chart import chart_of

CHART = "application/vnd.fumehood.chart+json"
DATA = "application/vnd.fumehood.data+json"
PNG, JPEG, JSON, TEXT = "image/png", "image/jpeg", "application/json", "text/plain"
MAX_ITEMS = wire.MAX_JSON_ITEMS - 1_000  # of a result: the rest is for what its event adds
MAX_CELLS = 100_000  # larger frames travel as text and HTML only: the text is cut by pandas, the data would not be


def scalar(value: Any) -> Any:
    """A JSON value for one cell: dates as ISO text, NaN, NaT and infinities as None, numpy scalars as Python's."""
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "isoformat"):
        return None if value != value else value.isoformat()  # NaT is unequal to itself and still has isoformat
    if isinstance(value, list | tuple):
        return [scalar(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {str(k): scalar(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return str(value)


def frame_data(frame: Any) -> dict[str, list[Any]] | None:
    if frame.size > MAX_CELLS:
        return None
    return {str(name): [scalar(v) for v in frame.iloc[:, i].tolist()] for i, name in enumerate(frame.columns)}


def figure_png(figure: Any) -> bytes | None:
    """None for a figure without content, as notebooks have it."""
    if not figure.axes and not figure.lines:
        return None
    out = io.BytesIO()
    figure.canvas.print_figure(
        out, format="png", bbox_inches="tight", facecolor=figure.get_facecolor(), edgecolor=figure.get_edgecolor()
    )
    return out.getvalue()


def image_png(image: Any) -> bytes:
    out = io.BytesIO()
    (image if image.mode in ("1", "L", "LA", "I", "P", "RGB", "RGBA") else image.convert("RGB")).save(out, "PNG")
    return out.getvalue()


def _is_json(value: Any) -> bool:
    """Whether JSON can hold it: no NaN, no foreign objects, no cycles."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def json_copy(value: Any) -> Any:
    """The list or dict itself where a frame can hold it as JSON, else None."""
    if len(value) > MAX_ITEMS:  # it would be left out after seconds of work, where a guest's processor is emulated
        return None
    return value if _is_json(value) else None


def _nothing(_value: Any) -> None:
    return None


# MIME type, module and name of the class, function. Named, not imported: what the user never imports costs nothing.
FORMATS: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
    (DATA, "pandas", "DataFrame", frame_data),  # pandas >= 3 shows its public module
    (DATA, "pandas.core.frame", "DataFrame", frame_data),
    (PNG, "matplotlib.figure", "Figure", figure_png),
    (CHART, "matplotlib.figure", "Figure", chart_of),
    (PNG, "PIL.Image", "Image", image_png),
    (JPEG, "PIL.Image", "Image", _nothing),
    (JSON, "builtins", "dict", json_copy),
    (JSON, "builtins", "list", json_copy),
)
_BY_CLASS: dict[tuple[str, str], list[tuple[str, Callable[[Any], Any]]]] = {}
for _mime, _module, _name, _function in FORMATS:
    _BY_CLASS.setdefault((_module, _name), []).append((_mime, _function))
# The protocol that libraries implement to be shown in notebooks.
_METHODS = {
    "text/html": "_repr_html_",
    "text/markdown": "_repr_markdown_",
    "image/svg+xml": "_repr_svg_",
    PNG: "_repr_png_",
    "application/pdf": "_repr_pdf_",
    JPEG: "_repr_jpeg_",
    "text/latex": "_repr_latex_",
    JSON: "_repr_json_",
    "application/javascript": "_repr_javascript_",
}


def _without_metadata(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and len(value) == 2 else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def describe(value: Any) -> dict[str, Any]:
    """A value's bundle by the notebook protocol, without IPython. Raises whatever the value's own methods raise."""
    made: dict[str, Any] = {TEXT: repr(value)}
    if isinstance(value, type):
        return made  # its methods are unbound
    for mime, name in _METHODS.items():
        if callable(method := getattr(value, name, None)):
            made[mime] = _without_metadata(method())
    for cls in reversed(type(value).__mro__):
        for mime, function in _BY_CLASS.get((cls.__module__, cls.__name__), ()):
            made[mime] = function(value)
    if callable(method := getattr(value, "_repr_mimebundle_", None)):
        made |= _without_metadata(method())
    return {mime: data for mime, data in made.items() if data is not None}


def _json_value(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode()
    return value if isinstance(value, str) or _is_json(value) else scalar(value)


def result_event(data: Mapping[str, Any], *, main: bool) -> dict[str, Any]:
    """The EVENT for a bundle. Over a frame's size, the structured copies go first; then a text says how large it was."""
    bundle = {str(mime): _json_value(value) for mime, value in data.items()}
    texts = {mime: json.dumps(value).encode() for mime, value in bundle.items()}
    for dropped in ((), (CHART, DATA, JSON)):
        kept = {mime: value for mime, value in bundle.items() if mime not in dropped}
        if kept and _fits([texts[mime] for mime in kept]):
            return {"type": "result", "is_main_result": main, "data": kept}
    size = sum(map(len, texts.values()))
    text = f"[result of {size} bytes left out: a result may have {wire.MAX_PAYLOAD_BYTES} bytes; write it to a file]"
    return {"type": "result", "is_main_result": main, "data": {TEXT: text}}


def _fits(texts: list[bytes]) -> bool:
    """In a frame, with room for what the event adds to it."""
    small = sum(map(len, texts)) <= wire.MAX_PAYLOAD_BYTES - 65_536
    return small and sum(map(wire.json_items, texts)) <= MAX_ITEMS
