"""Bodies in, answers out, in E2B's own words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fumehood.errors import FumehoodError

GONE = "The sandbox was not found"  # the SDK looks for these words
# Ours -> HTTP. 429 and 503 carry Should-Retry: false: this SDK repeats them up to three times, a POST that creates included.
_STATUSES: Mapping[str, int] = {
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "sandbox_gone": 404,
    "conflict": 409,
    "invalid_transition": 409,
    "file_error": 400,
    "capacity_exceeded": 429,
    "queue_full": 429,
    "rate_limited": 429,
    "deadline_exceeded": 504,
    "draining": 503,
    "setup_failed": 503,
    "agent_unresponsive": 504,
    "wire_error": 502,
    "unsupported": 501,
}


class Refusal(Exception):
    """An answer in E2B's own words: {"code": status, "message"}."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class TooLarge(Refusal):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(413, f"the body is over {limit_bytes} bytes")


def status_of(e: FumehoodError) -> int:
    return 400 if e.code.startswith("invalid_") and e.code != "invalid_transition" else _STATUSES.get(e.code, 500)


def refusal_of(e: FumehoodError) -> Refusal:
    return Refusal(status_of(e), f"{e}. {e.remediation}" if e.remediation else str(e))


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(value, separators=(",", ":")), status, dict(headers or {}), "application/json")


def refused(e: Refusal) -> Response:
    headers = {"Should-Retry": "false"} if e.status in (429, 502, 503, 504) else {}
    return json_answer({"code": e.status, "message": e.message}, e.status, headers)


def gone(sandbox_id: str) -> Response:
    """The one answer for a sandbox that is not there, is paused, or is not yours: nobody learns which (H14)."""
    return json_answer({"sandboxId": sandbox_id, "message": GONE, "code": 502}, 502)


async def body(request: Request, limit_bytes: int) -> bytes:
    """Counted as it is read, whatever Content-Length says. Raises TooLarge, starlette's ClientDisconnect."""
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > limit_bytes:
            raise TooLarge(limit_bytes)
    return bytes(read)
