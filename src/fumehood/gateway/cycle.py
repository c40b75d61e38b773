"""What uvicorn's cycle of request and response answers otherwise than we want."""

from __future__ import annotations

from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from fumehood.gateway import refusal


def disconnect(cycle: RequestResponseCycle) -> None:
    """Its app is told that the client went away."""
    cycle.disconnected = True
    cycle.message_event.set()


async def send_failed(cycle: RequestResponseCycle) -> None:
    headers, body = refusal.FAILED.parts()
    await cycle.send({"type": "http.response.start", "status": refusal.FAILED.status, "headers": headers})
    await cycle.send({"type": "http.response.body", "body": body, "more_body": False})


def without_chunks(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """HTTP/1.0 (nginx's default) knows no chunks: an answer of unknown length ends with the connection."""

    is_endless = False

    async def send(message: ASGISendEvent) -> None:
        nonlocal is_endless
        if message["type"] == "http.response.start":
            is_endless = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = False if is_endless else None
        elif message["type"] == "http.response.body" and is_endless:
            cycle.expected_content_length += len(message.get("body", b""))
        await cycle.send(message)

    async def unchunked(scope: Scope, receive: ASGIReceiveCallable, _send: ASGISendCallable) -> None:
        await app(scope, receive, send)

    return unchunked
