"""Routes of whole sandboxes: their snapshots, and copies that run at once."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from fumehood.gateway import answers, schema
from fumehood.gateway.call import Called, answer, empty, page, until_gone
from fumehood.gateway.once import Done, once
from fumehood.records import SnapshotRecord

router = APIRouter()
_SHOWN = ("id", "sandbox_id", "tier", "template", "created_at", "size_bytes")


@router.post("/v1/sandboxes/{sandbox_id}/snapshots", status_code=201, response_model=answers.Snapshot, tags=["snapshots"])
async def create(call: Called, sandbox_id: str, body: schema.NewSnapshot, request: Request) -> Response:
    """All of its memory, processes and files, while nothing runs in it. It goes on; whoever follows something in it has to
    attach again.
    """
    lease = call.lease(sandbox_id)

    async def done() -> Done:
        made = await until_gone(request, call.service.snapshot(call.caller, lease, body.metadata))
        return Done(201, json.dumps(_shown(made)).encode())

    return (await once(call, request, done)).response()


@router.get("/v1/snapshots", response_model=answers.Snapshots, tags=["snapshots"])
async def list_(
    call: Called,
    sandbox_id: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Newest first."""
    found = await call.service.snapshots(call.caller, sandbox_id=sandbox_id, after=after, limit=limit)
    return answer({"snapshots": [_shown(record) for record in found], "next": page(found, limit)})


@router.get("/v1/snapshots/{snapshot_id}", response_model=answers.Snapshot, tags=["snapshots"])
async def get(call: Called, snapshot_id: str) -> Response:
    return answer(_shown(await call.service.snapshot_of(call.caller, snapshot_id)))


@router.delete("/v1/snapshots/{snapshot_id}", status_code=204, tags=["snapshots"])
async def remove(call: Called, snapshot_id: str) -> Response:
    """Sandboxes that run from it go on."""
    await call.service.discard(call.caller, snapshot_id)
    return empty()


@router.post("/v1/sandboxes/{sandbox_id}/fork", status_code=201, response_model=answers.Forks, tags=["sandboxes"])
async def fork(call: Called, sandbox_id: str, body: schema.Fork, request: Request) -> Response:
    """New sandboxes that go on from where this one is, all or none; by default with its metadata. Where the tier can."""
    lease = call.lease(sandbox_id)

    async def done() -> Done:
        work = call.service.fork(call.caller, lease, body.count, lease_s=body.lease_s, metadata=body.metadata)
        forks = await until_gone(request, work)
        shown = [{**asdict(fork.record), "metadata": dict(fork.metadata)} for fork in forks]
        return Done(201, json.dumps({"sandboxes": shown}).encode())

    return (await once(call, request, done)).response()


def _shown(record: SnapshotRecord) -> dict[str, Any]:
    return {**{name: getattr(record, name) for name in _SHOWN}, "metadata": dict(record.metadata)}
