"""One thread that writes, in the order of asking, and commits all that waits at once: one commit costs as much as a hundred
writes.

Works are functions of the connection. One that raises a FumehoodError must have written nothing before: its neighbours in the
transaction stay. On any other failure the transaction is undone and each work is tried alone, so that only the bad one fails.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fumehood.errors import CapacityExceeded, FumehoodError, StoreFailed
from fumehood.store.rows import typed
from fumehood.store.schema import atomically

Work = Callable[[sqlite3.Connection], Any]
CAPACITY = 4096  # works nobody waits for; those with a waiter may be as many again, so that what was begun can be finished
BATCH = 512
POSTED_S = 0.005  # how long a work that nobody waits for may wait for company
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Item:
    work: Work
    waiter: asyncio.Future[Any] | None


class Writer:
    """`depth`, `lost` and all methods belong to the loop's thread; the connection belongs to the writer's."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.depth = 0  # asked for and not yet answered
        self.lost = 0  # failed with nobody waiting: each is logged
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[_Item] | None] = queue.SimpleQueue()
        self._held: list[_Item] = []  # not handed over yet
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fumehood-store", daemon=True)
        self._thread.start()

    def post(self, work: Work) -> None:
        """Do it after all that was asked before; nobody waits. Raises CapacityExceeded when the disk doesn't keep up."""
        self._take(_Item(work, None), CAPACITY)
        if self._timer is None:
            self._timer = self._loop.call_later(POSTED_S, self._hand_over)

    async def do(self, work: Work) -> Any:
        """Returns what the work did, once it is committed. Cancelling stops the waiting only."""
        waiter = self._loop.create_future()
        self._take(_Item(work, waiter), 2 * CAPACITY)
        self._loop.call_soon(self._hand_over)
        return await waiter

    async def settled(self) -> None:
        """All that was posted before is committed: a reader sees what its own caller wrote."""
        if self.depth:
            await self.do(lambda _: None)

    async def aclose(self) -> None:
        """Commits what was asked before."""
        if not self._closed:
            self._closed = True
            self._hand_over()
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _take(self, item: _Item, capacity: int) -> None:
        if self._closed:
            raise StoreFailed("the store is closed", cause="its server is stopping", remediation="ask a running server")
        if self.depth >= capacity:
            raise CapacityExceeded(
                "the store does not keep up", cause=f"{self.depth} writes wait for the disk", remediation="try again later"
            )
        self.depth += 1
        self._held.append(item)

    def _hand_over(self) -> None:
        """All of a tick at once: each waking of the thread takes the interpreter's lock from the loop for a while."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            held, self._held = self._held, []
            self._queue.put(held)

    def _run(self) -> None:
        going = True
        while going:
            batch: list[_Item] = []
            while going and not (batch and self._queue.empty()) and len(batch) < BATCH:
                if items := self._queue.get():
                    batch += items
                else:
                    going = False
            outcomes = self._commit(batch)
            with suppress(RuntimeError):  # the loop was closed before the store: it is on disk, and nobody is left to hear so
                self._loop.call_soon_threadsafe(self._deliver, batch, outcomes)
        self._connection.close()

    def _commit(self, batch: list[_Item]) -> list[Any]:
        """The outcome of each item, or the exception that is its outcome."""
        try:
            return atomically(self._connection, lambda: [self._attempt(item) for item in batch])
        except Exception as error:
            if len(batch) <= 1 or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY:
                return [typed(error) for _ in batch]  # locked for longer than we wait: alone each would wait as long again
            return [outcome for item in batch for outcome in self._commit([item])]

    def _attempt(self, item: _Item) -> Any:
        try:
            return item.work(self._connection)
        except FumehoodError as error:
            return error

    def _deliver(self, batch: list[_Item], outcomes: list[Any]) -> None:
        self.depth -= len(batch)
        for item, outcome in zip(batch, outcomes, strict=True):
            if item.waiter and not item.waiter.done():
                _answer(item.waiter, outcome)
            elif isinstance(outcome, Exception):
                self.lost += 1
                _log.error("a write that nobody waits for failed: %s", outcome)


def _answer(waiter: asyncio.Future[Any], outcome: Any) -> None:
    if isinstance(outcome, Exception):
        waiter.set_exception(outcome)
    else:
        waiter.set_result(outcome)
