"""The gateway put together: routes, the lock before them, E2B's protocol and MCP beside them, the door around all."""

from __future__ import annotations

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fumehood import __version__
from fumehood.errors import FumehoodError, InvalidInput, NotFound, Unsupported
from fumehood.gateway import admin, contexts, e2b, executions, files, problems, sandboxes, schema, snapshots, sockets
from fumehood.gateway.auth import Authenticator
from fumehood.gateway.document import PROBLEMS, Api, operation_id
from fumehood.gateway.door import Door, TooLarge, locked
from fumehood.service import Service


def create_app(service: Service, authenticate: Authenticator, mcp: ASGIApp | None = None) -> Door:
    """The ASGI app that `serve` serves; `mcp` at /mcp, behind the same keys."""
    api = Api(
        title="fumehood",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to where the Host header says
        responses=PROBLEMS,
        generate_unique_id_function=operation_id,
        exception_handlers={
            FumehoodError: _problem,
            RequestValidationError: _invalid,
            HTTPException: _routed,
            ClientDisconnect: _left,
            TooLarge: _left,
        },
    )
    api.state.service = service
    api.add_api_route("/healthz", _healthz, methods=["GET"], include_in_schema=False)
    api.add_api_route("/readyz", _readyz, methods=["GET"], include_in_schema=False)
    for room in (executions, sandboxes, snapshots, contexts, sockets, files, admin):
        api.include_router(room.router)
    inner = locked(_beside(api, mcp) if mcp is not None else api, authenticate)
    door = Door(e2b.route(inner, service, authenticate, authenticate.limits), service.config)
    api.state.answers, api.state.limits = door.counts, authenticate.limits
    return door


def _beside(api: ASGIApp, mcp: ASGIApp) -> ASGIApp:
    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        await (mcp if scope["path"] in ("/mcp", "/mcp/") else api)(scope, receive, send)

    return routed


async def _healthz() -> Response:
    return JSONResponse({"status": "ok"})


async def _readyz(request: Request) -> Response:
    draining = request.app.state.service.draining
    return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, FumehoodError)
    return problems.answer(error, request.scope["fumehood.request_id"])


async def _invalid(request: Request, error: Exception) -> Response:
    """What was wrong where, without the values: those may be secrets."""
    assert isinstance(error, RequestValidationError)
    unparsable, kind = any(e["type"] == "json_invalid" for e in error.errors()), request.headers.get("content-type", "")
    cause = schema.faults(error.errors())
    if "json" not in kind and any(tuple(e["loc"]) == ("body",) for e in error.errors()):  # what curl -d sends
        cause = f"its Content-Type is {kind[:100] or 'missing'}, and must be application/json"
    problem = InvalidInput("the request is wrong", cause=cause, remediation="see /openapi.json for what it takes")
    return problems.answer(problem, request.scope["fumehood.request_id"], 400 if unparsable else 422)


async def _routed(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: no such path, no such method, a body that can't be read."""
    assert isinstance(error, HTTPException)
    problem: FumehoodError
    if error.status_code == 404:
        problem = NotFound("there is nothing at this path", remediation="see /openapi.json")
    elif error.status_code == 405:
        problem = Unsupported("this path has no such method", remediation="see /openapi.json")
    else:
        problem = InvalidInput("the request can't be read", cause=str(error.detail)[:200])
    answer = problems.answer(problem, request.scope["fumehood.request_id"], error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _left(request: Request, error: Exception) -> Response:
    """Nobody is there to read it (or the door answers for us)."""
    return Response(status_code=499)
