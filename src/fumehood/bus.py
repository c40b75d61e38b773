"""Events from where they happen to whoever listens: one queue for each listener, bounded, so that a slow one harms nobody."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager

from fumehood.records import EventRecord

MAX_WAITING = 1_000
LAGGED = "lagged"


class Subscription:
    """Iterate for events. When the listener was too slow, an event of kind `lagged` says how many it missed."""

    def __init__(self, tenant: str | None) -> None:
        self._tenant, self._waiting = tenant, deque[EventRecord]()
        self._arrived, self._missed, self._closed = asyncio.Event(), 0, False

    def offer(self, event: EventRecord) -> None:
        if self._tenant not in (None, event.tenant):
            return
        if len(self._waiting) >= MAX_WAITING:
            self._missed += len(self._waiting)
            self._waiting.clear()
        self._waiting.append(event)
        self._arrived.set()

    def close(self) -> None:
        self._closed = True
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[EventRecord]:
        return self

    async def __anext__(self) -> EventRecord:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        if self._missed:
            missed, self._missed, first = self._missed, 0, self._waiting[0]
            return EventRecord(first.seq - 1, first.tenant, "", first.at, LAGGED, {"missed": missed})
        return self._waiting.popleft()


class EventBus:
    """For one event loop."""

    def __init__(self) -> None:
        self._listeners: set[Subscription] = set()
        self._closed = False

    def publish(self, event: EventRecord) -> None:
        for listener in self._listeners:
            listener.offer(event)

    @contextmanager
    def subscribe(self, tenant: str | None) -> Generator[Subscription]:
        """From now on. None: of all tenants."""
        listener = Subscription(tenant)
        self._listeners.add(listener)
        if self._closed:
            listener.close()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """Every listener's iteration ends after what waits for it."""
        self._closed = True
        for listener in self._listeners:
            listener.close()
