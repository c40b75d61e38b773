"""Admission on a real loop: who waits gets a place, an error that says why, or leaves no trace; nothing is ever lost."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fumehood.errors import DeadlineExceeded, Draining, InvalidInput, QueueFull
from fumehood.scheduler import Capacity, Grant, Scheduler, queue

pytestmark = pytest.mark.rootless
ONE = Capacity(places=1)
H17_S = 0.25  # how late a deadline may be


@pytest.fixture(autouse=True)
async def nothing_is_left_unheard() -> AsyncIterator[None]:
    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    yield
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await ticks(5)
    gc.collect()
    assert not said


async def ticks(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def waiting(scheduler: Scheduler, *tenants: str, **how: Any) -> list[asyncio.Task[Grant]]:
    tasks = [asyncio.create_task(scheduler.admit(tenant, **how)) for tenant in tenants]
    await ticks(3)
    return tasks


async def outcomes(tasks: list[asyncio.Task[Grant]]) -> list[Any]:
    async with asyncio.timeout(5):
        return await asyncio.gather(*tasks, return_exceptions=True)


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

    holder = await scheduler.admit("c")
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for tenant in "aaaabbb":
            group.create_task(work(tenant))
        await ticks(3)
        holder.release()
    assert "".join(order) == "abababa"


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


async def test_a_full_queue_says_so_at_once():
    scheduler = Scheduler(ONE, 2)
    await scheduler.admit("a")
    await waiting(scheduler, "a", "a")
    with pytest.raises(QueueFull) as full:
        scheduler.admit("a").send(None)
    assert full.value.retryable and full.value.details["retry_after_s"] == 5


@pytest.mark.parametrize(("apart_s", "retry_after_s"), [(0.01, 1), (3.0, 12), (100.0, 60)])
async def test_retry_after_is_when_the_queue_will_have_had_its_turn_from_1_to_60_s(apart_s: float, retry_after_s: int):
    now = [0.0]
    scheduler = Scheduler(ONE, 4, clock=lambda: now[0])
    for _ in range(10):
        (await scheduler.admit("a")).release()
        now[0] += apart_s
    await scheduler.admit("a")
    await waiting(scheduler, *"aaaa")
    with pytest.raises(QueueFull) as full:
        await scheduler.admit("a")
    assert full.value.details["retry_after_s"] == retry_after_s


async def test_in_a_full_queue_the_tenant_with_most_loses_its_last_to_one_with_two_fewer():
    scheduler = Scheduler(ONE, 4)
    await scheduler.admit("a")
    tasks = await waiting(scheduler, *"aaaa")
    taken = await waiting(scheduler, *"bb")
    assert scheduler.snapshot()["waiting"] == {"a": 2, "b": 2}
    assert [type(outcome) for outcome in await outcomes(tasks[2:])] == [QueueFull, QueueFull]
    with pytest.raises(QueueFull):
        await scheduler.admit("b")
    assert not any(task.done() for task in tasks[:2] + taken)


@pytest.mark.parametrize("cancelled", ["before", "after"])
async def test_one_who_is_cancelled_in_the_tick_in_which_it_would_lose_its_slot_is_just_cancelled(cancelled: str):
    scheduler = Scheduler(ONE, 2)
    await scheduler.admit("a")
    first, last = await waiting(scheduler, "a", "a")
    taker = asyncio.create_task(scheduler.admit("b"))
    if cancelled == "after":
        await asyncio.sleep(0)
    last.cancel()
    await ticks(3)
    assert last.cancelled() and not first.done() and not taker.done()
    assert scheduler.snapshot()["waiting"] == {"a": 1, "b": 1}


async def test_a_slot_that_a_cancelled_waiter_still_seems_to_have_is_free():
    scheduler = Scheduler(ONE, 1)
    holder = await scheduler.admit("a")
    [gone] = await waiting(scheduler, "a")
    next_one = asyncio.create_task(scheduler.admit("a"))
    gone.cancel()  # it runs after next_one
    holder.release()
    assert isinstance((await outcomes([next_one]))[0], Grant)


async def test_a_burst_of_500_against_a_queue_of_100_gives_each_a_place_or_a_clean_429():
    scheduler, running, most = Scheduler(Capacity(8), 100), 0, 0

    async def request(tenant: str) -> str:
        nonlocal running, most
        try:
            with await scheduler.admit(tenant, wait_s=30):
                running, most = running + 1, max(most, running + 1)
                await asyncio.sleep(0.001)
                running -= 1
        except QueueFull as full:
            return "429" if 1 <= full.details["retry_after_s"] <= 60 else "?"
        return "200"

    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(request("abcde"[n % 5]) for n in range(500)))
    assert (answers.count("200"), answers.count("429"), most) == (108, 392, 8)


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
