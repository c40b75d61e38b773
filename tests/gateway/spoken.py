"""What the tests of the server say to it, and how they read what it says."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from fuzz_sockets import answers
from small_app import Client, Served

HEAD = b"Host: here\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HEAD + b"\r\n"
LAST = b"GET /healthz HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + b"A" * 22 + b"==\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + KEY
SOON_S = 0.4


def refused(data: bytes, status: int) -> dict[str, Any]:
    """The problem document in the only answer there."""
    (answer,) = answers(data)
    problem = json.loads(answer.body)
    assert (answer.status, answer.headers[b"content-type"]) == (status, b"application/problem+json"), answer
    assert problem.keys() >= {"type", "title", "status", "detail", "code", "message", "cause", "remediation", "retryable"}
    assert problem["status"] == status and problem["request_id"].encode() == answer.headers[b"x-request-id"]
    assert answer.headers[b"connection"] == b"close"
    return problem


def statuses(data: bytes) -> list[int]:
    return [answer.status for answer in answers(data)]


async def dribbled(client: Client, piece: bytes) -> bytes:
    """What comes back until the server closes, to a client that sends a piece every now and then."""

    async def dribble() -> None:
        with suppress(ConnectionError):
            while True:
                await client.send(piece)
                await asyncio.sleep(SOON_S / 8)

    sending = asyncio.ensure_future(dribble())
    try:
        return await client.rest()
    finally:
        sending.cancel()
        await asyncio.wait((sending,))


async def served_again(small: Served) -> None:
    for _ in range(100):
        if (await small.ask(LAST)).startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the door stayed shut")
