"""Routes of files: streamed both ways, and URLs that open one file without a key."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from fumehood.errors import FumehoodError, Unauthenticated
from fumehood.gateway import answers, schema, signed
from fumehood.gateway.call import Called, answer, empty, leave, path_of
from fumehood.gateway.document import NO_KEY
from fumehood.gateway.listing import listed
from fumehood.gateway.pour import BrokenOff, Pour
from fumehood.gateway.writing import Writing
from fumehood.lease import Lease
from fumehood.runtime.link import Link, Stream
from fumehood.service import Service

router = APIRouter(tags=["files"])
_BASE = "/v1/sandboxes/{sandbox_id}/files"
_BYTES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
_Path = Annotated[str, Query(min_length=1, description="inside the sandbox; ~ and relative ones start at the home")]
_Number = Annotated[int | None, Query(ge=0, le=1 << 62)]


@router.get(_BASE, responses=_BYTES, response_class=Response)
async def read(
    call: Called, sandbox_id: str, path: _Path, request: Request, offset: _Number = None, length: _Number = None
) -> Response:
    """Its bytes, or those from `offset` on."""
    lease = await call.awake(sandbox_id)
    part = {name: value for name, value in (("offset", offset), ("length", length)) if value is not None}
    return await download(lease.live.link, path_of(request), part)


@router.put(_BASE, response_model=answers.Entry)
async def write(
    call: Called, sandbox_id: str, path: _Path, request: Request, mode: Annotated[int | None, Query(ge=0, le=0o777)] = None
) -> Response:
    """The body as a file; what was there is replaced. Of a new one a body that breaks off leaves nothing."""
    lease = await call.awake(sandbox_id)
    return answer(await upload(lease.live.link, path_of(request), request, mode))


@router.delete(_BASE, status_code=204)
async def remove(call: Called, sandbox_id: str, path: _Path, request: Request) -> Response:
    """A file, or a directory with all that is in it."""
    await call.verb(sandbox_id, "files.remove", path=path_of(request))
    return empty()


@router.get(_BASE + "/stat", response_model=answers.Entry)
async def stat(call: Called, sandbox_id: str, path: _Path, request: Request) -> Response:
    return answer((await call.verb(sandbox_id, "files.stat", path=path_of(request)))["entry"])


@router.get(_BASE + "/list")
async def list_(
    call: Called, sandbox_id: str, path: _Path, request: Request, depth: Annotated[int, Query(ge=1, le=64)] = 1
) -> Response:
    """{"entries": [...]}, of `depth` levels."""
    lease = await call.awake(sandbox_id)
    entries, truncated = await listed(lease.live.link, path_of(request), depth)
    return answer({"entries": entries, "truncated": truncated})


@router.post(_BASE + "/mkdir", response_model=answers.Entry)
async def mkdir(call: Called, sandbox_id: str, body: schema.Mkdir) -> Response:
    return answer((await call.verb(sandbox_id, "files.mkdir", path=body.path))["entry"])


@router.post(_BASE + "/move", response_model=answers.Entry)
async def move(call: Called, sandbox_id: str, body: schema.Move) -> Response:
    return answer((await call.verb(sandbox_id, "files.move", source=body.source, destination=body.destination))["entry"])


@router.post(_BASE + "/sign")
async def sign(call: Called, sandbox_id: str, body: schema.Sign, request: Request) -> Response:
    """{"url": ...} which reads or writes that one file without a key, until it expires or the sandbox ends."""
    lease = call.lease(sandbox_id)
    token = signed.make(lease, body.method, body.path, body.expires_s)
    return answer({"url": f"{call.service.config.public_url.rstrip('/')}/v1/signed/{token}"})


@router.get("/v1/signed/{token}", responses=_BYTES, response_class=Response, openapi_extra=NO_KEY)
async def signed_read(token: str, request: Request) -> Response:
    lease, path = await _opened(request, token, "GET")
    return await download(lease.live.link, path, {})


@router.put("/v1/signed/{token}", response_model=answers.Entry, openapi_extra=NO_KEY)
async def signed_write(token: str, request: Request) -> Response:
    lease, path = await _opened(request, token, "PUT")
    return answer(await upload(lease.live.link, path, request, None))


async def _opened(connection: HTTPConnection, token: str, method: str) -> tuple[Lease, str]:
    """Raises Unauthenticated, in one way for all that can be wrong with it; RateLimited, for it counts as its key's."""
    service: Service = connection.app.state.service
    found = signed.check(token, method, service.find)
    if found is None:
        raise Unauthenticated("this URL opens nothing", cause="it is malformed, expired, or its sandbox ended")
    lease, path = found
    connection.app.state.limits.take(lease.owner, connection.scope["fumehood.tickets"])
    await service.awake(lease.owner, lease.id)
    return lease, path


async def download(link: Link, path: str, part: dict[str, int]) -> Response:
    """Up to the first bytes a failure is an answer of its own; after them it breaks the connection off."""
    stream = await link.open("files.read", path=path, **part)
    try:
        first = (await anext(stream)).payload[1:]
    except StopAsyncIteration:
        return Response(b"", headers={"cache-control": "no-store"}, media_type="application/octet-stream")
    except BaseException:
        stream.abandon()
        raise
    return Pour("application/octet-stream", _rest(stream, first))


async def _rest(stream: Stream, first: bytes) -> AsyncGenerator[bytes, None]:
    try:
        yield first
        async for frame in stream:
            yield frame.payload[1:]
    except FumehoodError as e:
        raise BrokenOff from e
    finally:
        await leave(stream)


async def upload(link: Link, path: str, request: Request, mode: int | None) -> dict[str, Any]:
    writing = await Writing(link, path, mode).open()
    try:
        async for piece in request.stream():
            if piece:
                await writing.write(piece)
        return await writing.finish()
    finally:
        await writing.abandon()
