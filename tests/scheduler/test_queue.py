"""Admission on a real loop: who waits gets a place, an error that says why, or leaves no trace; nothing is ever lost."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from typing import Any

import pytest
from waiters import ONE, outcomes, ticks, waiting

from fumehood.errors import DeadlineExceeded, Draining, InvalidInput
from fumehood.scheduler import RESERVE_AFTER_S, Capacity, Grant, Scheduler, queue

pytestmark = pytest.mark.usefixtures("nothing_is_left_unheard")
H17_S = 0.25  # how late a deadline may be


async def test_with_room_a_place_is_had_at_once_and_is_given_back_once():
    scheduler = Scheduler(Capacity(2, 10), 5)
    with await scheduler.admit("a", memory_bytes=4, wait_s=0) as grant:
        assert (grant.tenant, grant.memory_bytes, grant.queue_ms) == ("a", 4, 0.0)
        assert scheduler.snapshot()["held"] == {"a": {"places": 1, "memory_bytes": 4}}
        grant.release()
    assert scheduler.snapshot()["held_total"] == {"places": 0, "memory_bytes": 0}


async def test_a_released_place_goes_to_the_one_who_waits_and_the_wait_is_told():
    now = [0.0]
    scheduler = Scheduler(ONE, 5, clock=lambda: now[0])
    first = await scheduler.admit("a")
    [second] = await waiting(scheduler, "a")
    now[0] = 1.5
    first.release()
    assert (await second).queue_ms == 1500.0


async def test_one_place_goes_round_between_tenants_whoever_came_first():
    scheduler, order = Scheduler(ONE, 10), list[str]()

    async def work(tenant: str) -> None:
        with await scheduler.admit(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    holder = await scheduler.admit("d")
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for tenant in "aaaabbcc":
            group.create_task(work(tenant))
        await ticks(3)
        holder.release()
    assert "".join(order) == "abcabcaa"


@pytest.mark.parametrize("released_after", range(4))
@pytest.mark.parametrize("cancelled_after", range(5))
async def test_whenever_a_waiter_is_cancelled_its_place_is_not_lost(cancelled_after: int, released_after: int):
    scheduler = Scheduler(ONE, 5)
    holder = await scheduler.admit("a")
    waiter = asyncio.create_task(scheduler.admit("a"))
    loop = asyncio.get_running_loop()
    for due, act in sorted([(released_after, holder.release), (cancelled_after, waiter.cancel)], key=lambda step: step[0]):
        await ticks(due)
        loop.call_soon(act)
    await ticks(6)
    [outcome] = await outcomes([waiter])
    if isinstance(outcome, Grant):
        outcome.release()
    (await scheduler.admit("b", wait_s=0)).release()
    assert scheduler.snapshot()["waiting"] == {}


async def test_a_place_granted_to_a_waiter_cancelled_in_the_same_tick_goes_to_the_next():
    scheduler = Scheduler(ONE, 5)
    holder = await scheduler.admit("a")
    first, second = await waiting(scheduler, "a", "a")
    holder.release()
    await asyncio.sleep(0)  # now it is granted, and its task has not run
    assert first.cancel() and scheduler.snapshot()["held_total"]["places"] == 1
    assert (await outcomes([second]))[0].tenant == "a" and first.cancelled()


async def test_a_waiter_cancelled_just_before_the_decision_takes_nothing():
    scheduler = Scheduler(ONE, 5)
    holder = await scheduler.admit("a")
    first, second = await waiting(scheduler, "a", "a")
    holder.release()
    first.cancel()
    await asyncio.sleep(0)
    assert scheduler.snapshot()["waiting"] == {} and not second.cancelled()
    assert isinstance((await outcomes([second]))[0], Grant)


async def test_a_deadline_counts_from_arrival_and_is_kept_by_the_server():
    scheduler = Scheduler(ONE, 5)
    holder = await scheduler.admit("a")
    [patient] = await waiting(scheduler, "a", wait_s=60)
    async with asyncio.timeout(0.1 + H17_S):
        with pytest.raises(DeadlineExceeded):
            await scheduler.admit("a", wait_s=0.1)
    assert scheduler.snapshot()["waiting"] == {"a": 1}
    holder.release()
    assert isinstance(await patient, Grant)


async def test_without_room_wait_s_0_fails_without_waiting():
    scheduler = Scheduler(ONE, 5)
    await scheduler.admit("a")
    with pytest.raises(DeadlineExceeded):
        scheduler.admit("b", wait_s=0).send(None)


async def test_wait_s_0_does_not_jump_the_queue_when_a_place_has_just_come_free():
    scheduler = Scheduler(ONE, 5)
    holder = await scheduler.admit("a")
    waiter = await waiting(scheduler, "a")
    holder.release()
    with pytest.raises(DeadlineExceeded):
        await scheduler.admit("b", wait_s=0)
    assert isinstance((await outcomes(waiter))[0], Grant)


async def test_a_tenant_at_its_cap_waits_for_itself_and_holds_up_nobody_else():
    scheduler = Scheduler(Capacity(3, tenant_places=1), 5)
    mine = await scheduler.admit("a")
    [second] = await waiting(scheduler, "a")
    await scheduler.admit("b", wait_s=0)
    assert scheduler.snapshot()["waiting"] == {"a": 1}
    mine.release()
    assert isinstance((await outcomes([second]))[0], Grant)


async def test_what_was_kept_for_a_large_ask_is_free_again_when_it_gives_up():
    now = [0.0]
    scheduler = Scheduler(Capacity(4, 10), 5, clock=lambda: now[0])
    await scheduler.admit("a", memory_bytes=6)
    [large] = await waiting(scheduler, "b", memory_bytes=10)
    now[0] = RESERVE_AFTER_S
    [small] = await waiting(scheduler, "c", memory_bytes=1)
    assert not small.done()
    large.cancel()
    assert isinstance((await outcomes([small]))[0], Grant)


async def test_a_deadline_and_a_release_in_one_tick_are_one_decision(monkeypatch: pytest.MonkeyPatch):
    decisions: list[Any] = []
    decide = queue.assign
    monkeypatch.setattr(queue, "assign", lambda *facts: decisions.append(decide(*facts)) or decisions[-1])
    scheduler = Scheduler(ONE, 5)
    holder = await scheduler.admit("a")
    late = await waiting(scheduler, "a", wait_s=0.02)
    in_time = await waiting(scheduler, "a")
    decisions.clear()
    asyncio.get_running_loop().call_later(0.01, holder.release)
    time.sleep(0.05)  # noqa: ASYNC251 - both timers are due when the loop looks again
    [outcome, served] = await outcomes(late + in_time)
    assert isinstance(outcome, DeadlineExceeded) and isinstance(served, Grant) and len(decisions) == 1


class Name(str):
    """A tenant's name that a weak reference can watch."""


