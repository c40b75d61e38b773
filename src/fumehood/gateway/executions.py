"""Routes of executions: code and programs, waited for, streamed or in the background; their records; their end."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from fumehood.errors import InvalidInput
from fumehood.execution import Sinks
from fumehood.gateway import answers, schema
from fumehood.gateway.call import Call, Called, answer, execution, page, until_gone
from fumehood.gateway.feed import Event, as_sse, follow
from fumehood.gateway.once import Claim, Done, once
from fumehood.gateway.pour import Pour
from fumehood.lease import Lease
from fumehood.model import CodeRequest, ExecRequest, Result
from fumehood.service import new_id, to_json

router = APIRouter(tags=["executions"])
Work = Callable[[Sinks], Coroutine[Any, Any, Result]]
_SSE = "text/event-stream"
_WAITED: dict[int | str, dict[str, Any]] = {200: {"model": answers.Result, "content": {_SSE: {}}}}
_EXECUTED: dict[int | str, dict[str, Any]] = {**_WAITED, 202: {"model": answers.Execution}}


@router.post("/v1/run", responses=_WAITED)
async def run_once(call: Called, body: schema.RunOnce, request: Request) -> Response:
    """Code in a new sandbox, which ends with it."""
    asked = CodeRequest(body.code, body.language, None, body.env, body.timeout_s)
    name = new_id()

    async def work(sinks: Sinks) -> Result:
        return await call.service.run_once(call.caller, body.ask(), asked, sinks, execution_id=name)

    return await _executed(call, request, name, work)


@router.post("/v1/sandboxes/{sandbox_id}/executions", responses=_EXECUTED)
async def run(call: Called, sandbox_id: str, body: schema.Run, request: Request) -> Response:
    """Code in a context. With `Accept: text/event-stream` as it happens."""
    return await _execute(call, sandbox_id, code_of(body), body, request)


@router.post("/v1/sandboxes/{sandbox_id}/exec", responses=_EXECUTED)
async def exec_(call: Called, sandbox_id: str, body: schema.Exec, request: Request) -> Response:
    """A program, to its end."""
    return await _execute(call, sandbox_id, program_of(body), body, request)


@router.get("/v1/executions", response_model=answers.Executions)
async def list_(
    call: Called,
    sandbox_id: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Newest first, without results."""
    found = await call.service.executions(call.caller, sandbox_id=sandbox_id, after=after, limit=limit)
    return answer({"executions": [execution(record) for record in found], "next": page(found, limit)})


@router.get("/v1/executions/{execution_id}", response_model=answers.Execution)
async def get(call: Called, execution_id: str) -> Response:
    """With its result, once it is done."""
    return answer(execution(await call.service.execution(call.caller, execution_id), with_result=True))


@router.delete("/v1/executions/{execution_id}", status_code=202, response_model=answers.Execution)
async def cancel(call: Called, execution_id: str) -> Response:
    """Stops its program; its record then says `cancelled`. Nothing happens to one that has ended."""
    await call.service.cancel(call.caller, execution_id)
    return answer(execution(await call.service.execution(call.caller, execution_id)), 202)


def code_of(body: schema.Run) -> CodeRequest:
    return CodeRequest(body.code, body.language, body.context, body.env, body.timeout_s)


def program_of(body: schema.Exec) -> ExecRequest:
    """Raises InvalidInput."""
    if (body.argv is None) == (body.command is None):
        raise InvalidInput("a program is named by argv or by command", cause="give one of them")
    argv = tuple(body.argv) if body.argv is not None else ("/bin/bash", "-c", body.command or "")
    return ExecRequest(argv, body.env, body.cwd, _stdin(body), None, body.timeout_s)


def _stdin(body: schema.Exec) -> bytes | None:
    if body.stdin is not None and body.stdin_base64 is not None:
        raise InvalidInput("stdin is given twice", cause="as text and as base64", remediation="give one of them")
    if body.stdin_base64 is None:
        return None if body.stdin is None else body.stdin.encode("utf-8", "surrogateescape")
    try:
        return base64.b64decode(body.stdin_base64, validate=True)
    except (binascii.Error, ValueError) as e:
        raise InvalidInput("stdin_base64 is not base64", cause=str(e)) from None


def work_of(call: Call, lease: Lease, asked: CodeRequest | ExecRequest, body: schema.Run | schema.Exec, name: str) -> Work:
    async def work(sinks: Sinks) -> Result:
        return await call.service.run(
            call.caller, lease, asked, sinks, execution_id=name, priority=body.priority, wait_s=body.wait_s
        )

    return work


async def _execute(
    call: Call, sandbox_id: str, asked: CodeRequest | ExecRequest, body: schema.Run | schema.Exec, request: Request
) -> Response:
    lease = await call.awake(sandbox_id)
    if not body.wait:
        return (await once(call, request, lambda: _submitted(call, lease, asked, body))).response()
    name = new_id()
    return await _executed(call, request, name, work_of(call, lease, asked, body, name))


async def _submitted(call: Call, lease: Lease, asked: CodeRequest | ExecRequest, body: schema.Run | schema.Exec) -> Done:
    name = call.service.submit(call.caller, lease, asked, priority=body.priority, wait_s=body.wait_s)
    return Done(202, json.dumps(execution(await call.service.execution(call.caller, name))).encode())


async def _executed(call: Call, request: Request, name: str, work: Work) -> Response:
    if _SSE in request.headers.get("accept", ""):
        return await _streamed(call, request, name, work)

    async def done() -> Done:
        return Done(200, to_json(await until_gone(request, work(Sinks()))))

    return (await once(call, request, done)).response()


async def _streamed(call: Call, request: Request, name: str, work: Work) -> Response:
    claim = await Claim.of(call, request)
    if claim.replay is not None:
        return claim.replay.response() if claim.replay.status >= 400 else Pour(_SSE, _again(claim.replay))
    return Pour(_SSE, _events(claim, follow(name, work, request.scope["fumehood.request_id"])))


async def _events(claim: Claim, events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    kept = False
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                if event[0] == "end":
                    claim.keep(Done(200, event[1][len(b'{"result":') : -1]))
                    kept = True
                yield as_sse(event)
    finally:
        if not kept:
            await claim.drop()


async def _again(done: Done) -> AsyncGenerator[bytes, None]:
    yield as_sse(("end", b'{"result":' + done.body + b"}"))
