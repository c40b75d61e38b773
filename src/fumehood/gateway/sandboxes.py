"""Routes of sandboxes: made, listed, extended, paused, copied, ended."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from fumehood.errors import InvalidInput, NotFound
from fumehood.gateway import answers, schema
from fumehood.gateway.call import Called, answer, empty, page, shown, until_gone
from fumehood.gateway.once import Done, once
from fumehood.model import SandboxState

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])
_LIVE = frozenset(str(state) for state in SandboxState if state is not SandboxState.STOPPED)
_Page = Annotated[int, Query(ge=1, le=1000)]


@router.post("", status_code=201, response_model=answers.Opened)
async def create(call: Called, body: schema.NewSandbox, request: Request) -> Response:
    """A ready sandbox. It is taken back when the caller goes away before the answer."""

    async def done() -> Done:
        lease = await until_gone(request, call.service.create(call.caller, body.ask()))
        return Done(201, json.dumps(shown(lease)).encode())

    return (await once(call, request, done)).response()


@router.get("", response_model=answers.Sandboxes)
async def list_(call: Called, state: SandboxState | None = None, after: str | None = None, limit: _Page = 100) -> Response:
    """Newest first. Without `state` those that live; with `stopped` those that have ended."""
    states = _LIVE if state is None or state is not SandboxState.STOPPED else frozenset({str(state)})
    found = await call.service.history(call.caller, states=states, after=after, limit=limit)
    # What lives moves on faster than its record: the state that counts is that of this moment.
    rows = [asdict(r) for r in found if r.state == state or (state is None and r.state != SandboxState.STOPPED)]
    return answer({"sandboxes": rows, "next": page(found, limit)})


@router.get("/{sandbox_id}", response_model=answers.Opened)
async def get(call: Called, sandbox_id: str) -> Response:
    """One that ended, too, as long as its record is kept."""
    lease = call.service.find(sandbox_id)
    if lease is not None and lease.tenant == call.caller.tenant:
        return answer(shown(lease))
    record = await call.service.record(call.caller, sandbox_id)
    if record is None:
        raise NotFound(f"no sandbox {sandbox_id[:40]!r}", remediation="list yours: it may have ended long ago")
    return answer({**asdict(record), "metadata": dict(record.metadata), "protections": []})


@router.patch("/{sandbox_id}", response_model=answers.Opened)
async def extend(call: Called, sandbox_id: str, body: schema.Lease) -> Response:
    """Its lease now ends in so many seconds, sooner or later than before."""
    lease = call.lease(sandbox_id)
    await call.service.extend(call.caller, lease, body.lease_s)
    return answer(shown(lease))


@router.delete("/{sandbox_id}", status_code=204)
async def kill(call: Called, sandbox_id: str) -> Response:
    """Every process of it, at once."""
    await call.service.kill(call.caller, call.lease(sandbox_id))
    return empty()


@router.post("/{sandbox_id}/pause", response_model=answers.Opened)
async def pause(call: Called, sandbox_id: str) -> Response:
    """Its processes stand still, and so does its lease."""
    lease = call.lease(sandbox_id)
    await call.service.pause(call.caller, lease)
    return answer(shown(lease))


@router.post("/{sandbox_id}/resume", response_model=answers.Opened)
async def resume(call: Called, sandbox_id: str) -> Response:
    lease = call.lease(sandbox_id)
    await call.service.resume(call.caller, lease)
    return answer(shown(lease))


@router.get("/{sandbox_id}/stats")
async def stats(call: Called, sandbox_id: str) -> Response:
    """From the host's own accounting, never from the guest."""
    lease = call.lease(sandbox_id)
    limits = lease.live.spec.limits
    return answer({**asdict(lease.live.handle.stats()), "memory_limit_bytes": limits.memory_bytes})


@router.post("/{sandbox_id}/checkpoints", status_code=201)
async def checkpoint(call: Called, sandbox_id: str, body: schema.Checkpoint) -> Response:
    """Of a Python context and the home directory; the name to give to rollback."""
    lease = await call.awake(sandbox_id)
    return answer({"checkpoint": await lease.live.checkpoint(body.context)}, 201)


@router.post("/{sandbox_id}/rollback", status_code=204)
async def rollback(call: Called, sandbox_id: str, body: schema.Rollback, request: Request) -> Response:
    """A context to a checkpoint; or all of it, by then running or paused, to a snapshot: what runs in it is killed."""
    if (body.checkpoint is None) == (body.snapshot is None):
        raise InvalidInput("it goes back to a checkpoint or to a snapshot", cause="give one of them")

    async def done() -> Done:
        if body.snapshot is not None:
            await call.service.rollback(call.caller, call.lease(sandbox_id), body.snapshot)
        elif body.checkpoint is not None:
            await (await call.awake(sandbox_id)).live.rollback(body.checkpoint)
        return Done(204, b"")

    return (await once(call, request, done)).response()
