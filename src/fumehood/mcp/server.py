"""fumehood as an MCP server: over stdio for one client, over streamable HTTP for many, each session with sandboxes of its own.

Over HTTP only the handshake generations of the protocol are spoken: later ones have no session, and without one there is
nothing that state could be kept for, nor an end at which sandboxes could be ended. Newer clients fall back by themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any, cast

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import UNSUPPORTED_PROTOCOL_VERSION, CallToolResult, InputRequiredResult
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from pydantic import ValidationError

from fumehood import __version__
from fumehood.errors import Draining, Forbidden, FumehoodError, InvalidInput, Unauthenticated
from fumehood.mcp import answers
from fumehood.mcp.desk import Desk
from fumehood.mcp.stdin import stdin_lines
from fumehood.mcp.tools import Ctx, DeskOf, register

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
SandboxFor = Callable[[Mapping[str, str]], dict[str, Any]]

_INSTRUCTIONS = """Runs code and commands in isolated sandboxes on this host: no network, limited memory, nothing of the host
visible. State stays between calls of this session and is gone after it. Take a checkpoint before a risky step."""
_LAST_ANSWERS_S = 2.0
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_SANDBOX, _DESK = "fumehood.sandbox", "fumehood.desk"  # keys of the ASGI scope and of the connection's state


class _Server(MCPServer[Any]):
    """Wrong arguments are told in the same words as every other error; a crash stays the SDK's to log and to hide."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Ctx | None = None
    ) -> CallToolResult | InputRequiredResult:
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.__cause__.errors(include_url=False)]
            told = InvalidInput(f"wrong arguments for {name}", cause="; ".join(wrong), remediation="look at its input schema")
            return answers.from_error(told)


def server(desk_of: DeskOf, lifespan: Callable[[Any], AbstractAsyncContextManager[Any]] | None = None) -> MCPServer[Any]:
    """The server with every tool, no transport yet. `desk_of` finds the Desk of a call's session."""
    built = _Server(
        "fumehood", version=__version__, instructions=_INSTRUCTIONS, lifespan=lifespan, log_level="WARNING", subscriptions=False
    )
    register(built, desk_of)
    return built


async def serve_stdio(**sandbox: Any) -> None:
    """Serve one client on stdin and stdout until it closes them or this is cancelled; then its sandboxes are ended.

    `sandbox` are AsyncSandbox's arguments. The SDK points fd 1 at stderr meanwhile, so nothing else can reach the protocol.
    """

    @asynccontextmanager
    async def session(_: Any) -> AsyncGenerator[Desk, None]:
        desk = Desk(sandbox)
        try:
            yield desk
        finally:
            with anyio.CancelScope(shield=True):
                await desk.aclose()

    def desk_of(ctx: Ctx) -> Desk:
        return ctx.request_context.lifespan_context

    low = server(desk_of, session)._lowlevel_server  # pyright: ignore[reportPrivateUsage] # run_stdio_async takes no stdin
    async with stdin_lines() as lines, stdio_server(stdin=cast(anyio.AsyncFile[str], lines)) as (read, write):
        await low.run(read, write, low.create_initialization_options())


class HttpApp:
    """An ASGI app for any path it is mounted at. Where no lifespan reaches it, serve inside `async with app.run()`."""

    def __init__(self, manager: StreamableHTTPSessionManager, sandbox_for: SandboxFor) -> None:
        self._manager, self._sandbox_for = manager, sandbox_for
        self._calls, self._answered, self._is_over = 0, asyncio.Event(), False
        self._answered.set()

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[None, None]:
        """Serve sessions; at its end every session and its sandboxes are ended. Once for each app.

        Answers that are on their way get a moment to arrive: the SDK would cut them off.
        """
        async with self._manager.run():
            yield
            with anyio.move_on_after(_LAST_ANSWERS_S):
                await self._answered.wait()
            self._is_over = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        version = headers.get("mcp-protocol-version")
        if version is not None and version not in HANDSHAKE_PROTOCOL_VERSIONS:
            return await _refuse_version(send, version)
        try:
            self._refuse_at_the_end()
            sandbox = self._sandbox_for(headers)
        except FumehoodError as error:
            return await _refuse(send, error)
        # The SDK lets only the principal that opened a session use it; any other key gets the 404 of an unknown id (H14).
        owner = hashlib.sha256(json.dumps(sandbox, sort_keys=True, default=repr).encode()).hexdigest()
        user = AuthenticatedUser(AccessToken(token=owner, client_id=owner, scopes=[]))
        with self._call() if scope["method"] == "POST" else nullcontext():
            await self._manager.handle_request({**scope, "user": user, _SANDBOX: sandbox}, receive, send)

    def _refuse_at_the_end(self) -> None:
        if self._is_over:
            raise Draining("the server is shutting down", remediation="open a session at the next one")

    @contextmanager
    def _call(self) -> Generator[None]:
        self._calls += 1
        self._answered.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._answered.set()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.run():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


def http_app(
    sandbox_for: SandboxFor,
    *,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    session_idle_s: float = 600,
    max_sessions: int = 100,
) -> HttpApp:
    """The server over streamable HTTP. `sandbox_for` gets a request's headers, names in lower case, and returns AsyncSandbox's
    arguments (such as url and api_key) for it; it raises Unauthenticated or Forbidden to refuse the request.

    Host and Origin are checked against loopback and what is allowed here ("host", "host:port" or "host:*"): a page in a
    browser that rebinds its name to this address gets 421 or 403. A session without a request for `session_idle_s` is ended.
    """
    built = server(_desk_of_connection)
    built.streamable_http_app(
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=[*(h + end for h in _LOOPBACK for end in ("", ":*")), *allowed_hosts],
            allowed_origins=[*(f"http://{h}{end}" for h in _LOOPBACK for end in ("", ":*")), *allowed_origins],
        ),
        session_idle_timeout=session_idle_s,
        max_sessions=max_sessions,
    )
    return HttpApp(built.session_manager, sandbox_for)


def _desk_of_connection(ctx: Ctx) -> Desk:
    """The SDK unwinds the connection's exit stack however the session ends: DELETE, idle, crash, shutdown."""
    connection = ctx.request_context.session._connection  # pyright: ignore[reportPrivateUsage] # no public way to it in 2.3
    if _DESK not in connection.state:
        assert ctx.request_context.request is not None, "over HTTP every call carries its request"
        desk = connection.state[_DESK] = Desk(ctx.request_context.request.scope[_SANDBOX])
        connection.exit_stack.push_async_callback(desk.aclose)
    return connection.state[_DESK]


async def _refuse(send: Send, error: FumehoodError) -> None:
    status = 401 if isinstance(error, Unauthenticated) else 403 if isinstance(error, Forbidden) else 503
    await _send_json(send, status, "application/problem+json", {"status": status, "title": error.message, **error.to_dict()})


async def _refuse_version(send: Send, version: str) -> None:
    supported = list(HANDSHAKE_PROTOCOL_VERSIONS)
    data = {"supported": supported, "requested": version[:40]}
    error = {"code": UNSUPPORTED_PROTOCOL_VERSION, "message": "only versions with sessions are served", "data": data}
    await _send_json(send, 400, "application/json", {"jsonrpc": "2.0", "id": None, "error": error})


async def _send_json(send: Send, status: int, media_type: str, body: Mapping[str, Any]) -> None:
    headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
