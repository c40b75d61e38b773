"""Routes of what lives in a sandbox: contexts and processes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from fumehood.gateway import schema
from fumehood.gateway.call import Called, answer, empty

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}")
_Pid = Annotated[int, Path(ge=1, le=1 << 31)]


@router.get("/contexts", tags=["contexts"])
async def contexts(call: Called, sandbox_id: str) -> Response:
    """{"contexts": [...]}, in order of creation."""
    return answer(await call.verb(sandbox_id, "context.list"))


@router.post("/contexts", status_code=201, tags=["contexts"])
async def create_context(call: Called, sandbox_id: str, body: schema.NewContext) -> Response:
    """State of its own: variables, imports, working directory."""
    return answer(await call.verb(sandbox_id, "context.create", **body.model_dump(exclude_none=True)), 201)


@router.delete("/contexts/{context}", status_code=204, tags=["contexts"])
async def remove_context(call: Called, sandbox_id: str, context: str) -> Response:
    await call.verb(sandbox_id, "context.remove", id=context)
    return empty()


@router.post("/contexts/{context}/restart", status_code=204, tags=["contexts"])
async def restart_context(call: Called, sandbox_id: str, context: str) -> Response:
    await call.verb(sandbox_id, "context.restart", id=context)
    return empty()


@router.post("/contexts/{context}/interrupt", status_code=204, tags=["contexts"])
async def interrupt_context(call: Called, sandbox_id: str, context: str) -> Response:
    await call.verb(sandbox_id, "context.interrupt", id=context)
    return empty()


@router.get("/processes", tags=["processes"])
async def processes(call: Called, sandbox_id: str) -> Response:
    """{"processes": [...]} that were started through this API."""
    return answer(await call.verb(sandbox_id, "exec.list"))


@router.post("/processes/{pid}/signal", status_code=204, tags=["processes"])
async def signal(call: Called, sandbox_id: str, pid: _Pid, body: schema.Signal) -> Response:
    await call.verb(sandbox_id, "exec.signal", pid=pid, **body.model_dump())
    return empty()


@router.post("/processes/{pid}/resize", status_code=204, tags=["processes"])
async def resize(call: Called, sandbox_id: str, pid: _Pid, body: schema.Size) -> Response:
    await call.verb(sandbox_id, "exec.resize", pid=pid, **body.model_dump())
    return empty()


@router.put("/processes/{pid}/stdin", status_code=204, tags=["processes"])
async def write_stdin(call: Called, sandbox_id: str, pid: _Pid, request: Request) -> Response:
    """The body, as it comes."""
    lease = await call.awake(sandbox_id)
    stream = await lease.live.link.open("exec.write", pid=pid)
    try:
        async for piece in request.stream():
            if piece:
                await stream.send(piece)
        await stream.close_input()
        await stream.result()
    finally:
        stream.abandon()
    return empty()


@router.delete("/processes/{pid}/stdin", status_code=204, tags=["processes"])
async def close_stdin(call: Called, sandbox_id: str, pid: _Pid) -> Response:
    """The end of its input."""
    await call.verb(sandbox_id, "exec.eof", pid=pid)
    return empty()
