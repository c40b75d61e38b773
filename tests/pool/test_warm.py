"""The pool at work, in simulated time: every claim, failure, death and end of it, and what is left after each."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace

import pytest
from simulated import Clock, simulate, simulated
from workshop import MAKE_S, SETTINGS, STEPS, Thing, Workshop, row

from fumehood.pool import Pool

FAULTS = ["raises at once", "raises", "hangs", "cancelled inside"]


async def started(clock: Clock) -> tuple[Workshop, Pool[str, Thing]]:
    """One kept class, "k", warm."""
    shop = Workshop(clock)
    pool = shop.pool()
    pool.keep("k")
    pool.start()
    await pool.ready("k")
    return shop, pool


@simulated
async def test_a_kept_class_is_warm_when_ready_returns_and_each_is_given_once(clock: Clock) -> None:
    shop, pool = await started(clock)
    assert (row(pool, "k")["warm"], clock()) == (2, pytest.approx(2 * MAKE_S))
    given = [shop.claim(pool, "k") for _ in range(3)]
    assert given[0] and given[1] and given[2] is None
    assert (row(pool, "k")["hits"], row(pool, "k")["misses"]) == (2, 1)
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_a_burst_is_followed_by_a_fifth_more_than_it_and_idleness_by_the_floor(clock: Clock) -> None:
    shop, pool = await started(clock)
    for _ in range(5):
        shop.claim(pool, "k")
    await asyncio.sleep(20)
    assert (row(pool, "k")["warm"], row(pool, "k")["target"]) == (6, 6)
    warm_then = [t for t in shop.things if t not in shop.claimed]
    await asyncio.sleep(30)
    assert (row(pool, "k")["warm"], row(pool, "k")["target"], row(pool, "k")["reclaimed"]) == (2, 2, 4)
    assert shop.closed == warm_then[:4], "the oldest go"
    await asyncio.sleep(3600)
    assert row(pool, "k")["made"] == len(shop.things) == 8, "an idle pool rests"
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_claims_that_a_make_fits_between_want_no_more_than_one_at_a_time(clock: Clock) -> None:
    """How long a make takes is known from the first one on."""
    shop, pool = await started(clock)
    for _ in range(6):
        assert shop.claim(pool, "k")
        assert row(pool, "k")["target"] == 2
        await asyncio.sleep(MAKE_S * 1.5)
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_a_class_asked_for_twice_becomes_warm_and_goes_when_idle(clock: Clock) -> None:
    shop, pool = await started(clock)
    assert shop.claim(pool, "other") is None
    await asyncio.sleep(5)
    assert row(pool, "other")["warm"] == 0
    assert shop.claim(pool, "other") is None
    await asyncio.sleep(5)
    assert row(pool, "other")["warm"] > 0
    assert shop.claim(pool, "other")
    await asyncio.sleep(40)
    assert row(pool, "other")["warm"] == 0
    await pool.aclose()
    shop.nothing_left()


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_make_is_counted_logged_and_leaves_nothing(fault: str, step: int, caplog: pytest.LogCaptureFixture) -> None:
    async def work(clock: Clock) -> None:
        shop = Workshop(clock, fault=fault, fault_step=step)
        pool = shop.pool()
        pool.keep("k")
        pool.start()
        await pool.ready("k")
        seen = row(pool, "k")
        assert (seen["breaker"], seen["failed"], seen["warm"], seen["making"]) == ("open", 3, 0, 0)
        assert 0 < seen["retry_in_s"] <= 1
        assert shop.claim(pool, "k") is None, "a cold start is the caller's"
        assert shop.tools == 0
        shop.fault = None
        await asyncio.sleep(1 + 2 * MAKE_S + 0.1)
        assert (row(pool, "k")["breaker"], row(pool, "k")["warm"]) == ("closed", 2)
        await pool.aclose()
        shop.nothing_left()

    with caplog.at_level(logging.WARNING, "fumehood.pool"):
        simulate(work)
    assert [r.getMessage().startswith("make of k failed") for r in caplog.records] == [True] * 3


@simulated
async def test_an_open_breaker_tries_one_after_1_2_4_seconds_up_to_a_minute(clock: Clock) -> None:
    shop = Workshop(clock, fault="raises at once")
    pool = shop.pool()
    pool.keep("k")
    pool.start()
    await asyncio.sleep(240)
    assert shop.attempts == pytest.approx([0, 0, 0, 1, 3, 7, 15, 31, 63, 123, 183])
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_one_class_that_fails_leaves_the_others_alone(clock: Clock) -> None:
    shop, pool = await started(clock)
    shop.fault, shop.faulty = "hangs", frozenset({"bad"})
    for _ in range(4):
        shop.claim(pool, "bad")
    await asyncio.sleep(1)
    assert row(pool, "bad")["making"] == 1
    assert shop.claim(pool, "k") and shop.claim(pool, "k")
    await asyncio.sleep(2)
    assert row(pool, "k")["warm"] >= 2
    await asyncio.sleep(20)
    assert row(pool, "bad")["breaker"] != "closed"
    assert row(pool, "k")["breaker"] == "closed"
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_one_that_died_is_closed_never_given_and_replaced(clock: Clock) -> None:
    shop, pool = await started(clock)
    await asyncio.sleep(60)
    dead = shop.things[1]
    dead.dead = True
    pool.forget(dead)
    assert row(pool, "k")["warm"] == 1
    pool.forget(dead)
    assert shop.claim(pool, "k") is shop.things[0]
    pool.forget(shop.things[0])
    await asyncio.sleep(5)
    assert (row(pool, "k")["warm"], row(pool, "k")["failed"], row(pool, "k")["breaker"]) == (2, 0, "closed")
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_things_that_always_die_young_are_not_made_for_ever(clock: Clock) -> None:
    shop = Workshop(clock)
    pool = shop.pool()
    pool.keep("k")
    pool.start()
    while clock() < 600:
        await asyncio.sleep(0.5)
        for thing in shop.things:
            pool.forget(thing)
    assert row(pool, "k")["breaker"] != "closed"
    assert 0 < sum(at > 300 for at in shop.attempts) <= 6 * (SETTINGS.floor + 1), "its floor and one, once a minute"
    await pool.aclose()
    shop.nothing_left()


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.15, 0.25, 0.35, 0.45, 0.6])
@pytest.mark.parametrize("fault", [None, "raises", "hangs", "stubborn"])
def test_closing_at_any_step_of_a_make_leaves_nothing(fault: str | None, after_s: float) -> None:
    async def work(clock: Clock) -> None:
        shop = Workshop(clock, fault=fault, fault_step=1)
        pool = shop.pool()
        pool.keep("k")
        pool.start()
        waits = asyncio.create_task(pool.ready("k"))
        for key in ("other", "other", "third", "third"):
            shop.claim(pool, key)
        await asyncio.sleep(after_s)
        await pool.aclose()
        await waits
        shop.nothing_left()
        assert pool.claim("k") is None and pool.claim("new") is None
        assert fault == "raises" or row(pool, "k")["failed"] == 0, "to be cancelled is no failure"
        assert [r["warm"] + r["making"] for r in pool.snapshot()] == [0, 0, 0]

    simulate(work)


@simulated
async def test_a_close_that_was_cancelled_can_be_done_again(clock: Clock) -> None:
    shop, pool = await started(clock)
    first = asyncio.create_task(pool.aclose())
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    await pool.aclose()
    shop.nothing_left()


def test_a_close_that_fails_is_logged_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def work(clock: Clock) -> None:
        shop, pool = await started(clock)
        shop.close_fails = True
        await pool.aclose()
        shop.nothing_left()

    simulate(work)
    assert [r.getMessage().endswith("failed") for r in caplog.records] == [True, True]


def test_refill_that_ended_for_ever_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Only a make that raises what is no Exception can do that."""

    class Abort(BaseException):
        pass

    async def make(_: str) -> Thing:
        raise Abort

    async def work(clock: Clock) -> None:
        pool = Pool(make, Workshop(clock).close, SETTINGS, clock=clock)
        pool.keep("k")
        pool.start()
        await asyncio.sleep(1)
        await pool.aclose()

    simulate(work)
    assert [(r.levelname, r.exc_info and r.exc_info[0]) for r in caplog.records] == [("ERROR", Abort)]


