"""The server that these tests drive: its keys, its address, and a way into its loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fumehood.service import Service
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from fumehood.errors import Unauthenticated
from fumehood.records import Caller

KEYS = {
    "e2b_0a": Caller("alpha", "k1", frozenset({"sandboxes"})),
    "e2b_0b": Caller("beta", "k2", frozenset({"sandboxes"})),
    "e2b_0c": Caller("alpha", "k3", frozenset({"sandboxes"}), compat=frozenset({"ignore-egress"})),
}


async def authenticate(request: Request) -> Caller:
    if caller := KEYS.get(request.headers.get("x-api-key", "")):
        return caller
    raise Unauthenticated("no such API key")


async def beyond(scope: Scope, receive: Receive, send: Send) -> None:
    """Where the rest of the gateway would be."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b"not E2B's"})


@dataclass
class Server:
    url: str
    service: Service
    loop: asyncio.AbstractEventLoop

    def options(self, key: str = "e2b_0a") -> dict[str, Any]:
        return {"api_key": key, "api_url": self.url, "sandbox_url": self.url, "retries": 0}

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)
