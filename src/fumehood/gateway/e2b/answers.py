"""Answers in E2B's own words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from fumehood.errors import FileFault, FumehoodError
from fumehood.gateway import problems

GONE = "The sandbox was not found"  # the SDK looks for these words
# Where E2B has another status than our own API (gateway/problems.py): 400 for any fault of the client, 404 for what has ended.
_INSTEAD: Mapping[int, int] = {422: 400, 410: 404}
_BY_ERRNO: Mapping[str, int] = {"EACCES": 403, "EPERM": 403, "EROFS": 403, "EEXIST": 409, "ENOSPC": 507, "EDQUOT": 507}
# This SDK repeats these by itself, a POST that creates included, unless it is told not to.
_REPEATED = (429, 502, 503, 504)


class Refusal(Exception):
    """An answer in E2B's own words: {"code": status, "message"}."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


def status_of(e: FumehoodError) -> int:
    """For the control API and /files as it is; Connect's codes follow from it (connect.py)."""
    if isinstance(e, FileFault):
        return _BY_ERRNO.get(str(e.details.get("errno")), 400)
    status = problems.status_of(e)
    return _INSTEAD.get(status, status)


def refusal_of(e: FumehoodError) -> Refusal:
    message = f"{e}. {e.remediation}" if e.remediation else str(e)
    return Refusal(status_of(e), message, e.details.get("retry_after_s"))


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    text = json.dumps(value, separators=(",", ":"))
    return Response(text, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def refused(e: Refusal) -> Response:
    headers = {"Should-Retry": "false"} if e.status in _REPEATED else {}
    if e.retry_after_s is not None:
        headers["Retry-After"] = str(e.retry_after_s)
    return json_answer({"code": e.status, "message": e.message}, e.status, headers)


def gone(sandbox_id: str) -> Response:
    """The one answer for a sandbox that is not there, is paused, or is not yours: nobody learns which (H14)."""
    return json_answer({"sandboxId": sandbox_id, "message": GONE, "code": 502}, 502)