@pytest.mark.parametrize("others", ["", "b"])
async def test_a_tenant_that_has_nothing_here_any_more_is_forgotten(others: str):
    scheduler, name = Scheduler(ONE, 5), Name("a")
    grant = await scheduler.admit(name)
    served = await waiting(scheduler, *others)
    grant.release()
    await outcomes(served)
    watched = weakref.ref(name)
    del name, grant
    gc.collect()
    assert watched() is None


async def test_draining_tells_whoever_waits_and_waits_for_what_is_held():
    scheduler = Scheduler(ONE, 5)
    holder = await scheduler.admit("a")
    tasks = await waiting(scheduler, "a", "b", "b", wait_s=60)
    tasks[2].cancel()
    scheduler.drain()
    told = await outcomes(tasks)
    assert [type(outcome) for outcome in told] == [Draining, Draining, asyncio.CancelledError]
    with pytest.raises(Draining):
        await scheduler.admit("c")
    idle = asyncio.create_task(scheduler.idle())
    await ticks(3)
    assert not idle.done() and scheduler.snapshot()["draining"]
    holder.release()
    async with asyncio.timeout(5):
        await idle


@pytest.mark.parametrize(
    "how", [{"memory_bytes": 11}, {"memory_bytes": -1}, {"priority": 11}, {"wait_s": -1}, {"wait_s": float("nan")}]
)
async def test_what_could_never_be_met_is_refused_at_once(how: dict[str, Any]):
    with pytest.raises(InvalidInput) as refused:
        await Scheduler(Capacity(1, 10), 5).admit("a", **how)
    assert refused.value.cause and refused.value.remediation


@pytest.mark.parametrize(
    ("capacity", "limit"), [(Capacity(0), 1), (Capacity(1, -1), 1), (Capacity(1, 0, -1), 1), (Capacity(1), -1)]
)
def test_a_capacity_that_makes_no_sense_is_refused(capacity: Capacity, limit: int):
    with pytest.raises(InvalidInput):
        Scheduler(capacity, limit)
