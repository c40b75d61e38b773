"""Whose request is it: a sandbox's (by header pair, host name or signature), E2B's control API, or our own.

Nothing here trusts what it routes by: whichever way a request takes, the token or key of its destination is asked for there.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fumehood.gateway.limits import Limits
from fumehood.service import Service

from .control import PREFIXES, Authenticate, Control
from .plane import Plane

_SANDBOX_HOST = re.compile(r"([0-9]{1,5})-([a-z0-9]{1,64})\.")
_HEARD_BYTES, _HEARD_S = 1 << 20, 1.0
_SANDBOX_ID = re.compile(r"[a-z0-9]{1,64}\Z")


def route(app: ASGIApp, service: Service, authenticate: Authenticate, limits: Limits) -> ASGIApp:
    """`app`, with E2B's requests taken out before they reach it. To be placed inside the limit of size. What a sandbox's own
    token opens counts against the `limits` of the key that made it.
    """
    plane, control = Plane(service, limits), Control(service, authenticate)

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        path: str = scope["path"]
        heard = _heard_out(receive, send)
        if aim := destination(Headers(scope=scope)):
            await plane.serve(*aim, scope, *heard)
        elif path == "/files" and "signature" in parse_qs(scope.get("query_string", b"").decode("latin-1")):
            await plane.signed(scope, *heard)
        elif path in PREFIXES or path.startswith(tuple(p.rstrip("/") + "/" for p in PREFIXES)):
            await control(scope, *heard)
        else:
            await app(scope, receive, send)

    return routed


def destination(headers: Mapping[str, str]) -> tuple[str, int] | None:
    """(sandbox, port) of a request to a sandbox. An id that none can have is one that nobody finds, not another route."""
    if (sandbox := headers.get("e2b-sandbox-id")) is not None:
        port = headers.get("e2b-sandbox-port", "")
        usable = port.isascii() and port.isdigit() and len(port) <= 5
        return (sandbox if _SANDBOX_ID.match(sandbox) else "", int(port) if usable else 0)
    if match := _SANDBOX_HOST.match(headers.get("host", "")):
        return match[2], int(match[1])
    return None


def _heard_out(receive: Receive, send: Send) -> tuple[Receive, Send]:
    """A refusal waits a moment for the rest of its request: of an answer that comes before all was sent, E2B's client
    (pyqwest 0.12) makes a broken connection, once in thirty times.
    """
    unread, read_bytes = True, 0

    async def counted() -> Message:
        nonlocal unread
        message = await receive()
        unread = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def patient(message: Message) -> None:
        nonlocal read_bytes
        if message["type"] == "http.response.start" and message["status"] >= 400:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEARD_S):
                    while unread and read_bytes < _HEARD_BYTES:
                        read_bytes += len((await counted()).get("body", b""))
        await send(message)

    return counted, patient
