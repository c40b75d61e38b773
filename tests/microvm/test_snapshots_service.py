"""Snapshots, forks and rollbacks as the service gives them: whose they are, how many, all or none, and what a restart finds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import service_home

from fumehood.errors import (
    CapacityExceeded,
    Detached,
    FumehoodError,
    InvalidInput,
    InvalidTransition,
    NotFound,
    RateLimited,
    SandboxGone,
    SetupFailed,
    StoreFailed,
)
from fumehood.gateway.app import create_app
from fumehood.gateway.auth import Authenticator
from fumehood.lease import Lease
from fumehood.model import MIB, CodeRequest, SandboxState
from fumehood.records import KeyLimits
from fumehood.runtime.microvm.assets import Assets
from fumehood.service import CreateAsk, Service
from fumehood.store import Store
from service.opened import ME, OTHER, config, held, until

pytestmark = [pytest.mark.microvm, pytest.mark.root]
SMALL = CreateAsk(limits={"memory_bytes": 128 * MIB, "timeout_s": 60})
Open = Callable[..., contextlib.AbstractAsyncContextManager[Service]]


@pytest.fixture(scope="module")
def home(cached: Assets, image: Callable[[str], Any]) -> Path:
    image("python")
    return service_home.made(cached, "qemu")


@pytest.fixture
def opened(home: Path) -> Open:
    @contextlib.asynccontextmanager
    async def opening(**settings: Any) -> AsyncIterator[Service]:
        chosen = {"agent_timeout_s": 30.0, "flush_records": True, **settings}
        async with await Service.open(config(home, "qemu", **chosen)) as service:
            yield service

    return opening


@pytest.fixture
async def service(opened: Open) -> AsyncIterator[Service]:
    async with opened() as service:
        yield service
        for tenant in (ME, OTHER):
            for kept in await service.snapshots(tenant):
                await service.discard(tenant, kept.id)


async def text(service: Service, lease: Lease, code: str) -> str | None:
    result = await service.run(ME, lease, CodeRequest(code))
    assert result.ok, result
    return result.text


def on_disk(service: Service) -> set[str]:
    return {facts.id for facts in service.supervisor.snapshots("qemu")}


async def unknown(call: Awaitable[Any]) -> str:
    with pytest.raises(NotFound) as e:
        await call
    return f"{e.value.code} {e.value} {e.value.remediation} {e.value.details}"


# -- what comes back
async def test_a_sandbox_goes_on_from_a_snapshot_when_the_first_has_ended_under_a_lease_of_its_own(service: Service) -> None:
    first = await service.create(ME, replace(SMALL, env={"A": "1", "B": "1"}, metadata={"of": "first"}))
    await text(service, first, "x = 41")
    kept = await service.snapshot(ME, first, {"why": "a test"})
    assert (kept.sandbox_id, kept.tier, kept.template, kept.metadata) == (first.id, "qemu", "python", {"why": "a test"})
    assert 0 < kept.size_bytes < 1 << 30 and on_disk(service) == {kept.id}
    await service.kill(ME, first)
    ask = CreateAsk(env={"B": "2"}, metadata={"of": "second"}, lease_s=77, template="python", tier="qemu")
    second = await service.restore(ME, kept.id, ask)
    assert second.id != first.id and (second.lease_s, second.metadata, second.tier) == (77, {"of": "second"}, "qemu")
    assert second.live.spec == replace(first.live.spec, env={**first.live.spec.env, "B": "2"})
    assert await text(service, second, "x + 1") == "42"
    shown = await service.run(ME, second, CodeRequest("import subprocess; subprocess.getoutput('echo $A $B')"))
    assert shown.text == "'1 2'"
    with pytest.raises(InvalidInput, match="template"):
        await service.restore(ME, kept.id, CreateAsk(template="data-analysis"))
    assert len(service.leases(ME)) == 1


async def test_it_is_listed_in_pages_by_sandbox_and_to_its_tenant_alone(service: Service) -> None:
    one, two = await service.create(ME, SMALL), await service.create(ME, SMALL)
    ids = [(await service.snapshot(ME, lease)).id for lease in (one, two, one)]
    assert [s.id for s in await service.snapshots(ME)] == ids[::-1]
    assert [s.id for s in await service.snapshots(ME, sandbox_id=one.id)] == [ids[2], ids[0]]
    assert [s.id for s in await service.snapshots(ME, after=ids[2], limit=1)] == [ids[1]]
    assert await service.snapshots(OTHER) == []
    await service.discard(ME, ids[1])
    assert [s.id for s in await service.snapshots(ME)] == [ids[2], ids[0]] and on_disk(service) == {ids[0], ids[2]}


async def test_another_tenant_finds_none_in_the_same_words_as_one_that_never_was(service: Service) -> None:
    mine, theirs = await service.create(ME, SMALL), await service.create(OTHER, SMALL)
    kept, never = (await service.snapshot(ME, mine)).id, "p" + "0" * 16
    for call in (
        lambda name: service.snapshot_of(OTHER, name),
        lambda name: service.discard(OTHER, name),
        lambda name: service.restore(OTHER, name),
        lambda name: service.rollback(OTHER, theirs, name),
    ):
        assert (await unknown(call(kept))).replace(kept, never) == await unknown(call(never))
    assert on_disk(service) == {kept} and (await service.snapshot_of(ME, kept)).id == kept
    sister = replace(ME, key_id="key9")
    assert (await service.restore(sister, kept)).tenant == ME.tenant


# -- how many
async def test_a_tenant_has_so_many_snapshots_and_no_more_and_others_do_not_count(opened: Open) -> None:
    async with opened(max_snapshots_per_tenant=1) as service:
        lease, other = await service.create(ME, SMALL), await service.create(OTHER, SMALL)
        kept = await service.snapshot(ME, lease)
        for _ in range(2):
            with pytest.raises(CapacityExceeded, match="1 snapshots") as e:
                await service.snapshot(ME, lease)
            assert e.value.remediation and on_disk(service) == {kept.id}
        theirs = await service.snapshot(OTHER, other)
        await service.discard(ME, kept.id)
        asks = await asyncio.gather(*(service.snapshot(ME, lease) for _ in range(3)), return_exceptions=True)
        made = [a for a in asks if not isinstance(a, BaseException)]
        assert len(made) == 1 and {type(a) for a in asks if a not in made} == {CapacityExceeded}
        assert await text(service, lease, "6 * 7") == "42"
        for tenant, name in ((ME, made[0].id), (OTHER, theirs.id)):
            await service.discard(tenant, name)


async def test_all_of_them_have_a_budget_together_and_a_refusal_leaves_nothing(opened: Open) -> None:
    async with opened(snapshot_budget_bytes=127 * MIB) as service:
        lease = await service.create(ME, SMALL)
        with pytest.raises(CapacityExceeded, match="room") as e:
            await service.snapshot(ME, lease)
        assert "snapshot_budget_bytes" in e.value.remediation
        assert on_disk(service) == set() and await service.store.snapshots.held("one") == (0, 0)
        assert await text(service, lease, "6 * 7") == "42"


async def test_forks_take_their_places_and_give_them_back(service: Service) -> None:
    first = await service.create(ME, replace(SMALL, metadata={"of": "first"}, on_expiry="pause", auto_resume=True))
    await text(service, first, "x = [0]")
    one = held(service)["places"][0]["one"]
    forks = await service.fork(ME, first, 3, lease_s=50)
    assert len({first.id, *(fork.id for fork in forks)}) == 4
    assert held(service)["places"][0]["one"] == {name: 4 * value for name, value in one.items()}
    for n, fork in enumerate(forks):
        assert (fork.lease_s, fork.metadata, fork.on_expiry, fork.auto_resume) == (50, {"of": "first"}, "pause", True)
        assert fork.record == await service.record(ME, fork.id) and fork.token != first.token
        assert await text(service, fork, f"x.append({n}); x") == f"[0, {n}]"
    assert await text(service, first, "x") == "[0]"
    (labelled,) = await service.fork(ME, first, 1, metadata={})
    assert labelled.metadata == {} and labelled.lease_s == first.live.spec.limits.lifetime_s
    for lease in service.leases(ME):
        await service.kill(ME, lease)
    assert held(service) == {} and service.supervisor._live == {}


async def test_forks_that_do_not_all_fit_are_none(opened: Open) -> None:
    async with opened(max_sandboxes=3) as service:
        first = await service.create(ME, SMALL)
        before, key = held(service), replace(ME, limits=KeyLimits(sandboxes=2))
        with pytest.raises(CapacityExceeded, match="3 more") as full:
            await service.fork(ME, first, 3)
        assert full.value.retryable and held(service) == before
        with pytest.raises(RateLimited):
            await service.fork(key, first, 2)
        assert held(service) == before and len(service.leases(ME)) == 1 and len(service.supervisor._live) == 1
        assert len(await service.fork(key, first, 1)) == 1
        assert await text(service, first, "6 * 7") == "42"


async def test_forks_of_which_one_can_not_be_recorded_are_none(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await service.create(ME, SMALL)
    before, put, puts = held(service), service.store.put_sandbox, list[str]()

    async def failing(record: Any) -> None:
        puts.append(record.id)
        if len(puts) == 2:
            raise StoreFailed("the disk is full")
        await put(record)

    monkeypatch.setattr(service.store, "put_sandbox", failing)
    with pytest.raises(StoreFailed):
        await service.fork(ME, first, 3)
    assert held(service) == before and list(service.supervisor._live) == [first.id] and service.leases(ME) == [first]
    record = await service.record(ME, puts[0])
    assert record is not None and record.state == "stopped" and "fork" in record.cause


# -- back to a snapshot
async def test_a_rollback_keeps_the_lease_and_tells_what_ran_why_it_ended(service: Service) -> None:
    lease = await service.create(ME, SMALL)
    await text(service, lease, "x = 'then'")
    kept = await service.snapshot(ME, lease)
    await text(service, lease, "x = 'since'; open('new', 'w').close()")
    sandbox_id, end_at, live, old = lease.id, lease.end_at, lease.live, lease.live.handle
    running = asyncio.create_task(service.run(ME, lease, CodeRequest("while True: pass")))
    await until(lambda: lease.live.state is SandboxState.RUNNING, "it does not run")
    await service.rollback(ME, lease, kept.id)
    result = await running
    assert result.status == "killed" and kept.id in result.cause and result.sandbox_id == sandbox_id
    assert service.lease(ME, sandbox_id) is lease and lease.live is live and lease.end_at == end_at
    assert lease.live.handle is not old and lease.live.state is SandboxState.READY and not lease.ended.is_set()
    assert await text(service, lease, "import os; x, os.path.exists('new')") == "('then', False)"
    await service.rollback(ME, lease, kept.id)
    assert await text(service, lease, "x") == "'then'"
    await service.kill(ME, lease)
    assert held(service) == {}


async def test_a_rollback_that_fails_leaves_the_sandbox_as_it_was(service: Service, home: Path) -> None:
    lease = await service.create(ME, SMALL)
    kept = await service.snapshot(ME, lease)
    await text(service, lease, "x = 'since'")
    old = lease.live.handle
    memory = home / f"state/microvm/snapshots/live-{kept.id}/memory"
    with memory.open("r+b") as file:
        file.truncate(memory.stat().st_size // 2)
    with pytest.raises(SetupFailed):
        await service.rollback(ME, lease, kept.id)
    assert lease.live.handle is old and await text(service, lease, "x") == "'since'"


async def test_a_snapshot_of_another_kind_of_sandbox_is_no_way_back(service: Service) -> None:
    one, two = await service.create(ME, SMALL), await service.create(ME, replace(SMALL, limits={"memory_bytes": 100 * MIB}))
    kept = await service.snapshot(ME, one)
    with pytest.raises(InvalidInput, match="another kind"):
        await service.rollback(ME, two, kept.id)
    assert await text(service, two, "6 * 7") == "42"


async def test_one_that_dies_after_a_rollback_ends_its_lease(service: Service) -> None:
    lease = await service.create(ME, SMALL)
    kept = await service.snapshot(ME, lease)
    await service.rollback(ME, lease, kept.id)
    await lease.live.handle.kill()
    await until(lambda: lease.ending and lease.ending.done(), "nobody saw its end")
    assert held(service) == {}


# -- while it is paused, while something runs
async def test_a_paused_one_is_copied_rolled_back_and_stays_paused(service: Service) -> None:
    lease = await service.create(ME, SMALL)
    await text(service, lease, "x = 'then'")
    await service.pause(ME, lease)
    kept = await service.snapshot(ME, lease)
    (fork,) = await service.fork(ME, lease, 1)
    assert lease.is_paused and await text(service, fork, "x") == "'then'"
    with pytest.raises(InvalidTransition):
        await service.awake(ME, lease.id)
    await service.resume(ME, lease)
    assert await text(service, lease, "x") == "'then'"
    await text(service, lease, "x = 'since'")
    await service.pause(ME, lease)
    await service.rollback(ME, lease, kept.id)
    assert lease.is_paused and lease.end_at > lease.created_at + 3600
    await service.resume(ME, lease)
    assert await text(service, lease, "x") == "'then'"


async def test_while_something_runs_it_is_refused_and_may_be_tried_again(service: Service) -> None:
    lease = await service.create(ME, SMALL)
    running = asyncio.create_task(service.run(ME, lease, CodeRequest("import time; time.sleep(3); 6 * 7")))
    await until(lambda: lease.live.state is SandboxState.RUNNING, "it does not run")
    for call in (service.snapshot(ME, lease), service.fork(ME, lease, 1)):
        with pytest.raises(InvalidTransition) as e:
            await call
        assert e.value.retryable and e.value.remediation
    assert (await running).text == "42" and on_disk(service) == set() and len(service.leases(ME)) == 1
    await service.snapshot(ME, lease)


async def test_what_is_asked_while_it_is_copied_waits_and_is_done(service: Service) -> None:
    lease = await service.create(ME, SMALL)
    await text(service, lease, "n = 0")
    copying = asyncio.create_task(service.snapshot(ME, lease))
    await until(lambda: lease.live.link.lost, "it is not copied")

    async def listed() -> Any:
        return (await (await service.awake(ME, lease.id)).live.link.call("context.list"))["contexts"]

    asked = [asyncio.create_task(text(service, lease, "n += 1; n")) for _ in range(3)]
    listing = asyncio.create_task(listed())
    assert not copying.done()
    await copying
    assert sorted(await asyncio.gather(*asked)) == ["1", "2", "3"] and len(await listing) == 1


async def test_who_follows_a_program_is_cut_off_and_finds_it_again(service: Service) -> None:
    lease = await service.create(ME, SMALL)
    argv = ["sh", "-c", "while :; do echo tick; sleep 0.1; done"]
    stream = await lease.live.link.open("exec.start", argv=argv, env={}, stdin=False)
    started = await anext(aiter(stream))
    pid = started.json()["pid"]
    copying = asyncio.create_task(service.snapshot(ME, lease))
    with pytest.raises(Detached) as e:
        await stream.result()
    assert e.value.retryable and "attach again" in e.value.cause
    await copying
    again = await lease.live.link.open("exec.attach", pid=pid)
    async for frame in again:
        if b"tick" in frame.payload:
            break
    again.abandon()
    restored = await service.restore(ME, copying.result().id)
    assert pid in [p["pid"] for p in (await restored.live.link.call("exec.list"))["processes"]]


# -- what is broken off
@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.1, 0.3])
async def test_who_leaves_while_a_copy_is_made_leaves_nothing(service: Service, after_s: float) -> None:
    lease = await service.create(ME, SMALL)
    before = held(service)
    for copy in (lambda: service.snapshot(ME, lease), lambda: service.fork(ME, lease, 2)):
        task = asyncio.create_task(copy())
        await asyncio.sleep(after_s)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            done = await task
            for fork in done if isinstance(done, list) else []:
                await service.kill(ME, fork)
            if not isinstance(done, list):
                await service.discard(ME, done.id)
        assert on_disk(service) == set() and await service.store.snapshots.held("one") == (0, 0)
        assert held(service) == before and list(service.supervisor._live) == [lease.id]
        assert await text(service, lease, "6 * 7") == "42"


@pytest.mark.parametrize("what", ["snapshot", "fork", "rollback"])
async def test_an_end_that_comes_while_it_is_copied_is_its_end(service: Service, what: str) -> None:
    lease = await service.create(ME, SMALL)
    kept = await service.snapshot(ME, lease)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "snapshot": lambda: service.snapshot(ME, lease),
        "fork": lambda: service.fork(ME, lease, 2),
        "rollback": lambda: service.rollback(ME, lease, kept.id),
    }
    copying = asyncio.ensure_future(calls[what]())
    await until(lease.live._moving.locked, "it is not copied")
    await service.kill(ME, lease, "enough")
    with contextlib.suppress(SandboxGone):
        await copying
    with pytest.raises(SandboxGone, match="enough"):
        service.lease(ME, lease.id)
    for fork in service.leases(ME):
        await service.kill(ME, fork)
    assert held(service) == {} and service.supervisor._live == {}


async def test_a_machine_that_dies_while_it_is_copied_leaves_no_snapshot(service: Service) -> None:
    lease = await service.create(ME, SMALL)
    copying = asyncio.create_task(service.snapshot(ME, lease))
    await until(lambda: lease.live.link.lost, "it is not copied")
    await lease.live.handle.kill()
    with contextlib.suppress(FumehoodError):
        kept = await copying  # it was ready before
        await service.discard(ME, kept.id)
    await until(lambda: lease.ending and lease.ending.done(), "nobody saw its end")
    assert held(service) == {} and on_disk(service) == set() and await service.store.snapshots.held("one") == (0, 0)


# -- what a start finds
async def test_a_restart_knows_each_snapshot_and_settles_what_was_half_made_or_lost(opened: Open, home: Path) -> None:
    async with opened() as service:
        lease = await service.create(ME, SMALL)
        await text(service, lease, "x = 41")
        kept, half, lost = [await service.snapshot(ME, lease) for _ in range(3)]
        foreign = await service.supervisor.snapshot(lease.live)
        await service.supervisor.discard(lost.id, "qemu")
    store = await Store.open(home / "state/store.db")
    await store.snapshots.put(replace(half, state="making"))
    await store.aclose()
    async with opened() as service:
        assert [s.id for s in await service.snapshots(ME)] == [kept.id]
        assert on_disk(service) == {kept.id, foreign.id}, "of an embedded sandbox, which nobody here may remove"
        assert "lost" in await unknown(service.snapshot_of(ME, lost.id)) and await unknown(service.restore(ME, half.id))
        after = await service.restore(ME, kept.id)
        assert await text(service, after, "x + 1") == "42"
        for name in (kept.id, lost.id):
            await service.discard(ME, name)
        await service.supervisor.discard(foreign.id, "qemu")
        assert await service.store.snapshots.all(frozenset({"making", "ready", "gone"})) == [] and on_disk(service) == set()


# -- over REST
async def test_a_request_that_is_repeated_is_done_once(service: Service) -> None:
    app = create_app(service, Authenticator(service, open_here=True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=120) as http:
        limits = {"memory_bytes": 128 * MIB}
        box = f"/v1/sandboxes/{(await http.post('/v1/sandboxes', json={'limits': limits})).raise_for_status().json()['id']}"

        async def twice(path: str, body: dict[str, Any]) -> Any:
            asked = {"json": body, "headers": {"idempotency-key": path}}
            first, second = [(await http.post(path, **asked)).raise_for_status() for _ in range(2)]
            assert (second.content, second.headers["idempotent-replayed"]) == (first.content, "true")
            return first.json() if first.content else None

        async def x(code: str) -> str:
            answer = await http.post(f"{box}/executions", json={"code": code})
            return str(answer.raise_for_status().json()["results"][-1]["data"]["text/plain"])

        await x("x = 1; x")
        kept = await twice(f"{box}/snapshots", {"metadata": {"a": "b"}})
        assert kept.keys() == {"id", "sandbox_id", "tier", "template", "created_at", "size_bytes", "metadata"}
        assert (await http.get("/v1/snapshots")).json() == {"snapshots": [kept], "next": None}
        assert (await http.get(f"/v1/snapshots/{kept['id']}")).json() == kept
        forks = (await twice(f"{box}/fork", {"count": 2}))["sandboxes"]
        assert len(forks) == 2 and len((await http.get("/v1/sandboxes")).json()["sandboxes"]) == 3
        await x("x = 2; x")
        assert await twice(f"{box}/rollback", {"snapshot": kept["id"]}) is None
        assert await x("x") == "1"
        after = await twice("/v1/sandboxes", {"snapshot": kept["id"], "metadata": {"of": "it"}})
        assert after["metadata"] == {"of": "it"} and after["limits"]["memory_bytes"] == 128 * MIB
        assert (await http.delete(f"/v1/snapshots/{kept['id']}")).status_code == 204
        assert (await http.get(f"/v1/snapshots/{kept['id']}")).status_code == 404
        for row in (await http.get("/v1/sandboxes")).json()["sandboxes"]:
            (await http.delete(f"/v1/sandboxes/{row['id']}")).raise_for_status()
    assert held(service) == {} and on_disk(service) == set()
