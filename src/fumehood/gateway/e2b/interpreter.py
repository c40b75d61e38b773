"""The code interpreter's port: /execute as lines of JSON, and contexts."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fumehood.agent import wire
from fumehood.errors import FumehoodError, NotFound
from fumehood.gateway.feed import Feed
from fumehood.gateway.pour import BrokenOff, pour
from fumehood.model import CodeRequest, Result, RichResult

from .answers import gone, json_answer, status_of
from .call import Call
from .connect import STATUSES, Fault, parse, tables, text
from .mime import result_line

KEEPALIVE_S = 5.0  # how long a peer that vanished without a word can go unnoticed
LANGUAGES = {"python": "python", "javascript": "javascript", "js": "javascript", "bash": "bash"}
# How a run that did not end by itself is shown: the SDK knows no status, only the name of an error.
_ENDED_BY_HOST = ("timeout", "oom", "output_limit", "killed", "cancelled", "quarantined")
_NAMES: Mapping[str, str] = {"timeout": "TimeoutError", "oom": "MemoryError", "cancelled": "KeyboardInterrupt"}


async def serve(call: Call, scope: Scope, receive: Receive, send: Send) -> None:
    answer: Response | None
    try:
        answer = await _answer(call, scope, receive, send)
    except Fault as e:
        answer = _plain(e.message, STATUSES[e.code])
    except FumehoodError as e:
        ended = call.lease.ended.is_set() or e.code == "sandbox_gone"
        answer = gone(call.lease.id) if ended else _plain(e.message, status_of(e))
    if answer is not None:
        await answer(scope, receive, send)


async def _answer(call: Call, scope: Scope, receive: Receive, send: Send) -> Response | None:
    match call.request.method, [part for part in scope["path"].split("/") if part]:
        case "GET", ["health"]:
            return Response(status_code=200)
        case "POST", ["execute"]:
            request = _code(await _json(call))
            await _known_context(call, request)
            await pour(scope, receive, send, "application/x-ndjson", lines(call, request), call.lease.ended)
            return None
        case "GET", ["contexts"]:
            return json_answer(await _contexts(call))
        case "POST", ["contexts"]:
            message = await _json(call)
            cwd = text(message, "cwd", "") or "/home/user"
            return json_answer(await call.link.call("context.create", language=_language(message), cwd=cwd))
        case "DELETE", ["contexts", context]:
            await call.link.call("context.remove", id=context)
            return json_answer({})
        case "POST", ["contexts", context, "restart"]:
            await call.link.call("context.restart", id=context)
            return json_answer({})
        case _:
            return _plain("no such path", 404)


def _plain(message: str, status: int) -> Response:
    return Response(message.encode("utf-8", "replace"), status, media_type="text/plain")


async def _json(call: Call) -> dict[str, Any]:
    return parse(await call.request.body() or b"{}")


def _language(message: dict[str, Any]) -> str:
    name = text(message, "language", "python").lower() or "python"
    if name not in LANGUAGES:
        raise Fault("invalid_argument", f"language {name[:32]!r} is not supported; here are {', '.join(LANGUAGES)}")
    return LANGUAGES[name]


def _code(message: dict[str, Any]) -> CodeRequest:
    context, env = text(message, "context_id", "") or None, wire.table(message.get("env_vars"))
    if context and message.get("language"):
        raise Fault("invalid_argument", "only one of context_id and language can be given")
    if any(not isinstance(value, str) for value in env.values()):
        raise Fault("invalid_argument", "'env_vars' must map names to texts")
    return CodeRequest(text(message, "code"), _language(message), context, env)


async def _known_context(call: Call, request: CodeRequest) -> None:
    """Before the stream, for after its 200 there is no 404 any more."""
    if request.context and request.context not in [context.get("id") for context in await _contexts(call)]:
        raise NotFound(f"Context {request.context[:64]} not found")


async def _contexts(call: Call) -> list[dict[str, Any]]:
    return tables((await call.link.call("context.list")).get("contexts"))


async def lines(call: Call, request: CodeRequest) -> AsyncGenerator[bytes, None]:
    """One execution as it happens. Closing this stops the program. Raises BrokenOff when the sandbox ended under it."""
    feed = Feed(KEEPALIVE_S)
    running = asyncio.create_task(call.service.run(call.caller, call.lease, request, feed.sinks))
    running.add_done_callback(lambda _: feed.close())
    try:
        while (events := await feed.read()) is not None:
            yield b"".join(_line(_said(*event)) for event in events)
        for line in _outcome(call, running):
            yield _line(line)
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, FumehoodError):  # told above, or of no more interest
            await running


def _said(kind: str, data: bytes) -> dict[str, Any]:
    if not kind:
        return {"type": "keepalive"}
    value = json.loads(data)
    if kind == "result":
        return result_line(RichResult(value["data"], value["is_main_result"]))
    return {"type": kind, "text": value["text"], "timestamp": datetime.now(UTC).isoformat()}


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _outcome(call: Call, running: asyncio.Task[Result]) -> list[dict[str, Any]]:
    try:
        result = running.result()
    except FumehoodError as e:
        if call.lease.ended.is_set() or e.code == "sandbox_gone":
            raise BrokenOff from e
        return [_error(type(e).__name__, str(e)), {"type": "end_of_execution"}]
    if call.lease.ended.is_set():
        raise BrokenOff
    count = [{"type": "number_of_executions", "execution_count": result.execution_count}] if result.execution_count else []
    return [*count, *_failure(result), {"type": "end_of_execution"}]


def _failure(result: Result) -> list[dict[str, Any]]:
    """The error that the code raised, or else why the host ended it: a run cut short must not look like a whole one."""
    if result.ok:
        return []
    if result.error and result.status not in _ENDED_BY_HOST:
        why = f"\n{result.status}: {result.cause}" if result.cause else ""
        return [_error(result.error.name, result.error.value, result.error.traceback + why)]
    if result.status == "error":  # a shell's exit code
        return [_error("ExitCode", str(result.exit_code))]
    return [_error(_NAMES.get(result.status, result.status), result.cause)]


def _error(name: str, value: str, traceback: str = "") -> dict[str, Any]:
    return {"type": "error", "name": name, "value": value, "traceback": traceback or f"{name}: {value}"}
