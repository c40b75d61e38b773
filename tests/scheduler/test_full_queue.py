"""A full queue: who is sent away, when to come again, and that nobody can fill it for all."""

from __future__ import annotations

import asyncio

import pytest
from waiters import ONE, outcomes, ticks, waiting

from fumehood.errors import QueueFull
from fumehood.scheduler import Capacity, Grant, Scheduler

pytestmark = pytest.mark.usefixtures("nothing_is_left_unheard")


async def test_a_full_queue_says_so_at_once():
    scheduler = Scheduler(ONE, 2)
    await scheduler.admit("a")
    await waiting(scheduler, "a", "a")
    with pytest.raises(QueueFull) as full:
        scheduler.admit("a").send(None)
    assert full.value.retryable and full.value.details["retry_after_s"] == 5


@pytest.mark.parametrize(("apart_s", "limit", "retry_after_s"), [(0.01, 4, 1), (3.0, 4, 12), (100.0, 4, 60), (3.0, 0, 1)])
async def test_retry_after_is_when_the_queue_will_have_had_its_turn_from_1_to_60_s(
    apart_s: float, limit: int, retry_after_s: int
):
    now = [0.0]
    scheduler = Scheduler(ONE, limit, clock=lambda: now[0])
    for _ in range(10):
        (await scheduler.admit("a")).release()
        now[0] += apart_s
    await scheduler.admit("a")
    await waiting(scheduler, *"a" * limit)
    with pytest.raises(QueueFull) as full:
        await scheduler.admit("a")
    assert full.value.details["retry_after_s"] == retry_after_s


@pytest.mark.parametrize("limit", [4, 5])
async def test_in_a_full_queue_the_tenant_with_most_loses_its_last_to_one_with_two_fewer(limit: int):
    scheduler = Scheduler(ONE, limit)
    await scheduler.admit("a")
    tasks = await waiting(scheduler, *"a" * limit)
    taken = await waiting(scheduler, *"bb")
    assert scheduler.snapshot()["waiting"] == {"a": limit - 2, "b": 2}
    assert [type(outcome) for outcome in await outcomes(tasks[-2:])] == [QueueFull, QueueFull]
    with pytest.raises(QueueFull):
        scheduler.admit("b").send(None)
    assert not any(task.done() for task in tasks[:-2] + taken)


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