@simulated
async def test_inventing_classes_gets_nobody_more_than_one_ceiling_and_takes_nothing_from_kept_ones(clock: Clock) -> None:
    shop, pool = await started(clock)
    most = 0
    for number in range(2000):
        for _ in range(1 + number % 3):
            shop.claim(pool, f"invented {number % 300}")
        await asyncio.sleep(0.05)
        if number % 10:
            continue
        rows = pool.snapshot()
        assert len(rows) <= SETTINGS.max_classes
        most = max(most, sum(r["warm"] + r["making"] for r in rows if r["class"] != "k"))
        assert row(pool, "k")["warm"] == 2
        assert sum(shop.now_making.values()) <= 1, "one after the other"
    assert 0 < most <= SETTINGS.ceiling
    assert len(asyncio.all_tasks()) <= SETTINGS.max_classes + SETTINGS.ceiling + 2
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_asking_once_for_each_of_a_thousand_classes_makes_nothing(clock: Clock) -> None:
    shop, pool = await started(clock)
    for number in range(1000):
        shop.claim(pool, f"invented {number}")
        await asyncio.sleep(0.01)
    assert set(shop.keys) == {"k"}
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_the_class_that_was_not_used_for_longest_is_forgotten_but_never_a_kept_one(clock: Clock) -> None:
    shop = Workshop(clock, fault="raises at once")
    pool = shop.pool(replace(SETTINGS, max_classes=3))
    pool.keep("k")
    pool.start()
    await pool.ready("k")
    for key in ("a", "b", "a", "c"):
        pool.claim(key)
    assert [r["class"] for r in pool.snapshot()] == ["k", "a", "c"]
    await pool.aclose()


