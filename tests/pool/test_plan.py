"""What `plan()` and the breaker promise for any facts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fumehood.pool.breaker import FIRST_S, LONGEST_S, THRESHOLD, Breaker
from fumehood.pool.plan import REST, Facts, Plan, PoolSettings, peak, plan

NOW = 1000.0
SETTINGS = PoolSettings(floor=2, ceiling=32, headroom=1.2, idle_s=30.0)
QUIET = Facts((), (), 0, 0.1, -math.inf, 0, 32, Breaker())
OPEN, HALF_OPEN = Breaker(THRESHOLD, NOW + 5), Breaker(THRESHOLD, NOW - 5)

UNTIMED = settings(deadline=None)  # the machine is shared
TIMES = st.lists(st.floats(NOW - 60, NOW), max_size=40).map(sorted)
ASKED = st.builds(
    PoolSettings, st.just(0), st.just(0), headroom=st.floats(1, 10), idle_s=st.floats(0.1, 100), window_s=st.floats(0.1, 100)
)
FACTS = st.builds(
    Facts,
    arrivals=TIMES,
    warm=TIMES,
    making=st.integers(0, 3),
    make_s=st.floats(1e-3, 30),
    made_at=st.floats(NOW - 60, NOW),
    floor=st.integers(0, 5),
    ceiling=st.integers(0, 50),
    breaker=st.builds(Breaker, st.integers(0, 9), st.floats(NOW - 60, NOW + 60)),
    running=st.booleans(),
)


def at(*ago: float) -> tuple[float, ...]:
    return tuple(NOW - s for s in sorted(ago, reverse=True))


@UNTIMED
@given(FACTS, ASKED)
def test_never_above_the_ceiling_and_never_below_a_floor_that_the_ceiling_allows(facts: Facts, asked: PoolSettings) -> None:
    step = plan(facts, asked, NOW)
    assert min(facts.floor, facts.ceiling) <= step.target <= facts.ceiling
    held = len(facts.warm) + facts.making
    assert held + step.make <= max(held, facts.ceiling)
    assert len(facts.warm) - step.reclaim >= min(len(facts.warm), step.target)


@UNTIMED
@given(FACTS, ASKED)
def test_it_makes_or_reclaims_or_says_when_to_look_again_in_the_future(facts: Facts, asked: PoolSettings) -> None:
    step = plan(facts, asked, NOW)
    assert step.make >= 0 and step.reclaim >= 0
    assert not (step.make and step.reclaim)
    assert step.look_at > NOW


@UNTIMED
@given(FACTS, ASKED)
def test_what_is_not_done_now_is_done_at_the_time_it_names(facts: Facts, asked: PoolSettings) -> None:
    """Nothing is forgotten for ever: followed from look to look without new claims, a class ends at its floor exactly."""
    facts, now = replace(facts, making=0, running=False), NOW
    for _ in range(300):
        step = plan(facts, asked, now)
        warm = [*facts.warm[step.reclaim :], *([now] * step.make)]
        facts = replace(facts, warm=warm, breaker=Breaker() if step.make else facts.breaker)
        if not step.make and not step.reclaim:
            if math.isinf(step.look_at):
                break
            now = step.look_at
    floor = min(facts.floor, facts.ceiling)
    assert len(facts.warm) == floor


@UNTIMED
@given(FACTS, ASKED)
def test_an_open_breaker_makes_nothing_and_a_half_open_one_tries_one(facts: Facts, asked: PoolSettings) -> None:
    made = plan(replace(facts, breaker=OPEN), asked, NOW).make
    tried = plan(replace(facts, breaker=HALF_OPEN), asked, NOW).make
    assert made == 0
    assert tried + facts.making <= max(1, facts.making)


@UNTIMED
@given(FACTS, ASKED)
def test_more_claims_never_want_fewer(facts: Facts, asked: PoolSettings) -> None:
    """An arrival at the end of the series can only raise the target."""
    more = replace(facts, arrivals=[*facts.arrivals, NOW])
    assert plan(more, asked, NOW).target >= plan(facts, asked, NOW).target


@UNTIMED
@given(TIMES, st.floats(1e-3, 30))
def test_the_peak_is_at_most_the_claims_and_slower_makes_raise_it(arrivals: list[float], make_s: float) -> None:
    level = peak(arrivals, make_s)
    assert min(1, len(arrivals)) <= level <= len(arrivals)
    assert peak(arrivals, 2 * make_s) >= level


def test_claims_at_one_moment_are_all_concurrent_and_get_a_fifth_more() -> None:
    burst = replace(QUIET, arrivals=(NOW,) * 10)
    assert plan(burst, SETTINGS, NOW) == Plan(target=12, make=12)


def test_claims_further_apart_than_a_make_are_one_at_a_time() -> None:
    assert plan(replace(QUIET, arrivals=at(9, 6, 3)), SETTINGS, NOW).target == 2
    assert peak(at(9, 6, 3), make_s=0.1) == 1


def test_a_class_asked_for_once_in_the_window_gets_nothing() -> None:
    assert plan(replace(QUIET, arrivals=at(0)), SETTINGS, NOW).target == 0
    assert plan(replace(QUIET, arrivals=at(SETTINGS.window_s, 0)), SETTINGS, NOW).target == 0
    assert plan(replace(QUIET, arrivals=at(SETTINGS.window_s - 1, 0)), SETTINGS, NOW).target == 2


def test_an_idle_class_keeps_its_floor_and_gives_the_oldest_back() -> None:
    idle = replace(QUIET, arrivals=at(31, 31, 31), warm=at(50, 40, 31, 29), floor=2)
    assert plan(idle, SETTINGS, NOW) == Plan(target=2, reclaim=2, look_at=NOW + 1)


def test_a_surplus_that_is_young_stays_until_it_is_idle() -> None:
    young = replace(QUIET, warm=at(10, 5))
    assert plan(young, SETTINGS, NOW) == Plan(target=0, look_at=NOW + 20)


def test_what_can_not_be_made_keeps_nobody_from_giving_back_what_is_idle() -> None:
    """Target 6 until NOW + 10; the breaker is open until long after."""
    stuck = replace(QUIET, arrivals=at(*[20] * 5), warm=at(40, 40), breaker=Breaker(9, NOW + 60))
    assert plan(stuck, SETTINGS, NOW) == Plan(target=6, look_at=NOW + 10)
    assert plan(stuck, SETTINGS, NOW + 10).reclaim == 2


@pytest.mark.parametrize(("window_s", "idle_s"), [(30, 100), (100, 30)], ids=["it leaves the window", "the class is idle"])
def test_what_a_burst_needed_is_looked_at_when_the_burst_is_over(window_s: float, idle_s: float) -> None:
    asked = replace(SETTINGS, window_s=window_s, idle_s=idle_s)
    burst = replace(QUIET, arrivals=at(*[10] * 5), warm=at(*[200] * 6))
    assert plan(burst, asked, NOW) == Plan(target=6, look_at=NOW + 20)
    assert plan(burst, asked, NOW + 20).reclaim == 6


def test_refill_rests_the_longer_the_fuller_the_class_is() -> None:
    """Target 12, last make ended just now, makes of 0.1 s."""
    burst = replace(QUIET, arrivals=(NOW,) * 10, made_at=NOW, running=True)
    assert plan(burst, SETTINGS, NOW).make == 12, "an empty one rests never"
    half, full = (plan(replace(burst, warm=at(*[1] * n)), SETTINGS, NOW) for n in (6, 11))
    assert (half.make, full.make) == (0, 0)
    assert half.look_at == pytest.approx(NOW + REST * 0.1 / 4)
    assert half.look_at < full.look_at < NOW + REST * 0.1


def test_refill_does_not_rest_when_nothing_was_claimed_lately_and_nothing_runs() -> None:
    calm = replace(QUIET, warm=at(5), made_at=NOW, floor=2)
    assert plan(calm, SETTINGS, NOW).make == 1
    assert plan(replace(calm, running=True), SETTINGS, NOW).make == 0
    assert plan(replace(calm, arrivals=at(0.5)), SETTINGS, NOW).make == 0
    assert plan(replace(calm, arrivals=at(1.5)), SETTINGS, NOW).make == 1


def test_the_breaker_opens_at_the_third_failure_and_doubles_to_a_minute_for_ever() -> None:
    breaker, waits = Breaker(), []
    for _ in range(3000):
        breaker = breaker.failed(NOW)
        waits.append(breaker.retry_at - NOW if breaker.state(NOW) == "open" else 0.0)
    assert waits[:10] == [0, 0, FIRST_S, 2, 4, 8, 16, 32, LONGEST_S, LONGEST_S]
    assert set(waits[10:]) == {LONGEST_S}
    assert breaker.state(NOW + LONGEST_S) == "half-open"
