"""Our results are keyed by MIME type; E2B has names of its own for the types that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fumehood.model import RichResult

_NAMES: Mapping[str, str] = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "application/vnd.fumehood.data+json": "data",
    "application/vnd.fumehood.chart+json": "chart",
}


def result_line(result: RichResult) -> dict[str, Any]:
    """The line of /execute for one displayed value. What has no name of its own goes under `extra`."""
    named = {_NAMES[mime]: value for mime, value in result.data.items() if mime in _NAMES}
    if isinstance(named.get("text"), str):
        named["text"] = unquoted(named["text"])
    extra = {mime: value for mime, value in result.data.items() if mime not in _NAMES}
    line = {"type": "result", "is_main_result": result.is_main_result, **named}
    return {**line, "extra": extra} if extra else line


def unquoted(shown: str) -> str:
    """A string's repr without its quotes: E2B shows 'a' as a."""
    return shown[1:-1] if len(shown) >= 2 and shown[0] == shown[-1] and shown[0] in "'\"" else shown
