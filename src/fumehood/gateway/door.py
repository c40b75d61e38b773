"""Around everything: a request id, the cap of a body, the net under every error, and the end of what a request holds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections import Counter
from collections.abc import Awaitable
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fumehood.config import Config
from fumehood.errors import FumehoodError, InvalidInput
from fumehood.gateway import problems
from fumehood.gateway.limits import Tickets
from fumehood.records import Caller

_log = logging.getLogger("fumehood.gateway")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_READ_ON_BYTES = 64 << 20  # of a body that is refused: its sender gets to read why
_OPEN = frozenset({"/healthz", "/readyz", "/openapi.json"})
_SIGNED = "/v1/signed/"
_PUT_STREAMS = ("/files", "/stdin")
_LASTING = frozenset({"/v1/events"})  # and WebSockets: what outlives the moment in which its key was looked at
_POSTED_STREAMS = ("/files", "/process.Process/StreamInput")


class TooLarge(Exception):
    """For whoever reads the body; the answer is the door's."""


class Door:
    """The outermost layer. `counts`: answers by status, for the metrics."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app, self._config, self.counts = app, config, Counter[int]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        tickets: Tickets = []
        shown = Headers(scope=scope).get("x-request-id", "")
        scope["fumehood.request_id"] = shown if _ID.match(shown) else secrets.token_hex(8)
        scope["fumehood.tickets"] = tickets
        visit = _Visit(scope, receive, send, _cap(scope, self._config), self.counts)
        try:
            await self._app(scope, visit.receive, visit.send)
        except Exception as e:
            await visit.fail(e)
        finally:
            for give_back in tickets:
                give_back()


def _cap(scope: Scope, config: Config) -> int:
    """Files come as PUT; from E2B's SDK as POST, as does what is typed into a program. All else is JSON, read as a whole."""
    method, path = scope.get("method"), scope["path"]
    is_put = method == "PUT" and (path.endswith(_PUT_STREAMS) or path.startswith(_SIGNED))
    is_upload = is_put or (method == "POST" and path in _POSTED_STREAMS)
    return config.max_upload_bytes if is_upload else config.max_body_bytes


class _Visit:
    def __init__(self, scope: Scope, receive: Receive, send: Send, cap: int, counts: Counter[int]) -> None:
        self._scope, self._receive, self._send, self._cap, self._counts = scope, receive, send, cap, counts
        self._read, self._started, self._too_large = 0, False, False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            if self._read > self._cap:
                await self._read_on(message)
                raise TooLarge
        return message

    async def _read_on(self, message: Message) -> None:
        self._too_large = True
        while message["type"] == "http.request" and message.get("more_body") and self._read < self._cap + _READ_ON_BYTES:
            message = await self._receive()
            self._read += len(message.get("body", b""))

    async def send(self, message: Message) -> None:
        if self._too_large and not self._started and message["type"] == "http.response.start":
            await self._answer(_too_large(self._cap), 413)
            return
        if self._too_large and message["type"] == "http.response.body":
            return  # of the answer that ours stands for
        if message["type"] == "http.response.start":
            self._started = True
            self._counts[message["status"]] += 1
            MutableHeaders(scope=message)["x-request-id"] = self._scope["fumehood.request_id"]
        elif message["type"] in ("websocket.accept", "websocket.close", "websocket.http.response.start"):
            self._started = True
        await self._send(message)

    async def fail(self, error: Exception) -> None:
        """After the first byte nothing can be said any more: the connection is closed instead."""
        if self._too_large:
            error = _too_large(self._cap)
        elif not isinstance(error, FumehoodError):
            _log.error("a request failed inside", exc_info=error, extra={"request_id": self._scope["fumehood.request_id"]})
            error = FumehoodError("the server failed", remediation="its log says more under this request id")
        if not self._started:
            await self._answer(error, 413 if self._too_large else None)
        elif self._scope["type"] == "websocket":
            await self._send({"type": "websocket.close", "code": 1011})

    async def _answer(self, error: FumehoodError, status: int | None) -> None:
        self._started = True
        response = problems.answer(error, self._scope["fumehood.request_id"], status)
        self._counts[response.status_code] += 1
        response.headers["x-request-id"] = self._scope["fumehood.request_id"]
        if self._read >= self._cap + _READ_ON_BYTES:
            response.headers["connection"] = "close"
        await response(self._scope, self._receive, self._send)


def _too_large(cap: int) -> InvalidInput:
    return InvalidInput(
        "the body is too large", cause=f"at most {cap} bytes are taken here", remediation="send large data as files"
    )


class Lock(Protocol):
    async def __call__(self, connection: HTTPConnection) -> Caller: ...
    async def until_revoked(self, caller: Caller) -> None: ...


def locked(app: ASGIApp, authenticate: Lock) -> ASGIApp:
    """`app`, for callers with a key only: before its path is looked at, so that who has none learns nothing of it."""

    async def behind_lock(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path in _OPEN or path.startswith(_SIGNED):
            return await app(scope, receive, send)
        scope["fumehood.caller"] = caller = await authenticate(HTTPConnection(scope))
        if scope["type"] == "http" and path not in _LASTING:
            return await app(scope, receive, send)
        if await _broken_off(app(scope, receive, send), authenticate.until_revoked(caller)) and scope["type"] == "websocket":
            with contextlib.suppress(RuntimeError):  # its client may have closed it
                await send({"type": "websocket.close", "code": 1008})

    return behind_lock


async def _broken_off(work: Awaitable[None], until: Awaitable[None]) -> bool:
    """Whether `work` had to be cancelled, because `until` was over."""
    working, over = asyncio.ensure_future(work), asyncio.ensure_future(until)
    try:
        await asyncio.wait({working, over}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        over.cancel()
        await asyncio.wait({working, over})
    if not working.cancelled():
        working.result()
        return False
    over.result()
    return True
