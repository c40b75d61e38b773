"""Errors as answers: RFC 9457 problems with our code, cause and remediation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from fumehood.errors import FumehoodError

MEDIA_TYPE = "application/problem+json"
# What is missing here is a bug of ours: 500.
_STATUSES: Mapping[str, int] = {
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "file_error": 409,
    "invalid_transition": 409,
    "conflict": 409,
    "detached": 409,
    "sandbox_gone": 410,
    "protection_unavailable": 422,
    "capacity_exceeded": 429,
    "queue_full": 429,
    "rate_limited": 429,
    "unsupported": 501,
    "wire_error": 502,
    "setup_failed": 503,
    "store_failed": 503,
    "draining": 503,
    "deadline_exceeded": 504,
    "agent_unresponsive": 504,
}
_BY_ERRNO = {"ENOENT": 404, "ENOSPC": 507, "EDQUOT": 507}
_RETRY_AFTER_S = {429: 1, 503: 5}


def status_of(e: FumehoodError) -> int:
    if e.code == "file_error":
        return _BY_ERRNO.get(str(e.details.get("errno")), 409)
    return 422 if e.code.startswith("invalid_") and e.code != "invalid_transition" else _STATUSES.get(e.code, 500)


def form(e: FumehoodError, status: int, request_id: str) -> dict[str, Any]:
    shown = {**e.to_dict(), "request_id": request_id}
    return {"type": f"urn:fumehood:error:{e.code}", "title": e.message, "status": status, "detail": e.cause, **shown}


def answer(e: FumehoodError, request_id: str, status: int | None = None) -> Response:
    status = status_of(e) if status is None else status
    headers = {"cache-control": "no-store"}
    if status in _RETRY_AFTER_S:
        headers["retry-after"] = str(e.details.get("retry_after_s", _RETRY_AFTER_S[status]))
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="fumehood"'
    return Response(json.dumps(form(e, status, request_id)), status, headers, MEDIA_TYPE)
