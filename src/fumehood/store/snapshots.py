"""Snapshots of sandboxes: whose each is, and what a sandbox that goes on from it is made with."""

from __future__ import annotations

from fumehood.records import SnapshotRecord, SnapshotState
from fumehood.store import changes, rows
from fumehood.store.reader import Reader
from fumehood.store.writer import Writer

_TABLE = "snapshots"
_REPLACED = "state = excluded.state, created_at = excluded.created_at, size_bytes = excluded.size_bytes"
_INSERTED = rows.insertion(_TABLE, SnapshotRecord)
_PUT = f"{_INSERTED} ON CONFLICT (id) DO UPDATE SET {_REPLACED} WHERE tenant = excluded.tenant"
_REMOVE = f"DELETE FROM {_TABLE} WHERE id = ?"


class SnapshotTable:
    """Part of the store, with its errors. All of it reaches the disk at once: nobody finds files that no record names."""

    def __init__(self, reader: Reader, writer: Writer) -> None:
        self._reader, self._writer = reader, writer

    async def put(self, record: SnapshotRecord) -> None:
        """Insert; of one that is there, change what can change: state, time, size."""
        await self._writer.do(changes.statement(_PUT, *rows.pack(record)), flush=True)

    async def remove(self, snapshot_id: str) -> None:
        """Nothing happens when there is none."""
        await self._writer.do(changes.statement(_REMOVE, snapshot_id), flush=True)

    async def one(self, tenant: str | None, snapshot_id: str) -> SnapshotRecord | None:
        return await self._reader.one(SnapshotRecord, _TABLE, {"id = ?": snapshot_id, "tenant = ?": tenant})

    async def page(
        self, tenant: str | None, state: SnapshotState, *, sandbox_id: str | None, after: str | None, limit: int
    ) -> list[SnapshotRecord]:
        """Newest first; `after` is the id that the last page ended with (NotFound when it is gone)."""
        conditions = {"tenant = ?": tenant, "state = ?": state, "sandbox_id = ?": sandbox_id}
        return await self._reader.newest(SnapshotRecord, _TABLE, conditions, after, limit, frozenset({"spec"}))

    async def held(self, tenant: str) -> tuple[int, int]:
        """How many the tenant has; how many bytes those of all tenants have together. Lost ones do not count."""
        return await self._reader.snapshots_held(tenant)

    async def all(self, states: frozenset[SnapshotState]) -> list[SnapshotRecord]:
        return await self._reader.rows(SnapshotRecord, _TABLE, {"state IN (?)": states}, "ORDER BY seq", frozenset({"spec"}))
