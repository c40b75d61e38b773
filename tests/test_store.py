"""The store keeps what it acknowledged, shows a tenant its own rows only, and fails in words."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fumehood.errors import CapacityExceeded, Conflict, InvalidInput, InvalidTransition, NotFound, StoreFailed
from fumehood.records import ApiKey, ExecutionRecord, IdempotentReply, KeyLimits, Recovered, SandboxRecord
from fumehood.store import MAX_EVENT_BYTES, Store, schema, writer

pytestmark = pytest.mark.rootless
NOW = 1_000_000.0
INJECTION = "x'; DROP TABLE executions; -- \" ) %s ? ?1"


@pytest.fixture(params=[True, False], ids=["flushed", "quick"])
async def store(tmp_path, request):
    opened = await Store.open(tmp_path / "store.db", clock=lambda: NOW, flush=request.param)
    yield opened
    await opened.aclose()


def box(sandbox_id: str = "sb1", tenant: str = "a", state: str = "ready", **more) -> SandboxRecord:
    return SandboxRecord(sandbox_id, tenant, "k1", "python", "native", "default", state, NOW, NOW + 300, **more)


def begun(execution_id: str = "ex1", tenant: str = "a", sandbox_id: str = "sb1") -> ExecutionRecord:
    return ExecutionRecord(execution_id, sandbox_id, tenant, "code", "running", NOW)


async def finish(store: Store, execution_id: str = "ex1", **more) -> None:
    outcome = {"started_at": NOW, "finished_at": NOW + 1, "status": "ok", "cause": "", "result": "{}"} | more
    await store.finish_execution(execution_id, **outcome)


def direct(path: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(path))


# -- what is kept comes back


async def test_every_record_comes_back_as_it_was_given_also_after_a_restart(tmp_path):
    path = tmp_path / "store.db"
    key = ApiKey("k1", "a", "ab" * 32, frozenset({"admin", "sandboxes"}), "n", KeyLimits(priority=-3), frozenset({"x"}), NOW)
    record = box(state="stopped", metadata={"ü": "\0"}, auto_resume=True, on_expiry="pause", ended_at=NOW + 9, cause="idle")
    store = await Store.open(path, clock=lambda: NOW)
    await store.add_key(key)
    await store.put_sandbox(record)
    store.begin_execution(begun())
    await finish(store, result='{"stdout": "é"}', cause="c")
    store.append_event("a", "sb1", "started", {"n": [1, None, {"x": "y"}]})
    assert await store.claim_reply("a", "i", "d") is None
    store.keep_reply("a", "i", 201, "body")
    await store.aclose()

    store = await Store.open(path, clock=lambda: NOW + 50)
    assert store.recovered == Recovered()
    assert await store.key("k1") == key and await store.keys() == await store.keys("a") == [key]
    assert await store.sandbox("a", "sb1") == record
    done = replace(begun(), state="done", started_at=NOW, finished_at=NOW + 1, status="ok", cause="c", result='{"stdout": "é"}')
    assert await store.execution("a", "ex1") == done
    (event,) = await store.events("a", 0)
    assert asdict(event) == {
        "seq": 1, "tenant": "a", "sandbox_id": "sb1", "at": NOW, "kind": "started", "data": {"n": [1, None, {"x": "y"}]},
    }  # fmt: skip
    assert await store.claim_reply("a", "i", "d") == IdempotentReply("a", "i", "d", 201, "body", NOW)
    await store.aclose()


async def test_an_execution_is_readable_as_soon_as_it_was_begun(store):
    for n in range(50):
        store.begin_execution(begun(f"ex{n}"))
        assert await store.execution("a", f"ex{n}") == begun(f"ex{n}")


async def test_a_second_finish_is_refused_and_the_first_word_stays(store):
    store.begin_execution(begun())
    told = await asyncio.gather(*(finish(store, cause=str(n)) for n in range(8)), return_exceptions=True)
    assert [type(t) for t in told] == [type(None)] + [InvalidTransition] * 7
    assert (await store.execution("a", "ex1")).cause == "0"
    with pytest.raises(NotFound):
        await finish(store, "never begun")


async def test_a_doubled_id_is_refused_and_the_first_record_stays(store):
    key = ApiKey("k1", "a", "d", frozenset())
    await store.add_key(key)
    with pytest.raises(Conflict):
        await store.add_key(replace(key, tenant="b"))
    await store.put_sandbox(box())
    with pytest.raises(Conflict):
        await store.put_sandbox(box(tenant="b"))
    store.begin_execution(begun())
    store.begin_execution(begun(tenant="b"))  # nobody waits for it: it is counted and logged
    assert (await store.execution(None, "ex1")).tenant == "a" and store.lost == 1
    assert (await store.key("k1")).tenant == (await store.sandbox(None, "sb1")).tenant == "a"


async def test_a_revoked_key_says_so_and_can_be_revoked_once(store):
    await store.add_key(ApiKey("k1", "a", "d", frozenset()))
    assert [await store.revoke_key("k1"), await store.revoke_key("k1"), await store.revoke_key("other")] == [True, False, False]
    assert (await store.key("k1")).revoked_at == NOW


async def test_an_ended_sandbox_stays_ended_with_its_first_cause(store):
    await store.put_sandbox(box())
    await store.put_sandbox(box(state="paused"))
    assert (await store.sandbox("a", "sb1")).state == "paused"
    await store.end_sandbox("sb1", "expired")
    await store.end_sandbox("sb1", "killed by its owner")
    with pytest.raises(InvalidTransition):
        await store.put_sandbox(box(state="ready"))
    with pytest.raises(NotFound):
        await store.end_sandbox("sb2", "")
    assert await store.sandbox("a", "sb1") == box(state="stopped", ended_at=NOW, cause="expired")


async def test_pages_list_everything_once_newest_first(store):
    for n in range(25):
        await store.put_sandbox(box(f"sb{n:02}", tenant="ab"[n % 2], state=("ready", "stopped", "paused")[n % 3]))
        store.begin_execution(begun(f"ex{n:02}", tenant="ab"[n % 2], sandbox_id=f"sb{n % 4}"))
    for ask, prefix in ((store.sandboxes, "sb"), (store.executions, "ex")):
        seen, after = [], None
        while page := await ask("a", after=after, limit=4):
            after = page[-1].id
            seen += [r.id for r in page]
        assert seen == [f"{prefix}{n:02}" for n in range(24, -1, -2)]
        assert len(await ask(None)) == 25
    live = await store.sandboxes("a", states=frozenset({"ready", "paused"}))
    assert [r.id for r in live] == [f"sb{n:02}" for n in range(24, -1, -2) if n % 3 != 1]
    assert await store.sandboxes("a", states=frozenset()) == []
    assert {r.sandbox_id for r in await store.executions("a", sandbox_id="sb2")} == {"sb2"}


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_page_without_bound_is_refused(store, limit):
    for ask in (store.sandboxes("a", limit=limit), store.executions("a", limit=limit), store.events("a", 0, limit=limit)):
        with pytest.raises(InvalidInput):
            await ask


# -- idempotency


async def test_of_many_that_claim_one_key_at_once_exactly_one_gets_it(store):
    told = await asyncio.gather(*(store.claim_reply("a", "i", "d") for _ in range(20)))
    assert told.count(None) == 1 and {t.status for t in told if t} == {0}
    with pytest.raises(Conflict):
        await store.claim_reply("a", "i", "another body")
    assert await store.claim_reply("b", "i", "another tenant") is None


async def test_a_dropped_key_may_be_used_again_and_a_kept_one_stays(store):
    assert await store.claim_reply("a", "i", "d") is None
    await store.drop_reply("a", "i")
    assert await store.claim_reply("a", "i", "other") is None
    store.keep_reply("a", "i", 200, "body")
    await store.drop_reply("a", "i")
    assert (await store.claim_reply("a", "i", "other")).body == "body"
    store.keep_reply("a", "i", 500, "second word")
    assert (await store.claim_reply("a", "i", "other")).body == "body"
    store.keep_reply("a", "never claimed", 200, "")
    assert await store.claim_reply("a", "never claimed", "d") is None


async def test_a_claim_whose_caller_went_away_leaves_the_key_free_and_never_frees_anothers(store):
    assert await store.claim_reply("a", "owned", "d") is None
    claims = [asyncio.ensure_future(store.claim_reply("a", key, "d")) for key in ("gone", "owned")]
    await asyncio.sleep(0)  # both are with the writer; their answers can't have been delivered
    for claim in claims:
        claim.cancel()
    await asyncio.gather(*claims, return_exceptions=True)
    assert all(claim.cancelled() for claim in claims)
    assert await store.claim_reply("a", "gone", "d") is None
    assert (await store.claim_reply("a", "owned", "d")).status == 0


# -- events


async def test_events_are_numbered_over_all_tenants_and_a_number_is_never_used_twice(store):
    for n in range(6):
        store.append_event("ab"[n % 2], "sb", f"k{n}", {})
    assert [e.seq for e in await store.events(None, 0)] == [1, 2, 3, 4, 5, 6]
    assert [(e.seq, e.kind) for e in await store.events("a", 1, limit=2)] == [(3, "k2"), (5, "k4")]
    assert await store.prune(older_than_s=-1, max_rows=0, max_bytes_per_tenant=0) == 6
    store.append_event("a", "sb", "after", {})
    assert [e.seq for e in await store.events("a", 0)] == [7]


async def test_an_event_with_too_much_data_is_kept_without_it_and_says_so(store):
    store.append_event("a", "sb", "big", {"x": "y" * MAX_EVENT_BYTES})
    store.append_event("a", "sb", "fits", {"x": "y" * (MAX_EVENT_BYTES - 8)})
    big, fits = await store.events("a", 0)
    assert big.data == {"dropped_bytes": MAX_EVENT_BYTES + 8} and len(fits.data["x"]) == MAX_EVENT_BYTES - 8
    for data in ({"x": object()}, {"x": float("nan")}, {"x": b"raw"}):
        with pytest.raises(InvalidInput):
            store.append_event("a", "sb", "k", data)


# -- tenants and hostile text


async def test_no_query_shows_another_tenants_rows_h14(store):
    await store.add_key(ApiKey("k1", "a", "d", frozenset()))
    await store.put_sandbox(box())
    store.begin_execution(begun())
    store.append_event("a", "sb1", "k", {})
    await store.claim_reply("a", "i", "d")
    for other in ("b", "A", "a ", "", "%", "a\0", INJECTION):
        assert await store.sandbox(other, "sb1") is None and await store.execution(other, "ex1") is None
        assert await store.keys(other) == await store.sandboxes(other) == await store.executions(other) == []
        assert await store.events(other, 0) == [] == await store.executions(other, sandbox_id="sb1")
        for ask, last in ((store.sandboxes, "sb1"), (store.executions, "ex1")):
            with pytest.raises(NotFound) as theirs:
                await ask(other, after=last)
            with pytest.raises(NotFound) as nobodys:
                await ask(other, after="zz1")
            assert str(theirs.value).replace(last, "") == str(nobodys.value).replace("zz1", "")
        await store.drop_reply(other, "i")
    assert (await store.claim_reply("a", "i", "d")).status == 0


@pytest.mark.parametrize("text", [INJECTION, "\0", "a\0b", "\U0001f9ea ü", "\u202e", "", "x" * 100_000, "\n'\"\\"])
async def test_any_text_is_data(store, text):
    await store.add_key(key := ApiKey(text, text, text, frozenset({text}), text, compat=frozenset({text})))
    await store.put_sandbox(record := box(text, text, metadata={text: text}, cause=text))
    store.begin_execution(replace(begun(text, text, text), cause=text))
    await finish(store, text, cause=text, result=text)
    store.append_event(text, text, text, {"x": text[:1000]})
    assert await store.claim_reply(text, text, text) is None
    store.keep_reply(text, text, 200, text)
    assert await store.key(text) == key and await store.keys(text) == [key]
    assert await store.sandbox(text, text) == record and await store.sandboxes(text, after=text) == []
    assert (await store.execution(text, text)).result == text
    assert [e.result for e in await store.executions(text, sandbox_id=text)] == [""], "a page of results may be gigabytes"
    assert [(e.tenant, e.kind, e.data["x"]) for e in await store.events(text, 0)] == [(text, text, text[:1000])]
    assert (await store.claim_reply(text, text, text)).body == text
    assert await store.sandboxes(text, states=frozenset({text})) == []
    await store.end_sandbox(text, text)
    assert await store.revoke_key(text)


async def test_half_a_surrogate_pair_and_numbers_that_do_not_fit_are_refused_at_once(store):
    bad = "\ud800"
    for call in (
        lambda: store.add_key(ApiKey(bad, "a", "d", frozenset())),
        lambda: store.key(bad),
        lambda: store.keys(bad),
        lambda: store.put_sandbox(box(cause=bad)),
        lambda: store.put_sandbox(replace(box(), end_at=float("inf"))),
        lambda: store.end_sandbox(bad, ""),
        lambda: store.sandbox(bad, "x"),
        lambda: store.sandboxes("a", after=bad),
        lambda: store.sandboxes("a", states=frozenset({bad})),
        lambda: store.claim_reply("a", bad, "d"),
        lambda: store.events("a", 1 << 70),
        lambda: finish(store, result=bad),
        lambda: finish(store, finished_at=float("nan")),
        lambda: store.put_sandbox(replace(box(), tenant=None)),
    ):
        with pytest.raises(InvalidInput):
            await call()
    with pytest.raises(InvalidInput):
        store.begin_execution(begun(bad))
    assert store.lost == 0


# -- a disk that fails, a disk that hangs


async def test_a_full_disk_fails_its_writers_in_words_and_the_store_goes_on_when_there_is_room(store):
    pages = await store._writer.do(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    await store._writer.do(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 8}"))
    big = asyncio.gather(*(store.put_sandbox(box(f"big{n}", cause="x" * 1_000_000)) for n in range(3)), return_exceptions=True)
    small = store.put_sandbox(box("small"))
    *failures, ok = [*await big, await small]
    assert ok is None and [type(f) for f in failures] == [StoreFailed] * 3 and "FULL" in str(failures[0])
    await store._writer.do(lambda db: db.execute("PRAGMA max_page_count = 1000000"))
    await store.put_sandbox(box("later", cause="x" * 1_000_000))
    assert [r.id for r in await store.sandboxes("a")] == ["later", "small"]


async def test_a_failure_that_nobody_waits_for_is_counted_and_its_finish_is_told(store, caplog):
    pages = await store._writer.do(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    await store._writer.do(lambda db: db.execute(f"PRAGMA max_page_count = {pages}"))
    for n in range(40):
        store.begin_execution(replace(begun(f"ex{n}"), cause="x" * 100_000))
    with pytest.raises(NotFound):
        await finish(store, "ex0")
    assert store.lost >= 1 and "nobody waits for failed" in caplog.text


async def test_another_process_that_holds_the_file_for_too_long_fails_the_write_and_not_the_store(tmp_path):
    path = tmp_path / "store.db"
    store = await Store.open(path, busy_s=0.05)
    with direct(path) as other:
        other.execute("BEGIN IMMEDIATE")
        told = await asyncio.gather(*(store.put_sandbox(box(f"sb{n}")) for n in range(5)), return_exceptions=True)
        assert {type(t) for t in told} == {StoreFailed} and "locked" in str(told[0])
        assert await store.sandboxes("a") == []  # readers don't mind
        other.rollback()
    await store.put_sandbox(box())
    assert len(await store.sandboxes("a")) == 1
    await store.aclose()


async def test_a_disk_that_hangs_is_felt_by_callers_and_not_by_memory_h15(store, monkeypatch):
    monkeypatch.setattr(writer, "CAPACITY", 100)
    with direct(store_path(store)) as other:
        other.execute("BEGIN IMMEDIATE")
        for n in range(100):
            store.begin_execution(begun(f"ex{n}"))
        with pytest.raises(CapacityExceeded) as refused:
            store.begin_execution(begun("one too many"))
        assert refused.value.retryable
        finishing = asyncio.gather(*(finish(store, f"ex{n}") for n in range(100)))  # what was begun can still be finished
        await asyncio.sleep(0)
        with pytest.raises(CapacityExceeded):
            await store.put_sandbox(box())
        other.rollback()
    await finishing
    assert {r.state for r in await store.executions("a", limit=1000)} == {"done"}


async def test_without_flush_a_write_goes_behind_those_that_wait_for_another_process(tmp_path):
    store = await Store.open(tmp_path / "store.db", flush=False)
    with direct(store_path(store)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.begin_execution(begun())
        waiting = [asyncio.create_task(finish(store, "ex1"))]
        await asyncio.sleep(0.05)  # long enough for a write in the loop, which nothing held up
        waiting += [asyncio.create_task(store.put_sandbox(box(f"sb{n}"))) for n in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        other.rollback()
    await asyncio.gather(*waiting)
    assert (await store.execution("a", "ex1")).state == "done" and len(await store.sandboxes("a")) == 3
    await store.aclose()


async def test_without_flush_what_was_written_is_in_the_file_itself_soon_after(tmp_path):
    store = await Store.open(tmp_path / "store.db", flush=False)
    await store.put_sandbox(box())
    copy = tmp_path / "copy.db"
    async with asyncio.timeout(10):
        while True:  # the file without its log, as it is after a power cut that took all that was not on the disk
            copy.write_bytes((tmp_path / "store.db").read_bytes())
            with direct(copy) as file:
                if file.execute("SELECT count(*) FROM sandboxes").fetchone()[0] == 1:
                    break
            await asyncio.sleep(0.05)
    await store.aclose()


async def test_a_key_and_its_revocation_are_on_the_disk_first_whatever_the_rest_does(tmp_path):
    store = await Store.open(tmp_path / "store.db", flush=False)
    ways = []
    patient, quick = store._writer._patient, store._writer._quick
    patient.set_trace_callback(lambda text: ways.append(("patient", text.split()[0])))
    quick.set_trace_callback(lambda text: ways.append(("quick", text.split()[0])))
    await store.put_sandbox(box())
    assert ("quick", "COMMIT") in ways and ("patient", "COMMIT") not in ways
    assert patient.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    ways.clear()
    await store.add_key(ApiKey("k1", "a", "d", frozenset({"sandboxes"})))
    await store.revoke_key("k1")
    assert [way for way in ways if way[1] == "COMMIT"] == [("patient", "COMMIT")] * 2
    await store.aclose()


async def test_a_bug_in_one_write_fails_that_one_alone(store):
    def broken(db):
        db.execute("INSERT INTO events (tenant, sandbox_id, at, kind, data) VALUES ('a', '', 0, 'half done', '{}')")
        raise ZeroDivisionError

    told = await asyncio.gather(
        store.put_sandbox(box("sb1")), store._writer.do(broken), store.put_sandbox(box("sb2")), return_exceptions=True
    )
    assert [type(t) for t in told] == [type(None), ZeroDivisionError, type(None)]
    assert len(await store.sandboxes("a")) == 2 and await store.events("a", 0) == []


async def test_a_closed_store_says_so_and_has_written_what_was_asked_before(tmp_path):
    store = await Store.open(tmp_path / "store.db")
    for n in range(600):
        store.begin_execution(begun(f"ex{n}"))
    await store.aclose()
    await store.aclose()
    with pytest.raises(StoreFailed):
        await store.sandboxes("a")
    with pytest.raises(StoreFailed):
        store.begin_execution(begun("late"))
    with direct(tmp_path / "store.db") as db:
        assert db.execute("SELECT count(*) FROM executions").fetchone() == (600,)


# -- whose file it is


def store_path(store: Store) -> Path:
    return Path(store._reader._connection.execute("PRAGMA database_list").fetchone()[2])


async def test_the_files_are_for_their_owner_only_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        store = await Store.open(tmp_path / "new" / "store.db")
        await store.put_sandbox(box())
    finally:
        os.umask(before)
    found = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()}
    assert found == dict.fromkeys(["store.db", "store.db-wal", "store.db-shm", "store.db.lock"], 0o600)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    await store.aclose()


@pytest.mark.parametrize("name", ["store.db", "store.db-wal", "store.db-shm", "store.db-journal", "store.db.lock"])
@pytest.mark.parametrize("plant", ["symlink", "hard link", "directory", "fifo"])
async def test_what_was_planted_at_its_path_is_refused_and_left_alone(tmp_path, name, plant):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    target.chmod(0o600)
    path = tmp_path / "state" / name
    path.parent.mkdir(mode=0o700)
    plants = {
        "symlink": lambda: path.symlink_to(target),
        "hard link": lambda: path.hardlink_to(target),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path, 0o600),
    }
    plants[plant]()
    with pytest.raises(StoreFailed):
        await Store.open(tmp_path / "state" / "store.db")
    assert target.read_bytes() == b"precious"


async def test_a_file_that_others_may_read_or_a_directory_that_others_may_write_is_refused(tmp_path):
    path = tmp_path / "store.db"
    await (await Store.open(path)).aclose()
    path.chmod(0o640)
    with pytest.raises(StoreFailed, match="others may read"):
        await Store.open(path)
    path.chmod(0o600)
    tmp_path.chmod(0o777)
    with pytest.raises(StoreFailed, match="others can write"):
        await Store.open(path)
    tmp_path.chmod(0o700)
    await (await Store.open(path)).aclose()


@pytest.mark.parametrize("damage", ["noise", "text", "half", "torn page"])
async def test_a_damaged_file_is_refused_in_words(tmp_path, damage):
    path = tmp_path / "store.db"
    store = await Store.open(path)
    for n in range(50):
        await store.put_sandbox(box(f"sb{n}", cause="x" * 500))
    await store.aclose()
    whole = path.read_bytes()
    torn = bytearray(whole)
    torn[3 * 4096 : 3 * 4096 + 2000] = b"\xff" * 2000
    path.write_bytes(
        {"noise": os.urandom(9000), "text": b"hello\n" * 99, "half": whole[:9000], "torn page": bytes(torn)}[damage]
    )
    with pytest.raises(StoreFailed) as refused:
        await Store.open(path)
    assert refused.value.remediation and str(path) in str(refused.value)


async def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "store.db"
    with direct(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    path.chmod(0o600)
    before = path.read_bytes()
    with pytest.raises(StoreFailed, match="another program"):
        await Store.open(path)
    assert path.read_bytes() == before


# -- generations


async def test_a_store_of_the_first_generation_is_brought_up_with_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "store.db"
    current = list(schema.MIGRATIONS)
    monkeypatch.setattr(schema, "MIGRATIONS", current[:1])
    schema.prepare(make(path), 1.0, check=False)
    with direct(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'events'").fetchone()
        db.execute("INSERT INTO keys VALUES ('k1', 'a', 'd', '[]', '', '{}', '[]', 5, NULL)")
        db.execute("INSERT INTO executions VALUES (1, 'ex1', 'sb1', 'a', 'code', 'done', 1, 1, 2, 'ok', '', '{}')")
        db.commit()
    monkeypatch.setattr(schema, "MIGRATIONS", current)
    store = await Store.open(path)
    assert (await store.key("k1")).created_at == 5 and (await store.execution("a", "ex1")).status == "ok"
    store.append_event("a", "sb1", "k", {})
    assert len(await store.events("a", 0)) == 1
    await store.aclose()
    with direct(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(current),)


async def test_a_migration_that_fails_halfway_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "store.db"
    store = await Store.open(path)
    await store.put_sandbox(box(state="stopped"))
    await store.aclose()
    good = list(schema.MIGRATIONS)
    monkeypatch.setattr(schema, "MIGRATIONS", [*good, "DELETE FROM sandboxes; CREATE TABLE new (x); NOT SQL"])
    with pytest.raises(StoreFailed):
        await Store.open(path)
    monkeypatch.setattr(schema, "MIGRATIONS", good)
    store = await Store.open(path)
    assert len(await store.sandboxes("a")) == 1
    await store.aclose()


async def test_a_store_of_a_newer_generation_is_refused(tmp_path):
    path = tmp_path / "store.db"
    await (await Store.open(path)).aclose()
    with direct(path) as db:
        db.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    with pytest.raises(StoreFailed, match="newer"):
        await Store.open(path)


def make(path: Path) -> Path:
    path.touch(0o600)
    path.chmod(0o600)
    return path
