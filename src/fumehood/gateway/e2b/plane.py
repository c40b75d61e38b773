"""The data plane: a request for one sandbox. Its token opens it, and nothing is said before that token was shown."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from fumehood.errors import FumehoodError, RateLimited
from fumehood.gateway.limits import Limits
from fumehood.lease import Lease
from fumehood.service import Service

from . import files, interpreter
from .answers import Refusal, gone, refusal_of, refused
from .call import Call, same, traffic_token
from .rpc import Procedures

ENVD_PORT, INTERPRETER_PORT = 49983, 49999
# A sandbox that can't be woken is as good as none for whoever asks; all else is told.
_NOT_THERE = ("not_found", "sandbox_gone", "invalid_transition")


class Plane:
    def __init__(self, service: Service, limits: Limits) -> None:
        self._service, self._limits, self._procedures = service, limits, Procedures()

    async def serve(self, sandbox_id: str, port: int, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        lease = self._service.find(sandbox_id)
        try:
            if lease is None or not _may(lease, port, request):
                answer: Response | None = gone(sandbox_id)
            else:
                answer = await self._awake(lease, port, request, scope, receive, send)
        except Refusal as e:
            answer = refused(e)
        if answer is not None:
            await answer(scope, receive, send)

    async def signed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A download or upload URL of the SDK names no sandbox: its signature says whose it is."""
        request = Request(scope, receive)
        try:
            lease = files.check_signature(request, self._service.everyone())
            answer = await self._awake(lease, ENVD_PORT, request, scope, receive, send)
        except Refusal as e:
            answer = refused(e)
        if answer is not None:
            await answer(scope, receive, send)

    async def _awake(
        self, lease: Lease, port: int, request: Request, scope: Scope, receive: Receive, send: Send
    ) -> Response | None:
        try:
            self._limits.take(lease.owner, scope["fumehood.tickets"])  # a token gets its key no more
        except RateLimited as e:
            raise refusal_of(e) from None
        if port not in (ENVD_PORT, INTERPRETER_PORT):
            return refused(Refusal(502, f"The sandbox is running but port is not open: {port}"))
        try:
            lease = await self._service.awake(lease.owner, lease.id)
        except FumehoodError as e:
            if e.code in _NOT_THERE:
                return gone(lease.id)
            raise Refusal(503, e.message) from None
        call = Call(self._service, lease, request)
        try:
            return await self._by_path(call, port, scope, receive, send)
        except ClientDisconnect:
            return None  # nobody is left to answer

    async def _by_path(self, call: Call, port: int, scope: Scope, receive: Receive, send: Send) -> Response | None:
        path = scope["path"]
        if port == INTERPRETER_PORT:
            await interpreter.serve(call, scope, receive, send)
        elif path == "/files":
            await files.serve(call, scope, receive, send)
        elif path.startswith(("/process.", "/filesystem.")):
            await self._procedures(call, scope, receive, send)
        elif path == "/health" and call.request.method == "GET":
            return Response(status_code=204)
        else:
            return PlainTextResponse("404 page not found", 404)
        return None


def _may(lease: Lease, port: int, request: Request) -> bool:
    """Raises Refusal for a signature that is wrong or old."""
    if port == INTERPRETER_PORT:
        return same(request.headers.get("e2b-traffic-access-token", ""), traffic_token(lease))
    shown = request.headers.get("x-access-token", "")
    if not shown and request.url.path == "/files" and "signature" in request.query_params:
        return files.check_signature(request, [lease]) is lease
    return same(shown, lease.token)
