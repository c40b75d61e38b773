"""Bodies in, answers out: plain ASGI, so that a stream can be broken off in the middle, which is what a kill must look like."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

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


async def pour(
    scope: Scope, receive: Receive, send: Send, content_type: str, chunks: AsyncGenerator[bytes, None], ended: asyncio.Event
) -> None:
    """200 and `chunks`, until they end, the client leaves, or the sandbox does.

    In the last case the response stays without its end and the server closes the connection: a clean end would be taken
    for the whole answer. Closing `chunks` is what stops the work behind them.
    """
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")],
    }
    await send(start)
    sending = asyncio.create_task(_send(send, chunks))
    left, over = asyncio.create_task(_left(receive)), asyncio.create_task(ended.wait())
    try:
        await asyncio.wait({sending, left, over}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (sending, left, over):
            task.cancel()
        await asyncio.wait({sending, left, over})
    if sending.cancelled():
        return
    if (failure := sending.exception()) is not None and not isinstance(failure, BrokenOff | OSError):
        raise failure


class BrokenOff(Exception):
    """The answer can't be completed: the connection is to be closed instead."""


async def _send(send: Send, chunks: AsyncGenerator[bytes, None]) -> None:
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
