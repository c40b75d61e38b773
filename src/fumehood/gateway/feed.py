"""What one execution says while it runs, in order, for one follower over SSE or a WebSocket."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fumehood.errors import FumehoodError
from fumehood.execution import Sinks
from fumehood.gateway import problems
from fumehood.model import Result, RichResult
from fumehood.service import to_json

KEEPALIVE_S = 15.0
_FULL_BYTES = 1 << 20  # unread by the follower: from there on the program waits for it
Event = tuple[str, bytes]  # kind, its data as a JSON object; ("", b"") = nothing happened for a while


class Feed:
    """Its `sinks` fill it; the follower empties it."""

    def __init__(self, keepalive_s: float = KEEPALIVE_S) -> None:
        self.sinks, self._keepalive_s = Sinks(self._output, self._result, self._room), keepalive_s
        self._waiting: deque[tuple[str, Any]] = deque()
        self._bytes = 0
        self._arrived, self._emptied, self._over = asyncio.Event(), asyncio.Event(), False

    def _output(self, name: str, text: str) -> None:
        self._add(name, text, len(text))

    def _result(self, result: RichResult) -> None:
        text = json.dumps({"data": dict(result.data), "is_main_result": result.is_main_result})
        self._add("result", text, len(text))

    def _add(self, kind: str, what: Any, size: int) -> None:
        self._waiting.append((kind, what))
        self._bytes += size
        self._arrived.set()

    async def _room(self) -> None:
        while self._bytes > _FULL_BYTES:
            self._emptied.clear()
            await self._emptied.wait()

    def close(self) -> None:
        self._over = True
        self._arrived.set()

    async def read(self) -> list[Event] | None:
        """All that waits, adjacent pieces of one stream as one; after `keepalive_s` of silence that; None at the end."""
        while not self._waiting:
            if self._over:
                return None
            self._arrived.clear()
            try:
                async with asyncio.timeout(self._keepalive_s):
                    await self._arrived.wait()
            except TimeoutError:
                return [("", b"")]
        taken, self._waiting, self._bytes = self._waiting, deque(), 0
        self._emptied.set()
        return _merged(taken)


def _merged(waiting: deque[tuple[str, Any]]) -> list[Event]:
    events: list[Event] = []
    while waiting:
        kind, what = waiting.popleft()
        if kind == "result":
            events.append((kind, what.encode()))
            continue
        pieces = [what]
        while waiting and waiting[0][0] == kind:
            pieces.append(waiting.popleft()[1])
        events.append((kind, json.dumps({"text": "".join(pieces)}).encode()))
    return events


async def follow(execution_id: str, run: Callable[[Sinks], Awaitable[Result]], request_id: str) -> AsyncGenerator[Event, None]:
    """started, what it says, then end or problem. Closing this stops the program."""
    feed = Feed()
    running = asyncio.ensure_future(run(feed.sinks))
    running.add_done_callback(lambda _: feed.close())
    try:
        yield "started", json.dumps({"execution_id": execution_id}).encode()
        while (events := await feed.read()) is not None:
            for event in events:
                yield event
        yield _outcome(running, request_id)
    finally:
        if not running.done():
            running.cancel()
            await asyncio.wait({running})


def _outcome(running: asyncio.Future[Result], request_id: str) -> Event:
    try:
        return "end", b'{"result":' + to_json(running.result()) + b"}"
    except FumehoodError as e:
        return "problem", json.dumps(problems.form(e, problems.status_of(e), request_id)).encode()


def as_sse(event: Event) -> bytes:
    kind, data = event
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), data) if kind else b": still there\n\n"


def as_message(event: Event) -> str:
    kind, data = event
    head = json.dumps({"event": kind})
    return f"{head[:-1]},{data.decode()[1:]}" if data != b"{}" else head
