"""The warm pool: things made before they are asked for, by class (M12, M14). `plan()` decides; this carries it out.

A claim takes one for good: used ones are never given back, so nobody meets what another caller left (H18).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from contextlib import nullcontext, suppress
from typing import Any, Generic, TypeVar

from fumehood.pool.plan import Plan, PoolSettings, plan
from fumehood.pool.shelf import Shelf

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
_log = logging.getLogger("fumehood.pool")


class Pool(Generic[K, T]):
    """Used from one asyncio loop.

    `make` returns a thing that is proved ready, or raises, or is cancelled, once, after `make_timeout_s`; in the last two cases
    it leaves nothing behind. `close` ends a thing, dead or alive, and may be called for one that its owner closed already. What
    either raises is logged as "fumehood.pool". `clock` must run as the loop's does.
    """

    def __init__(
        self,
        make: Callable[[K], Awaitable[T]],
        close: Callable[[T], Awaitable[None]],
        settings: PoolSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._close, self._settings, self._clock = make, close, settings, clock
        self._shelves: OrderedDict[K, Shelf[T]] = OrderedDict()  # least recently used first
        # Classes that callers brought are made one after the other: many of them together can't outrun the work that runs.
        self._turn = asyncio.Semaphore(1)
        self._tending: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._started = self._closed = self._running = False

    def keep(self, key: K) -> None:
        """A class that has `floor` warm ones from the start, is never forgotten and has a ceiling of its own."""
        shelf = self._shelves.get(key) or self._new(key)
        shelf.kept, shelf.floor = True, self._settings.floor
        shelf.wake.set()

    def start(self) -> None:
        """Begin to make what is kept, in the running loop."""
        self._started = True
        for key, shelf in self._shelves.items():
            if shelf.task is None:
                shelf.task = self._spawn(self._tend(key, shelf), self._tending)

    def claim(self, key: K) -> T | None:
        """A warm one, the caller's from now on; None: make one yourself. Either way it counts as demand for this class."""
        if self._closed or (shelf := self._shelf(key)) is None:
            return None
        return shelf.claim(self._clock())

    def forget(self, item: T) -> None:
        """A warm one died: close what is left of it, make another. Nothing happens when it was claimed or closed before."""
        if any(shelf.forget(item, self._clock()) for shelf in self._shelves.values()):
            self._dispose([item])

    async def ready(self, key: K) -> None:
        """Returns when the class has its floor, or its breaker is not closed, or the pool is. At once for one not kept."""
        shelf = self._shelves.get(key)
        while shelf and not shelf.settled and not self._closed:
            shelf.heard.clear()
            await shelf.heard.wait()

    def busy(self, n_running: int) -> None:
        """So many executions run now: as long as it is above 0, makes keep their distance."""
        self._running = n_running > 0

    def snapshot(self) -> list[dict[str, Any]]:
        """By class; times in seconds."""
        now = self._clock()
        return [
            {"class": str(key), **shelf.snapshot(self._ceiling(shelf), self._settings, now)}
            for key, shelf in self._shelves.items()
        ]

    async def aclose(self) -> None:
        """Cancels what is being made, closes all that is warm and waits for both. Again, if it was cancelled itself."""
        self._closed = True
        for task in self._tending:
            task.cancel()
        while self._tending:
            await asyncio.wait(self._tending)
        for shelf in self._shelves.values():
            self._dispose(shelf.clear())
            shelf.heard.set()
        while self._closing:
            await asyncio.wait(self._closing)

    def _shelf(self, key: K) -> Shelf[T] | None:
        """None for a new class when each of the others is kept or has something."""
        if key in self._shelves:
            self._shelves.move_to_end(key)
            return self._shelves[key]
        if len(self._shelves) >= self._settings.max_classes:
            spare = next((k for k, shelf in self._shelves.items() if not shelf.kept and not shelf.held), None)
            if spare is None:
                return None
            if task := self._shelves.pop(spare).task:
                task.cancel()
        return self._new(key)

    def _new(self, key: K) -> Shelf[T]:
        shelf = self._shelves[key] = Shelf[T]()
        if self._started:
            shelf.task = self._spawn(self._tend(key, shelf), self._tending)
        return shelf

    def _ceiling(self, shelf: Shelf[T]) -> int:
        """Those not kept share one, so that inventing classes does not get anybody more."""
        others = (other.held for other in self._shelves.values() if not other.kept and other is not shelf)
        return self._settings.ceiling - (0 if shelf.kept else sum(others))

    def _plan(self, shelf: Shelf[T]) -> Plan:
        return plan(shelf.facts(self._ceiling(shelf), self._running), self._settings, self._clock())

    async def _tend(self, key: K, shelf: Shelf[T]) -> None:
        while not _cancelled():  # a make may have answered its cancellation with a result
            shelf.wake.clear()
            step = self._plan(shelf)
            self._dispose(shelf.reclaim(step.reclaim))
            if step.make:
                await self._one_more(key, shelf)
            else:
                await self._until(step.look_at, shelf.wake)

    async def _until(self, at: float, wake: asyncio.Event) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(at) else at - self._clock()):
                await wake.wait()

    async def _one_more(self, key: K, shelf: Shelf[T]) -> None:
        shelf.making += 1
        try:
            async with nullcontext() if shelf.kept else self._turn:
                await self._attempt(key, shelf)
        finally:
            shelf.making -= 1

    async def _attempt(self, key: K, shelf: Shelf[T]) -> None:
        started = self._clock()
        try:
            async with asyncio.timeout(self._settings.make_timeout_s):
                item = await self._make(key)
        except (Exception, asyncio.CancelledError) as error:
            # Cancelled without anybody having cancelled this task: something that the make waited for was. It failed then.
            if _cancelled():
                raise
            shelf.fail(self._clock())
            _log.warning(
                "make of %s failed after %.3f s, %d in a row: %r",
                key, self._clock() - started, shelf.breaker.failures, error,
            )  # fmt: skip
        else:
            shelf.add(item, started, self._clock())

    def _dispose(self, items: list[T]) -> None:
        for item in items:
            self._spawn(self._end(item), self._closing)

    async def _end(self, item: T) -> None:
        try:
            await self._close(item)
        except Exception:
            _log.exception("close of %r failed", item)

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(_told)
        return task


def _cancelled() -> bool:
    """Somebody wants this task to end; a timeout that is over does not count."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _told(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a task of the pool ended", exc_info=error)
