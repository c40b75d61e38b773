"""What is written, in the order of asking; all that is asked for in one tick is one commit, which costs as much as a hundred.

Two connections. The loop's own takes what is small, as long as the thread has nothing to do: 0.1 ms, where handing it over and
hearing back takes the interpreter's lock eight times, each from a busy loop. It never waits: not for the disk (NORMAL: such a
commit is in the kernel's hands, safe from `kill -9`, and the thread brings it to the disk within FLUSH_S), nor for another
process's transaction. The thread's takes the rest, and all of it with `flush`; each of its commits is on the disk.

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
FLUSH_S = 0.5  # what a power cut takes at most of what was written without flush, and the disk's own time
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Item:
    work: Work
    waiter: asyncio.Future[Any] | None
    flush: bool = False


class Writer:
    """`depth`, `lost`, all methods and `quick` belong to the loop's thread; `patient` belongs to the writer's."""

    def __init__(self, patient: sqlite3.Connection, quick: sqlite3.Connection | None) -> None:
        self.depth = 0  # asked for and not yet answered
        self.lost = 0  # failed with nobody waiting: each is logged
        self._patient, self._quick = patient, quick
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[list[_Item] | None] = queue.SimpleQueue()
        self._held: list[_Item] = []  # not handed over yet
        self._timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.TimerHandle | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fumehood-store", daemon=True)
        self._thread.start()

    def post(self, work: Work) -> None:
        """Do it after all that was asked before; nobody waits. Raises CapacityExceeded when the disk doesn't keep up."""
        self._take(_Item(work, None), CAPACITY)
        if self._timer is None:
            self._timer = self._loop.call_later(POSTED_S, self._hand_over)

    async def do(self, work: Work, *, flush: bool = False) -> Any:
        """Returns what the work did, once it is committed. Cancelling stops the waiting only. `flush` also for what is long."""
        waiter = self._loop.create_future()
        self._take(_Item(work, waiter, flush), 2 * CAPACITY)
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
        if self._flush is not None:
            self._flush.cancel()
        if self._quick is not None:
            self._quick.close()

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
        """All of a tick at once."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            held, self._held = self._held, []
            if not self._written(held):
                self._queue.put(held)

    def _written(self, held: list[_Item]) -> bool:
        """Whether it could be done here and now. What the thread has was asked for before, and comes first."""
        if self._quick is None or self.depth > len(held) or any(item.flush for item in held):
            return False
        try:
            outcomes = _commit(self._quick, held)
        except sqlite3.OperationalError:
            return False
        if self._flush is None:
            self._flush = self._loop.call_later(FLUSH_S, self._flush_soon)
        self._deliver(held, outcomes)
        return True

    def _flush_soon(self) -> None:
        self._flush = None
        self._queue.put([])

    def _run(self) -> None:
        going = True
        while going:
            batch, flush = list[_Item](), False
            while going and not (batch and self._queue.empty()) and len(batch) < BATCH:
                items = self._queue.get()
                going, flush = items is not None, flush or items == []
                batch += items or ()
                if flush:
                    break
            if batch:
                outcomes = _outcomes(self._patient, batch)
                with suppress(RuntimeError):  # the loop was closed before the store: it is on disk, with nobody left to hear so
                    self._loop.call_soon_threadsafe(self._deliver, batch, outcomes)
            if flush:
                _checkpoint(self._patient)
        self._patient.close()

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


def _checkpoint(connection: sqlite3.Connection) -> None:
    """Flushes the log, then takes it into the file. It keeps nobody from writing meanwhile."""
    try:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    except sqlite3.Error as error:  # what is in the log is safe there, from everything but a power cut
        _log.error("what was written is not on the disk yet: %s", error)


def _commit(connection: sqlite3.Connection, batch: list[_Item]) -> list[Any]:
    """The outcome of each item, or the exception that is its outcome. Raises OperationalError when another process writes for
    longer than we wait; then nothing is written.
    """
    try:
        return atomically(connection, lambda: [_attempt(item, connection) for item in batch])
    except Exception as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY:
            raise
        if len(batch) <= 1:
            return [typed(error) for _ in batch]
        return [outcome for item in batch for outcome in _outcomes(connection, [item])]


def _outcomes(connection: sqlite3.Connection, batch: list[_Item]) -> list[Any]:
    try:
        return _commit(connection, batch)
    except sqlite3.OperationalError as busy:
        return [typed(busy) for _ in batch]  # alone each would wait as long again


def _attempt(item: _Item, connection: sqlite3.Connection) -> Any:
    try:
        return item.work(connection)
    except FumehoodError as error:
        return error
