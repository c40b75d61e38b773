"""A streamed answer, as plain ASGI: it can be broken off in the middle, which is what the death of a sandbox must look like."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class BrokenOff(Exception):
    """The answer can't be completed: the connection is to be closed instead."""


class Pour(Response):
    """`pour` as a response that a route can return."""

    def __init__(self, content_type: str, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._content_type, self._chunks = content_type, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await pour(scope, receive, send, self._content_type, self._chunks)


async def pour(
    scope: Scope,
    receive: Receive,
    send: Send,
    content_type: str,
    chunks: AsyncGenerator[bytes, None],
    ended: asyncio.Event | None = None,
) -> None:
    """200 and `chunks`, until they end, the client leaves, or the sandbox does (`ended`, or BrokenOff raised by `chunks`).

    In the last case the response stays without its end and the server closes the connection: a clean end would be taken
    for the whole answer. Closing `chunks` is what stops the work behind them.
    """
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")],
    }
    await send(start)
    sending = asyncio.create_task(_send(send, chunks))
    tasks = {sending, asyncio.create_task(client_left(receive))}
    if ended is not None:
        tasks.add(asyncio.create_task(_over(ended)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if sending.cancelled():
        return
    if (failure := sending.exception()) is not None and not isinstance(failure, BrokenOff | OSError):
        raise failure


async def client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _over(ended: asyncio.Event) -> None:
    await ended.wait()


async def _send(send: Send, chunks: AsyncGenerator[bytes, None]) -> None:
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
