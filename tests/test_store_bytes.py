"""What the store keeps is bounded in bytes: of each tenant the oldest results go, and nothing else of anybody."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fumehood.errors import InvalidInput, StoreFailed
from fumehood.records import ExecutionRecord
from fumehood.store import Store, schema
from fumehood.store.changes import REPLIES_S, RESULTS_SLICE

NOW = 1_000_000.0
FOR_EVER, ALL = 1e6, 1 << 40
WIDE = "é✓\0"  # 6 bytes, 3 characters


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "store.db", clock=clock, flush=False)
    yield opened
    await opened.aclose()


async def ran(store: Store, execution_id: str, tenant: str, result: str) -> None:
    store.begin_execution(ExecutionRecord(execution_id, "sb", tenant, "code", "running", NOW))
    await store.finish_execution(execution_id, started_at=NOW, finished_at=NOW, status="ok", cause="why", result=result)


async def prune(store: Store, max_bytes: int) -> int:
    return await store.prune(older_than_s=FOR_EVER, max_rows=ALL, max_bytes_per_tenant=max_bytes)


async def kept(store: Store, tenant: str) -> dict[str, str]:
    """The results that are there, newest first. Every record is, whatever became of its result."""
    records = [await store.execution(tenant, listed.id) for listed in await store.executions(tenant, limit=1000)]
    assert {(r.state, r.status, r.cause, r.finished_at) for r in records if r is not None} == {("done", "ok", "why", NOW)}
    return {r.id: r.result for r in records if r is not None and r.result}


async def test_the_newest_results_of_each_tenant_survive_and_a_flood_takes_nothing_of_another(store: Store) -> None:
    for n in range(2 * RESULTS_SLICE + 9):
        await ran(store, f"a{n}", "a", WIDE)
        if n % 200 == 0:
            await ran(store, f"b{n}", "b", WIDE)
    theirs = await kept(store, "b")
    assert len(theirs) == 3
    assert await prune(store, 5 * 6 + 5) == 2 * RESULTS_SLICE + 4
    assert await kept(store, "a") == {f"a{n}": WIDE for n in reversed(range(2 * RESULTS_SLICE + 4, 2 * RESULTS_SLICE + 9))}
    assert await kept(store, "b") == theirs
    assert len(await store.executions("a", limit=1000)) == 2 * RESULTS_SLICE + 9


async def test_pruning_again_takes_nothing_and_a_bound_that_is_met_exactly_is_no_breach(store: Store) -> None:
    for n in range(4):
        await ran(store, f"a{n}", "a", WIDE)
    assert await prune(store, 24) == 0
    assert [await prune(store, 23) for _ in range(3)] == [1, 0, 0]
    assert list(await kept(store, "a")) == ["a3", "a2", "a1"]
    await ran(store, "big", "a", 4 * WIDE)
    assert await prune(store, 23) == 4 and await kept(store, "a") == {}  # what is larger than the bound goes too
    with pytest.raises(InvalidInput):
        await prune(store, -1)


async def test_bytes_are_counted_since_the_last_prune_that_succeeded(store: Store, tmp_path: Path) -> None:
    await ran(store, "a0", "a", WIDE)
    await ran(store, "b0", "b", WIDE)
    assert store.unpruned_bytes == 12
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        await prune(store, ALL)
        assert store.unpruned_bytes == 0
        await ran(store, "a1", "a", WIDE)
        other.execute("ALTER TABLE replies RENAME TO gone")
        with pytest.raises(StoreFailed):
            await prune(store, ALL)
        other.execute("ALTER TABLE gone RENAME TO replies")
    assert store.unpruned_bytes == 6


async def test_a_reply_is_forgotten_after_a_day_however_long_records_are_kept(store: Store, clock: Clock) -> None:
    await ran(store, "a0", "a", WIDE)
    for key in ("kept", "pending"):
        assert await store.claim_reply("a", key, "d") is None
    store.keep_reply("a", "kept", 200, "{}")
    clock.now += REPLIES_S
    assert await prune(store, ALL) == 0
    clock.now += 1
    assert await prune(store, ALL) == 1
    assert await store.claim_reply("a", "kept", "d") is None
    pending = await store.claim_reply("a", "pending", "d")
    assert pending is not None and pending.status == 0 and await kept(store, "a") == {"a0": WIDE}


async def test_a_store_of_the_second_generation_is_brought_up_with_its_results_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, current = tmp_path / "old.db", list(schema.MIGRATIONS)
    monkeypatch.setattr(schema, "MIGRATIONS", current[:2])
    schema.prepare(path, 1.0, check=False)
    with contextlib.closing(sqlite3.connect(path)) as db:
        row = "INSERT INTO executions VALUES (?, ?, 'sb', 'a', 'code', ?, 1, 1, ?, ?, 'why', ?)"
        db.executemany(row, [(n, f"a{n}", "done", NOW, "ok", WIDE) for n in range(1, 4)])
        db.execute(row, (4, "a4", "running", None, None, ""))
        db.commit()
    monkeypatch.setattr(schema, "MIGRATIONS", current)
    store = await Store.open(path, exclusive=False, clock=lambda: NOW)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(current),)
        assert db.execute("SELECT result_bytes FROM executions ORDER BY seq").fetchall() == [(6,), (6,), (6,), (0,)]
    before = await store.execution("a", "a2")
    assert before is not None and before.result == WIDE
    assert await prune(store, 6) == 2
    assert await store.execution("a", "a2") == replace(before, result="")
    newest = await store.execution("a", "a3")
    assert newest is not None and newest.result == WIDE
    await store.aclose()
