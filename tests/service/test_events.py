"""What happens is told in order, once, to whoever may hear of it, and is kept under the same number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opened import ME, OTHER, opened, until

from fumehood.bus import LAGGED, MAX_WAITING, EventBus, Subscription
from fumehood.model import CodeRequest
from fumehood.records import EventRecord
from fumehood.service import CreateAsk, Service


def event(seq: int, tenant: str = "one") -> EventRecord:
    return EventRecord(seq, tenant, "s1", 0.0, "something", {"n": seq})


async def rest(listener: Subscription) -> list[EventRecord]:
    return [e async for e in listener]


async def test_a_listener_hears_its_own_tenants_events_in_order_and_an_admin_all() -> None:
    bus = EventBus()
    with bus.subscribe("one") as one, bus.subscribe("two") as two, bus.subscribe(None) as everyone:
        for seq in range(10):
            bus.publish(event(seq, "one" if seq % 2 else "two"))
        bus.close()
        assert [e.seq for e in await rest(one)] == [1, 3, 5, 7, 9]
        assert [e.seq for e in await rest(two)] == [0, 2, 4, 6, 8]
        assert [e.seq for e in await rest(everyone)] == list(range(10))


async def test_a_listener_that_waits_is_woken_and_one_that_left_is_forgotten() -> None:
    bus = EventBus()
    with bus.subscribe("one") as listener:
        first = asyncio.create_task(anext(listener))
        await asyncio.sleep(0)
        bus.publish(event(1))
        assert (await first).seq == 1
    bus.publish(event(2))
    bus.close()
    assert await rest(listener) == [] if listener._closed else not listener._waiting
    assert not bus._listeners


@pytest.mark.parametrize("more", [0, 1, MAX_WAITING - 1, MAX_WAITING, 3 * MAX_WAITING + 7])
async def test_a_slow_listener_is_told_how_many_it_missed_and_holds_a_bounded_number(more: int) -> None:
    bus, n = EventBus(), MAX_WAITING + more
    with bus.subscribe("one") as slow, bus.subscribe("one") as quick:
        heard = 0
        for seq in range(1, n + 1):
            bus.publish(event(seq))
            heard += (await anext(quick)).seq == seq
            assert len(slow._waiting) <= MAX_WAITING
        bus.close()
        got = await rest(slow)
    assert heard == n
    lags = [e for e in got if e.kind == LAGGED]
    told = [e.seq for e in got if e.kind != LAGGED]
    missed = sum(e.data["missed"] for e in lags)
    assert missed + len(told) == n and len(lags) == bool(more)
    assert told == list(range(missed + 1, n + 1))
    assert not lags or (got[0] is lags[0] and lags[0].tenant == "one" and lags[0].seq == told[0] - 1)


async def test_closing_ends_each_listener_after_what_waits_for_it() -> None:
    bus = EventBus()
    with bus.subscribe("one") as waits, bus.subscribe("one") as behind:
        ended = asyncio.create_task(rest(waits))
        bus.publish(event(1))
        await asyncio.sleep(0)
        bus.publish(event(2))
        bus.close()
        bus.close()
        assert [e.seq for e in await ended] == [e.seq for e in await rest(behind)] == [1, 2]
    with bus.subscribe("one") as late:
        assert await rest(late) == []


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with opened(tmp_path, "fake") as service:
        yield service


async def live_through(service: Service) -> None:
    lease, other = await asyncio.gather(service.create(ME, CreateAsk()), service.create(OTHER, CreateAsk()))
    await asyncio.gather(*(service.run(ME, lease, CodeRequest(str(n))) for n in range(5)))
    await service.pause(ME, lease)
    await service.resume(ME, lease)
    await asyncio.gather(service.kill(ME, lease, "\udc80 no Unicode"), service.kill(OTHER, other), return_exceptions=True)
    await until(lambda: not service.everyone(), "they live on")


def facts(events: list[EventRecord]) -> list[tuple[Any, ...]]:
    return [(e.seq, e.tenant, e.sandbox_id, e.kind, dict(e.data)) for e in events]


async def test_the_story_of_a_sandbox_is_heard_and_kept_under_the_same_numbers(service: Service, tmp_path: Path) -> None:
    with service.events.subscribe(None) as everyone, service.events.subscribe(ME.tenant) as mine:
        await live_through(service)
        service.events.close()
        heard, own = await rest(everyone), await rest(mine)
    kept = await service.store.events(None, 0)
    assert facts(heard) == facts(kept) and [e.seq for e in heard] == list(range(1, len(heard) + 1))
    assert facts(own) == facts(await service.store.events(ME.tenant, 0)) == facts([e for e in heard if e.tenant == ME.tenant])
    kinds = [e.kind for e in own]
    runs = ["execution.done"] * 5
    assert kinds == ["sandbox.started", *runs, "sandbox.paused", "sandbox.resumed", "sandbox.stopped"]
    await service.aclose()
    async with opened(tmp_path, "fake") as after:
        with after.events.subscribe(None) as everyone:
            await after.kill(ME, await after.create(ME, CreateAsk()))
            assert (await anext(everyone)).seq == len(heard) + 1
        assert [e.seq for e in await after.store.events(None, len(heard))] == [len(heard) + 1, len(heard) + 2]


async def test_an_event_that_can_not_be_kept_stops_nobody(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    lease = await service.create(ME, CreateAsk(metadata={"a": "b"}))
    with service.events.subscribe(ME.tenant) as mine:
        service._chronicle.lease(lease, "odd", {"not json": object()})
        assert (await anext(mine)).kind == "odd"
    assert [r.message for r in caplog.records if "was not kept" in r.message]
    await service.kill(ME, lease)
    assert [e.kind for e in await service.store.events(None, 0)] == ["sandbox.started", "sandbox.stopped"]
