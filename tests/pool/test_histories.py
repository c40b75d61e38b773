"""After any history of claims, deaths, failures and waits: nothing lost or given twice, bounds kept, the floor found again."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import Clock, simulate
from workshop import SETTINGS, STEPS, Thing, Workshop, row

from fumehood.pool import Pool
from fumehood.pool.breaker import LONGEST_S

KEYS = st.sampled_from(["k", "a", "b"])
HISTORIES = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), KEYS, st.integers(1, 12)),
        st.tuples(st.just("die"), st.integers(0, 50)),
        st.tuples(st.just("wait"), st.floats(0, 3)),
        st.tuples(st.just("wait"), st.floats(0, 70)),
        st.tuples(
            st.just("fault"),
            st.sampled_from([None, "raises at once", "raises", "hangs", "cancelled inside", "stubborn"]),
            st.integers(0, STEPS - 1),
        ),
        st.tuples(st.just("busy"), st.integers(0, 2)),
    ),
    max_size=30,
)


async def _do(step: tuple[Any, ...], shop: Workshop, pool: Pool[str, Thing]) -> None:
    match step:
        case ("claim", key, count):
            for _ in range(count):
                shop.claim(pool, key)
        case ("die", number) if shop.things:
            thing = shop.things[number % len(shop.things)]
            thing.dead = True
            pool.forget(thing)
        case ("wait", seconds):
            await asyncio.sleep(seconds)
        case ("fault", fault, at):
            shop.fault, shop.fault_step = fault, at
        case ("busy", running):
            pool.busy(running)


def _within_bounds(shop: Workshop, pool: Pool[str, Thing]) -> None:
    rows = {row["class"]: row for row in pool.snapshot()}
    assert all(r["making"] in (0, 1) for r in rows.values()), "one at a time of a class"
    assert rows["k"]["warm"] + rows["k"]["making"] <= SETTINGS.ceiling
    assert sum(r["warm"] + r["making"] for key, r in rows.items() if key != "k") <= SETTINGS.ceiling
    assert sum(r["made"] for r in rows.values()) == len(shop.things)
    gone = len({t.number for t in shop.claimed}) + sum(r["warm"] for r in rows.values())
    assert gone <= len(shop.things)
    assert sum(r["hits"] for r in rows.values()) == len(shop.claimed)


async def _lived(history: list[tuple[Any, ...]], clock: Clock) -> tuple[Workshop, Pool[str, Thing]]:
    shop = Workshop(clock)
    pool = shop.pool()
    pool.keep("k")
    pool.start()
    for step in history:
        await _do(step, shop, pool)
        _within_bounds(shop, pool)
    return shop, pool


@settings(deadline=None)
@given(HISTORIES)
def test_whatever_happened_closing_leaves_each_thing_claimed_or_closed_once(history: list[tuple[Any, ...]]) -> None:
    async def work(clock: Clock) -> None:
        shop, pool = await _lived(history, clock)
        await pool.aclose()
        shop.nothing_left()

    simulate(work)


@settings(deadline=None)
@given(HISTORIES)
def test_whatever_happened_a_pool_that_is_left_alone_ends_at_its_floor(history: list[tuple[Any, ...]]) -> None:
    async def work(clock: Clock) -> None:
        shop, pool = await _lived(history, clock)
        shop.fault = None
        await asyncio.sleep(LONGEST_S + 2 * SETTINGS.idle_s + 4 * SETTINGS.make_timeout_s)
        assert row(pool, "k")["warm"] == SETTINGS.floor
        assert all(r["warm"] == 0 for r in pool.snapshot() if r["class"] != "k")
        await pool.aclose()
        shop.nothing_left()

    simulate(work)
