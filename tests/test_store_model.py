"""Any sequence of operations leaves in the store what it leaves in a few dicts; retention takes only what has ended."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fumehood.errors import Conflict, FumehoodError, InvalidInput, InvalidTransition, NotFound
from fumehood.records import ExecutionRecord, IdempotentReply, Recovered, SandboxRecord
from fumehood.store import Store

NAME, TENANT = st.sampled_from(["x", "y", "z"]), st.sampled_from(["a", "b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), NAME, TENANT, st.sampled_from(["ready", "paused", "stopped"])),
        st.tuples(st.just("end"), NAME),
        st.tuples(st.just("begin"), NAME, TENANT),
        st.tuples(st.just("finish"), NAME, st.sampled_from(["", "r", "rr", "é✓"])),
        st.tuples(st.just("claim"), NAME, TENANT, st.sampled_from(["d1", "d2"])),
        st.tuples(st.just("keep"), NAME, TENANT),
        st.tuples(st.just("drop"), NAME, TENANT),
        st.tuples(st.just("event"), NAME, TENANT),
        st.tuples(st.just("recover")),
        st.tuples(st.just("prune"), st.integers(0, 12), st.integers(0, 8)),
    ),
    max_size=40,
)


def box(name: str, tenant: str, state: str, at: float) -> SandboxRecord:
    return SandboxRecord(
        name, tenant, "k", "python", "native", "default", state, at, at, ended_at=at if state == "stopped" else None
    )


class Model:
    """What the store must do, without a file: dicts keep the order of insertion, as `seq` does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.boxes: dict[str, SandboxRecord] = {}
        self.runs: dict[str, ExecutionRecord] = {}
        self.replies: dict[tuple[str, str], IdempotentReply] = {}
        self.events: list[tuple[float, str, str]] = []

    def put(self, name: str, tenant: str, state: str) -> None:
        was = self.boxes.get(name)
        if was and was.tenant != tenant:
            raise Conflict("")
        if was and was.state == "stopped" != state:
            raise InvalidTransition("")
        self.boxes[name] = box(name, tenant, state, self.now)

    def end(self, name: str) -> None:
        if name not in self.boxes:
            raise NotFound("")
        if self.boxes[name].state != "stopped":
            self.boxes[name] = replace(self.boxes[name], state="stopped", ended_at=self.now, cause="end")

    def begin(self, name: str, tenant: str) -> None:
        self.runs.setdefault(name, ExecutionRecord(name, "x", tenant, "code", "running", self.now))

    def finish(self, name: str, result: str) -> None:
        if name not in self.runs:
            raise NotFound("")
        if self.runs[name].state == "done":
            raise InvalidTransition("")
        done = {"state": "done", "started_at": 0.0, "finished_at": self.now, "status": "ok", "cause": "c", "result": result}
        self.runs[name] = replace(self.runs[name], **done)

    def claim(self, name: str, tenant: str, digest: str) -> IdempotentReply | None:
        if kept := self.replies.get((tenant, name)):
            if kept.body_digest != digest:
                raise Conflict("")
            return kept
        self.replies[tenant, name] = IdempotentReply(tenant, name, digest, 0, "", self.now)
        return None

    def keep(self, name: str, tenant: str) -> None:
        if (kept := self.replies.get((tenant, name))) and not kept.status:
            self.replies[tenant, name] = replace(kept, status=200, body="b")

    def drop(self, name: str, tenant: str) -> None:
        if (kept := self.replies.get((tenant, name))) and not kept.status:
            del self.replies[tenant, name]

    def event(self, name: str, tenant: str) -> None:
        self.events.append((self.now, tenant, name))

    def recover(self) -> Recovered:
        live = [b for b in self.boxes.values() if b.state != "stopped"]
        runs = [r for r in self.runs.values() if r.state != "done"]
        pending = [r for r in self.replies.values() if not r.status]
        for b in live:
            self.boxes[b.id] = replace(b, state="stopped", ended_at=self.now, cause="re")
        for r in runs:
            self.runs[r.id] = replace(r, state="done", status="killed", finished_at=self.now, cause="re")
        for r in pending:
            del self.replies[r.tenant, r.key]
        return Recovered(len(live), len(runs), len(pending))

    def prune(self, age_s: int, max_bytes: int) -> int:
        cutoff, before = self.now - age_s, self._size()
        room = dict.fromkeys("ab", max_bytes)
        for r in reversed(list(self.runs.values())):
            room[r.tenant] -= len(r.result.encode())
            if room[r.tenant] < 0:
                self.runs[r.id] = replace(r, result="")
        self.runs = {n: r for n, r in self.runs.items() if r.state != "done" or r.finished_at >= cutoff}
        self.events = [e for e in self.events if e[0] >= cutoff]
        self.replies = {k: r for k, r in self.replies.items() if not r.status or r.created_at >= cutoff}
        used = {r.sandbox_id for r in self.runs.values()}
        self.boxes = {n: b for n, b in self.boxes.items() if b.state != "stopped" or n in used or b.ended_at >= cutoff}
        return before - self._size()

    def _size(self) -> int:
        results = [r for r in self.runs.values() if r.result]
        return sum(map(len, (self.boxes, self.runs, self.replies, self.events, results)))


