"""What the service remembers, in one SQLite file (WAL): keys, histories, replies, events, snapshots. Only here is SQL.

What was acknowledged survives `kill -9` of the server at any moment. With `flush` it survives a power cut too, as keys and
their revocation always do; without it a power cut takes the last half second of histories, never the file's soundness.

finish_execution, p50/p99 in ms (2 cores, virtual ext4 disk, uvloop): with `flush` one caller 0.34/2.9,
32 callers 1.2/4.6; without 0.07/0.31 and 0.71/1.4 (bench of begin_execution, 1 ms, finish_execution).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fumehood.errors import CapacityExceeded, InvalidInput, StoreFailed
from fumehood.model import Status
from fumehood.records import ApiKey, EventRecord, ExecutionRecord, IdempotentReply, Recovered, SandboxRecord
from fumehood.store import changes, rows
from fumehood.store.reader import Reader
from fumehood.store.schema import connect, lock, prepare
from fumehood.store.snapshots import SnapshotTable
from fumehood.store.writer import Writer

MAX_EVENT_BYTES = 16 * 1024
LONG_BYTES = 128 * 1024  # a result that is not written between two looks at the sockets
LEFT_BEHIND = "the server was killed while this was alive"


class Store:
    """Used from one asyncio loop. Every method may raise StoreFailed (disk full, locked, damaged, closed), CapacityExceeded
    (the disk does not keep up) and InvalidInput (a text that is not Unicode, a number out of range).

    `tenant` None means all of them: for admins only. Another tenant's row is answered like one that does not exist.
    """

    def __init__(self, reader: Reader, writer: Writer, clock: Callable[[], float]) -> None:
        self.recovered = Recovered()
        self.unpruned_bytes = 0  # of results, since the last prune that succeeded began
        self._reader, self._writer, self._clock = reader, writer, clock
        self.snapshots = SnapshotTable(reader, writer)
        self._held: int | None = None

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        exclusive: bool = True,
        flush: bool = True,
        busy_s: float = 5.0,
    ) -> Store:
        """Make or migrate the file. `exclusive` is for the one server: it holds the lock and ends what a killed one left alive.

        Others (`keys create` beside a running server) pass False. Raises StoreFailed when the file is not safely ours, damaged,
        of a newer generation, or another server (named by pid) holds it.
        """
        held = lock(path) if exclusive else None
        try:
            await asyncio.to_thread(prepare, path, busy_s, check=exclusive)
            quick = None if flush else connect(path, 0.0, flush=False)
            store = cls(Reader(connect(path, busy_s)), Writer(connect(path, busy_s), quick), clock)
        except BaseException:
            if held is not None:
                os.close(held)
            raise
        store._held = held
        if exclusive:
            await store._start_over()
        return store

    async def _start_over(self) -> None:
        try:
            self.recovered = await self.recover(LEFT_BEHIND)
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Commits what was asked before, lets go of the file. Twice is once."""
        await self._reader.aclose()
        await self._writer.aclose()
        held, self._held = self._held, None
        if held is not None:
            os.close(held)

    @property
    def lost(self) -> int:
        """Writes that nobody waited for and that failed (logged each): for the metrics."""
        return self._writer.lost

    # -- keys

    async def add_key(self, key: ApiKey) -> None:
        """Raises Conflict when its id is taken."""
        await self._do(rows.insertion("keys", ApiKey), *rows.pack(key), flush=True)

    async def key(self, key_id: str) -> ApiKey | None:
        """A revoked one too: see its `revoked_at`."""
        return await self._reader.one(ApiKey, "keys", {"id = ?": key_id})

    async def keys(self, tenant: str | None = None) -> list[ApiKey]:
        return await self._reader.rows(ApiKey, "keys", {"tenant = ?": tenant}, "ORDER BY created_at, id")

    async def revoke_key(self, key_id: str) -> bool:
        """False when there is no such key or it was revoked before."""
        return await self._do(changes.REVOKE, self._clock(), key_id, flush=True) == 1

    # -- sandboxes

    async def put_sandbox(self, record: SandboxRecord) -> None:
        """Insert, or replace by id. Raises InvalidTransition when it would bring an ended one back to life, Conflict when the
        id is another tenant's.
        """
        await self._writer.do(changes.put_sandbox(record))

    async def end_sandbox(self, sandbox_id: str, cause: str) -> None:
        """The first cause stays: a second end (expiry against kill) changes nothing. Raises NotFound."""
        await self._writer.do(changes.end_sandbox(sandbox_id, self._clock(), cause))

    async def sandbox(self, tenant: str | None, sandbox_id: str) -> SandboxRecord | None:
        return await self._reader.one(SandboxRecord, "sandboxes", {"id = ?": sandbox_id, "tenant = ?": tenant})

    async def sandboxes(
        self, tenant: str | None, *, states: frozenset[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[SandboxRecord]:
        """Newest first; `after` is the id that the last page ended with (NotFound when it is gone). `limit` 1 to 1000."""
        conditions = {"tenant = ?": tenant, "state IN (?)": states}
        return await self._reader.newest(SandboxRecord, "sandboxes", conditions, after, limit)

    # -- executions

    def begin_execution(self, record: ExecutionRecord) -> None:
        """Written after what was asked before; does not wait. A failed write is found by finish_execution as NotFound."""
        self._writer.post(changes.statement(rows.insertion("executions", ExecutionRecord), *rows.pack(record)))

    async def finish_execution(
        self, execution_id: str, *, started_at: float | None, finished_at: float, status: Status, cause: str, result: str
    ) -> None:
        """Returns when it is committed. The first word wins: a second raises InvalidTransition. NotFound if it never began."""
        finish = changes.finish(execution_id, started_at, finished_at, status, cause, result)
        try:
            await self._writer.do(finish, flush=len(result) > LONG_BYTES)
        finally:  # once it is there: a prune that began before may have missed it
            self.unpruned_bytes += len(result.encode())

    async def execution(self, tenant: str | None, execution_id: str) -> ExecutionRecord | None:
        await self._writer.settled()
        return await self._reader.one(ExecutionRecord, "executions", {"id = ?": execution_id, "tenant = ?": tenant})

    async def executions(
        self, tenant: str | None, *, sandbox_id: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[ExecutionRecord]:
        """As `sandboxes`: newest first, in the order in which they began. Without results: a page of them may be gigabytes."""
        await self._writer.settled()
        conditions = {"tenant = ?": tenant, "sandbox_id = ?": sandbox_id}
        return await self._reader.newest(ExecutionRecord, "executions", conditions, after, limit, frozenset({"result"}))

    # -- idempotency

    async def claim_reply(self, tenant: str, key: str, body_digest: str) -> IdempotentReply | None:
        """None: the key is yours now, and pending (status 0) until keep_reply or drop_reply. Else what it was used for before.

        Raises Conflict when that was another request. A caller who is cancelled meanwhile has not claimed anything.
        """
        claim = changes.Claim(IdempotentReply(tenant, key, body_digest, 0, "", self._clock()))
        try:
            return await self._writer.do(claim)
        except asyncio.CancelledError:
            with suppress(CapacityExceeded, StoreFailed):  # then it stays pending until the next start drops it
                self._writer.post(claim.undo)
            raise

    def keep_reply(self, tenant: str, key: str, status: int, body: str) -> None:
        """Written soon; nobody waits: a reply that a crash loses was one that its caller may have got. A kept one stays."""
        self._writer.post(changes.statement(changes.KEEP_REPLY, status, body, tenant, key))

    async def drop_reply(self, tenant: str, key: str) -> None:
        """The first attempt failed before it did anything: the key may be used again. A kept reply stays."""
        await self._do(changes.DROP_REPLY, tenant, key)

    # -- events

    async def last_seq(self) -> int:
        """Of all events that ever were, 0 when there was none: a forgotten one's is not used again."""
        return await self._reader.last_seq()

    def append_event(self, tenant: str, sandbox_id: str, kind: str, data: Mapping[str, Any], *, seq: int | None = None) -> None:
        """Queued. Data of more than MAX_EVENT_BYTES of JSON becomes {"dropped_bytes": n}: that it happened is not lost.

        `seq` None = the next one; whoever also hands events on must give it himself.
        """
        text = rows.to_json(dict(data))
        text = text if len(text) <= MAX_EVENT_BYTES else rows.to_json({"dropped_bytes": len(text)})
        self._writer.post(changes.statement(changes.APPEND, seq, tenant, sandbox_id, self._clock(), kind, text))

    async def events(self, tenant: str | None, after_seq: int, limit: int = 500) -> list[EventRecord]:
        """Oldest first, those with a `seq` above `after_seq`."""
        await self._writer.settled()
        conditions = {"tenant = ?": tenant, "seq > ?": after_seq}
        return await self._reader.rows(EventRecord, "events", conditions, f"ORDER BY seq LIMIT {rows.page(limit)}")

    # -- upkeep

    async def recover(self, cause: str) -> Recovered:
        """End what is alive: sandboxes are stopped, executions done as `killed`, pending replies dropped. For a start."""
        return await self._writer.do(changes.recover(self._clock(), cause), flush=True)

    async def prune(self, *, older_than_s: float, max_rows: int, max_bytes_per_tenant: int) -> int:
        """Forget what ended more than `older_than_s` ago, replies of more than a day, the oldest executions, events and replies
        above `max_rows` of each, and of each tenant the oldest results above `max_bytes_per_tenant`, whose records stay.

        Returns how many rows and results went. What is alive stays: sandboxes not stopped, executions not done, replies
        pending. It goes in slices, so that nobody waits long behind it.
        """
        if min(max_rows, max_bytes_per_tenant) < 0:
            raise InvalidInput("a bound below 0", cause="it counts rows, or bytes", remediation="give 0 or more")
        counted, self.unpruned_bytes = self.unpruned_bytes, 0
        try:
            return await self._prune(self._clock(), older_than_s, max_rows, max_bytes_per_tenant)
        except BaseException:
            self.unpruned_bytes += counted
            raise

    async def _prune(self, now: float, older_than_s: float, max_rows: int, max_bytes: int) -> int:
        over = await self._reader.over(max_bytes)
        cutoff, replies_cutoff = now - older_than_s, now - min(older_than_s, changes.REPLIES_S)
        # At once: one after the other each would wait behind a round of new results, and the bound would not hold meanwhile.
        gone = await asyncio.gather(
            *(self._slices(changes.FORGET_RESULTS, *tenant_and_seq) for tenant_and_seq in over),
            self._slices(changes.FORGET_EXECUTIONS, cutoff, max_rows),
            self._slices(changes.FORGET_EVENTS, cutoff, max_rows),
            self._slices(changes.FORGET_REPLIES, replies_cutoff, max_rows),
        )
        # A sandbox goes after the last of its executions.
        return sum(gone) + await self._slices(changes.FORGET_SANDBOXES, cutoff, max_rows)

    async def _slices(self, statement: str, *values: Any) -> int:
        gone = 0
        while slice_ := await self._do(statement, *values, flush=True):
            gone += slice_
        return gone

    async def _do(self, statement: str, *values: Any, flush: bool = False) -> int:
        return await self._writer.do(changes.statement(statement, *values), flush=flush)
