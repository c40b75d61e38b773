"""Routes beside sandboxes: who one is, what there is, what happens; and for admins keys, status and metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import asdict, fields
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from fumehood.errors import InvalidInput, NotFound
from fumehood.gateway import schema
from fumehood.gateway.auth import check_scope
from fumehood.gateway.call import AdminCalled, Call, Called, answer, empty
from fumehood.gateway.feed import KEEPALIVE_S
from fumehood.gateway.metrics import CONTENT_TYPE, exposition
from fumehood.gateway.pour import Pour
from fumehood.policy.load import preset_names
from fumehood.policy.resolve import TEMPLATES, resolve
from fumehood.records import EventRecord, KeyLimits
from fumehood.store.keys import mint, public

router = APIRouter(tags=["server"])
_REPLAYED = 500  # events that a listener who comes back may have missed at most


@router.get("/v1/whoami")
async def whoami(call: Called) -> Response:
    caller = call.caller
    shown = {"tenant": caller.tenant, "key_id": caller.key_id, "scopes": sorted(caller.scopes)}
    return answer({**shown, "limits": asdict(caller.limits), "compat": sorted(caller.compat)})


@router.get("/v1/templates")
async def templates(call: Called) -> Response:
    return answer({"templates": [{"name": t.name, "preload": list(t.preload)} for t in TEMPLATES.values()]})


@router.get("/v1/policies")
async def policies(call: Called) -> Response:
    return answer({"policies": list(preset_names())})


@router.get("/v1/policies/{name}")
async def policy(call: Called, name: str) -> Response:
    """A preset, resolved."""
    if name not in preset_names():
        raise NotFound(f"no preset is named {name[:64]!r}", remediation="list them under /v1/policies")
    spec = asdict(resolve(name))
    return answer({**spec, "require": sorted(spec["require"])})


@router.get("/v1/events", responses={200: {"content": {"text/event-stream": {}}}}, response_class=Response)
async def events(call: Called, request: Request, all: bool = False) -> Response:
    """As they happen; after `Last-Event-ID` first what was missed. `all`: of every tenant, for admins."""
    if all:
        check_scope(call.caller, "admin")
    last = request.headers.get("last-event-id", "")
    if last and not (last.isascii() and last.isdigit() and len(last) <= 18):
        raise InvalidInput("bad Last-Event-ID", cause="it is no number", remediation="send the id of the last event")
    return Pour("text/event-stream", _events(call, None if all else call.caller.tenant, int(last) if last else None))


async def _events(call: Call, tenant: str | None, after: int | None) -> AsyncGenerator[bytes, None]:
    seen = after or 0
    with call.service.events.subscribe(tenant) as subscription:
        yield b": listening\n\n"
        if after is not None:
            for event in await call.service.store.events(tenant, after, _REPLAYED):
                seen = event.seq
                yield _as_sse(event)
        while True:
            try:
                async with asyncio.timeout(KEEPALIVE_S):
                    event = await anext(subscription)
            except TimeoutError:
                yield b": still there\n\n"
                continue
            except StopAsyncIteration:
                return
            if event.seq > seen:
                yield _as_sse(event)


def _as_sse(event: EventRecord) -> bytes:
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps({**asdict(event), 'data': dict(event.data)})}\n\n".encode()


@router.get("/v1/status", tags=["admin"])
async def status(call: AdminCalled) -> Response:
    """The queues, the pools, the counts."""
    return answer(call.service.status())


@router.get("/metrics", tags=["admin"], responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
async def metrics(call: AdminCalled, request: Request) -> Response:
    """For Prometheus."""
    return Response(exposition(call.service, request.app.state.answers), media_type=CONTENT_TYPE)


@router.get("/v1/keys", tags=["admin"])
async def keys(call: AdminCalled, tenant: Annotated[str | None, Query()] = None) -> Response:
    return answer({"keys": [public(key) for key in await call.service.store.keys(tenant)]})


@router.post("/v1/keys", status_code=201, tags=["admin"])
async def make_key(call: AdminCalled, body: schema.NewKey) -> Response:
    """Its text is in this answer and nowhere else."""
    scopes, compat = frozenset[str](body.scopes), frozenset(body.compat)
    text, key = mint(body.tenant, scopes, body.name, _limits(body.limits), compat)
    await call.service.store.add_key(key)
    return answer({"api_key": text, **public(key)}, 201)


@router.delete("/v1/keys/{key_id}", status_code=204, tags=["admin"])
async def revoke_key(call: AdminCalled, key_id: str) -> Response:
    """It is refused within two seconds."""
    if not await call.service.store.revoke_key(key_id):
        raise NotFound(f"no key {key_id[:32]!r} that is valid", remediation="list them")
    return empty()


def _limits(given: dict[str, float]) -> KeyLimits:
    known = {f.name: f.type for f in fields(KeyLimits)}
    if unknown := given.keys() - known.keys():
        raise InvalidInput(f"unknown limit {min(unknown)[:64]!r}", cause=f"known: {', '.join(known)}")
    values: dict[str, Any] = {n: v if n == "requests_per_s" else int(v) for n, v in given.items()}
    limits = KeyLimits(**values)
    least = min(limits.burst, limits.concurrent_requests)
    if not 0.01 <= limits.requests_per_s <= 1e6 or not 1 <= least <= 1e6 or limits.sandboxes < 0 or abs(limits.priority) > 10:
        raise InvalidInput("a limit is out of range", cause=str(asdict(limits)), remediation="see fumehood keys create --help")
    return limits