async def real(store: Store, now: float, what: str, *args: Any) -> Any:
    match what, args:
        case "put", (name, tenant, state):
            return await store.put_sandbox(box(name, tenant, state, now))
        case "end", (name,):
            return await store.end_sandbox(name, "end")
        case "begin", (name, tenant):
            return store.begin_execution(ExecutionRecord(name, "x", tenant, "code", "running", now))
        case "finish", (name, result):
            return await store.finish_execution(name, started_at=0.0, finished_at=now, status="ok", cause="c", result=result)
        case "claim", (name, tenant, digest):
            return await store.claim_reply(tenant, name, digest)
        case "keep", (name, tenant):
            return store.keep_reply(tenant, name, 200, "b")
        case "drop", (name, tenant):
            return await store.drop_reply(tenant, name)
        case "event", (name, tenant):
            return store.append_event(tenant, name, "k", {})
        case "recover", ():
            return await store.recover("re")
        case "prune", (age_s, max_bytes):
            return await store.prune(older_than_s=age_s, max_rows=1000, max_bytes_per_tenant=max_bytes)
    raise AssertionError(what)


async def agree(steps: list[tuple[Any, ...]]) -> None:
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        store = await Store.open(Path(folder) / "store.db", clock=lambda: model.now, flush=False)
        for what, *args in steps:
            model.now += 1
            try:
                expected = getattr(model, what)(*args)
            except FumehoodError as error:
                with pytest.raises(type(error)):
                    await real(store, model.now, what, *args)
            else:
                assert await real(store, model.now, what, *args) == expected, (what, args)
        for tenant in ("a", "b", None):
            boxes = [b for b in reversed(model.boxes.values()) if tenant in (b.tenant, None)]
            runs = [r for r in reversed(model.runs.values()) if tenant in (r.tenant, None)]
            events = [e for e in model.events if tenant in (e[1], None)]
            assert await store.sandboxes(tenant) == boxes
            assert await store.executions(tenant) == [replace(r, result="") for r in runs]
            assert [await store.execution(tenant, r.id) for r in runs] == runs
            assert [(e.at, e.tenant, e.sandbox_id) for e in await store.events(tenant, 0)] == events
        await store.aclose()


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_sequence_of_operations_gives_what_dicts_give(steps):
    asyncio.run(agree(steps))


async def test_retention_by_count_keeps_the_newest_and_everything_alive(tmp_path):
    clock = itertools.count(1.0)
    store = await Store.open(tmp_path / "store.db", clock=lambda: next(clock))
    for n in range(40):
        await store.put_sandbox(box(f"sb{n}", "a", "stopped" if n % 2 else "ready", n))
        store.begin_execution(ExecutionRecord(f"ex{n}", f"sb{n}", "a", "code", "running", n))
        store.append_event("a", f"sb{n}", "k", {})
        if n % 4 < 3:
            await store.finish_execution(f"ex{n}", started_at=n, finished_at=n, status="ok", cause="", result="")
    assert await store.claim_reply("a", "pending", "d") is None
    assert await store.prune(older_than_s=1e6, max_rows=10, max_bytes_per_tenant=0) > 0
    assert {e.sandbox_id for e in await store.events("a", 0)} == {f"sb{n}" for n in range(30, 40)}
    kept = {e.id: e.state for e in await store.executions("a")}
    assert kept == {f"ex{n}": "running" if n % 4 == 3 else "done" for n in range(40) if n >= 30 or n % 4 == 3}
    # a stopped sandbox stays for the sake of an execution that is not done
    assert {b.id for b in await store.sandboxes("a")} == {f"sb{n}" for n in range(40) if n >= 30 or n % 2 == 0 or n % 4 == 3}

    assert await store.prune(older_than_s=-1e6, max_rows=0, max_bytes_per_tenant=0) > 0
    assert {e.state for e in await store.executions("a")} == {"running"} and await store.events("a", 0) == []
    assert {b.state for b in await store.sandboxes("a") if int(b.id[2:]) % 4 != 3} == {"ready"}
    assert (await store.claim_reply("a", "pending", "d")).status == 0
    assert await store.prune(older_than_s=-1e6, max_rows=0, max_bytes_per_tenant=0) == 0
    with pytest.raises(InvalidInput):
        await store.prune(older_than_s=0, max_rows=-1, max_bytes_per_tenant=0)
    await store.aclose()


async def test_retention_of_many_rows_goes_in_slices_and_takes_them_all(tmp_path):
    store = await Store.open(tmp_path / "store.db", flush=False)
    for n in range(2500):
        store.append_event("a", "sb", str(n), {})
        await asyncio.sleep(0)
    assert await store.prune(older_than_s=-60, max_rows=10_000, max_bytes_per_tenant=0) == 2500
    await store.aclose()
