"""One request and its answer, where uvicorn's cycle does otherwise than we want."""

from __future__ import annotations

from typing import cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from fumehood.gateway import refusal


class Cycle(RequestResponseCycle):
    def disconnect(self) -> None:
        """The app is told that its client went away."""
        self.disconnected, self.waiting_for_100_continue = True, False
        self.message_event.set()

    async def send_500_response(self) -> None:
        headers, body = refusal.FAILED.parts()
        await self.send({"type": "http.response.start", "status": refusal.FAILED.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


class OldCycle(Cycle):
    """HTTP/1.0 (nginx's default) has no chunks, which uvicorn would send: an answer of unknown length ends the connection."""

    is_endless = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self.is_endless = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            self.chunked_encoding = False if self.is_endless else None
        elif message["type"] == "http.response.body" and self.is_endless:
            self.expected_content_length += len(message.get("body", b""))
        await super().send(message)


def ours(cycle: RequestResponseCycle) -> Cycle:
    """The same cycle with our manners: uvicorn makes them of its own class and has no hook for another."""
    is_old = cycle.scope["http_version"] == "1.0"
    cycle.__class__ = OldCycle if is_old else Cycle
    cycle.waiting_for_100_continue &= not is_old
    return cast("Cycle", cycle)
