"""Records of snapshots: kept as given, a tenant's own only, counted over all, brought up from older stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fumehood.errors import InvalidInput, NotFound
from fumehood.records import SandboxRecord, SnapshotRecord
from fumehood.store import Store, schema

NOW = 1_000_000.0


@pytest.fixture(params=[True, False], ids=["flushed", "quick"])
async def store(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "store.db", clock=lambda: NOW, flush=request.param)
    yield opened
    await opened.aclose()


def record(n: int = 1, tenant: str = "a", **more: Any) -> SnapshotRecord:
    made = SnapshotRecord(
        f"p{n:016x}", tenant, "k", "s1", "qemu", "python", "default", "h" * 64, '{"env":{}}', "ready", NOW, 10, {"ü": "\0"}
    )
    return replace(made, **more)


async def page(store: Store, tenant: str | None, **more: Any) -> list[str]:
    asked: dict[str, Any] = {"sandbox_id": None, "after": None, "limit": 100, **more}
    return [r.id for r in await store.snapshots.page(tenant, asked.pop("state", "ready"), **asked)]


async def test_a_record_comes_back_as_it_was_given_also_after_a_restart(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "store.db", flush=False)
    await store.snapshots.put(record())
    await store.aclose()
    store = await Store.open(tmp_path / "store.db")
    assert await store.snapshots.one("a", record().id) == record()
    assert await store.snapshots.all(frozenset({"ready"})) == [record(spec="")]
    await store.aclose()


async def test_a_second_put_changes_state_time_and_size_and_nothing_else(store: Store) -> None:
    await store.snapshots.put(record(state="making", size_bytes=500))
    await store.snapshots.put(record(spec="other", metadata={}, key_id="other", created_at=NOW + 1))
    assert await store.snapshots.one("a", record().id) == record(created_at=NOW + 1)


async def test_a_put_of_another_tenant_changes_nothing(store: Store) -> None:
    await store.snapshots.put(record())
    await store.snapshots.put(record(tenant="b", state="gone"))
    assert await store.snapshots.one(None, record().id) == record()


async def test_removing_is_for_good_and_twice_is_once(store: Store) -> None:
    await store.snapshots.put(record())
    for _ in range(2):
        await store.snapshots.remove(record().id)
    assert await store.snapshots.one(None, record().id) is None


async def test_pages_hold_a_tenants_own_once_newest_first_and_only_those_that_are_ready(store: Store) -> None:
    for n in range(12):
        await store.snapshots.put(record(n, tenant="ab"[n % 2], sandbox_id=f"s{n % 3}"))
    await store.snapshots.put(record(99, state="making"))
    await store.snapshots.put(record(98, state="gone"))
    seen: list[str] = []
    while found := await page(store, "a", after=seen[-1] if seen else None, limit=2):
        seen += found
    assert seen == [f"p{n:016x}" for n in (10, 8, 6, 4, 2, 0)]
    assert await page(store, "a", sandbox_id="s1") == [f"p{n:016x}" for n in (10, 4)]
    assert len(await page(store, None)) == 12
    for unknown in (f"p{1:016x}", "p" + "f" * 16):
        with pytest.raises(NotFound, match="to go on after"):
            await page(store, "a", after=unknown)
    with pytest.raises(InvalidInput):
        await page(store, "a", limit=0)


async def test_another_tenants_is_like_one_that_does_not_exist(store: Store) -> None:
    await store.snapshots.put(record())
    assert await store.snapshots.one("b", record().id) is None and await page(store, "b") == []


async def test_what_is_made_and_being_made_counts_and_what_was_lost_does_not(store: Store) -> None:
    assert await store.snapshots.held("a") == (0, 0)
    await store.snapshots.put(record(1, state="making", size_bytes=500))
    await store.snapshots.put(record(2))
    await store.snapshots.put(record(3, state="gone", size_bytes=7_000))
    await store.snapshots.put(record(4, tenant="b", size_bytes=100))
    assert await store.snapshots.held("a") == (2, 610)
    assert await store.snapshots.held("c") == (0, 610)


@pytest.mark.parametrize("text", ["x'; DROP TABLE snapshots; --", "\0", "", "é✓", "%s ?"])
async def test_any_text_is_kept_as_text(store: Store, text: str) -> None:
    odd = record(id=text, tenant=text, sandbox_id=text, spec=text, metadata={text: text})
    await store.snapshots.put(odd)
    assert await store.snapshots.one(text, text) == odd
    assert [r.id for r in await store.snapshots.page(text, "ready", sandbox_id=text, after=None, limit=1)] == [text]
    with pytest.raises(InvalidInput):
        await store.snapshots.put(record(sandbox_id="\ud800"))


async def test_a_store_of_the_third_generation_gets_the_table_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, current = tmp_path / "old.db", list(schema.MIGRATIONS)
    box = SandboxRecord("s1", "a", "k", "python", "native", "default", "stopped", NOW, NOW, ended_at=NOW)
    monkeypatch.setattr(schema, "MIGRATIONS", current[:3])
    store = await Store.open(path)
    await store.put_sandbox(box)
    await store.aclose()
    monkeypatch.setattr(schema, "MIGRATIONS", current)
    store = await Store.open(path)
    assert await store.sandbox("a", "s1") == box and await store.snapshots.all(frozenset({"ready"})) == []
    await store.snapshots.put(record())
    assert await page(store, "a") == [record().id]
    await store.aclose()