@simulated
async def test_when_every_class_has_something_a_new_one_is_a_cold_start_and_leaves_no_trace(clock: Clock) -> None:
    shop = Workshop(clock)
    pool = shop.pool(replace(SETTINGS, max_classes=1))
    pool.start()
    assert pool.claim("a") is None and pool.claim("a") is None
    await asyncio.sleep(5)
    assert pool.claim("b") is None
    assert [r["class"] for r in pool.snapshot()] == ["a"]
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_a_class_can_be_kept_after_it_was_asked_for(clock: Clock) -> None:
    shop, pool = await started(clock)
    pool.claim("late")
    await asyncio.sleep(60)
    pool.keep("late")
    await pool.ready("late")
    assert row(pool, "late")["warm"] == SETTINGS.floor
    await pool.aclose()
    shop.nothing_left()


@simulated
async def test_while_work_runs_the_last_ones_are_made_slowly(clock: Clock) -> None:
    """Target 6. From the start of the make of the fifth to that of the sixth: one make, and with running work a rest too."""
    gaps: dict[int, float] = {}
    for running in (0, 1):
        shop, pool = await started(clock)
        for _ in range(5):
            shop.claim(pool, "k")
        pool.busy(running)
        await asyncio.sleep(20)
        assert len(shop.attempts) == SETTINGS.floor + 6
        gaps[running] = shop.attempts[-1] - shop.attempts[-2]
        await pool.aclose()
        shop.nothing_left()
    assert gaps[0] == pytest.approx(MAKE_S)
    assert gaps[1] > 3 * MAKE_S


@pytest.mark.parametrize(
    ("load", "least"), [(0.2, 0.98), (0.5, 0.95), (0.8, 0.9)], ids="at {} claims for each make time".format
)
def test_poisson_arrivals_are_mostly_hits_and_the_pool_sinks_back_to_its_floor(load: float, least: float) -> None:
    """Makes of 40 ms, 30 s to learn in, 120 s counted. The seed is fixed and time simulated: the same figures each run."""

    async def work(clock: Clock) -> float:
        pool = Pool[str, object](make, close, replace(SETTINGS, ceiling=32), clock=clock)
        pool.keep("k")
        pool.start()
        chance = random.Random(3)
        for until in (30, 150):
            before = row(pool, "k")
            while clock() < until:
                await asyncio.sleep(chance.expovariate(load / 0.04))
                pool.claim("k")
        after = row(pool, "k")
        await asyncio.sleep(SETTINGS.idle_s + 1)
        assert row(pool, "k")["warm"] == SETTINGS.floor
        await pool.aclose()
        hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
        return hits / (hits + misses)

    async def make(_: str) -> object:
        await asyncio.sleep(0.04)
        return object()

    async def close(_: object) -> None:
        pass

    assert simulate(work) >= least


async def test_it_is_the_same_on_real_time() -> None:
    shop = Workshop(asyncio.get_running_loop().time)
    pool = shop.pool()
    pool.keep("k")
    pool.start()
    await asyncio.wait_for(pool.ready("k"), 30)
    assert shop.claim(pool, "k") and shop.claim(pool, "k") and not shop.claim(pool, "k")
    await asyncio.wait_for(pool.ready("k"), 30)
    assert shop.claim(pool, "k")
    await pool.aclose()
    shop.nothing_left()
