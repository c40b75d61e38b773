"""What one decision may and must do, for any queue and any holdings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moment import MEMORY, NOW, UNTIMED, URGENT, Moment, before, moments, numbered

from fumehood.scheduler import AGEING_S, PRIORITIES, RESERVE_AFTER_S, Ask, Capacity, Decision, Held, assign


def aged(ask: Ask) -> bool:
    return NOW - ask.arrived_at >= RESERVE_AFTER_S


@UNTIMED
@given(moments())
def test_neither_places_nor_memory_nor_a_tenants_cap_is_ever_over_committed(moment: Moment):
    decision = moment.decide()
    after = moment.after(decision)
    assert after.places >= 0 and after.memory >= 0
    for tenant in {ask.tenant for ask in decision.start}:
        assert not moment.capacity.tenant_places or after.places_of(tenant) <= moment.capacity.tenant_places


@UNTIMED
@given(moments())
def test_each_ask_has_one_outcome_and_only_those_past_their_deadline_expire(moment: Moment):
    decision = moment.decide()
    assert len(set(decision.start)) == len(decision.start) and set(decision.start) <= set(moment.waiting)
    assert list(decision.expire) == [a for a in moment.waiting if a.deadline_at is not None and a.deadline_at <= NOW]
    assert not set(decision.start) & set(decision.expire)


@UNTIMED
@given(moments())
def test_what_fits_is_left_waiting_only_behind_a_large_ask_that_has_waited_long(moment: Moment):
    after = moment.after(moment.decide())
    old = [ask for ask in after.waiting if aged(ask)]
    for ask in filter(after.fits, after.waiting):
        behind_its_own = any(other.tenant == ask.tenant and before(other, ask) for other in old)
        takes_what_is_kept = ask.memory_bytes > 0 or after.places == 1
        kept = any(other.tenant != ask.tenant and other.memory_bytes > after.memory for other in old)
        assert behind_its_own or (takes_what_is_kept and kept)


@UNTIMED
@given(moments())
def test_within_a_tenant_the_earlier_turn_is_passed_only_by_smaller_asks_and_not_for_long(moment: Moment):
    decision = moment.decide()
    left = moment.after(decision).waiting
    for started in decision.start:
        for passed in (a for a in left if a.tenant == started.tenant and before(a, started)):
            assert started.memory_bytes < passed.memory_bytes and not aged(passed)
    for tenant in "abc":
        turns = [(a.turn, a.number) for a in decision.start if a.tenant == tenant]
        assert turns == sorted(turns)


@UNTIMED
@given(moments())
def test_no_priority_passes_an_ask_of_the_same_size_that_came_20_ageing_steps_before(moment: Moment):
    decision = moment.decide()
    for passed in moment.after(decision).waiting:
        for started in decision.start:
            if (started.tenant, started.memory_bytes) == (passed.tenant, passed.memory_bytes):
                assert started.arrived_at <= passed.arrived_at + 20 * AGEING_S


@UNTIMED
@given(moments(), st.randoms())
def test_the_decision_is_a_function_of_its_input_which_it_leaves_alone(moment: Moment, random):
    waiting, held = list(moment.waiting), dict(moment.held)
    decision = moment.decide()
    assert (moment.waiting, moment.held) == (waiting, held) and moment.decide() == decision
    random.shuffle(moment.waiting)
    assert moment.decide().start == decision.start


@UNTIMED
@given(moments())
def test_a_second_decision_at_the_same_moment_changes_nothing(moment: Moment):
    assert moment.after(moment.decide()).decide() == Decision((), ())


@UNTIMED
@given(moments())
def test_nobody_gets_a_place_while_another_tenant_waits_with_fewer(moment: Moment):
    moment.waiting = [replace(ask, memory_bytes=0, deadline_at=None) for ask in moment.waiting]
    moment.held = {tenant: h._replace(memory_bytes=0) for tenant, h in moment.held.items()}
    decision = moment.decide()
    after = moment.after(decision)
    for waiting in {ask.tenant for ask in after.waiting if not after.capped(ask.tenant)}:
        for served in {ask.tenant for ask in decision.start}:
            assert after.places_of(served) <= after.places_of(waiting) + 1


def test_priority_orders_the_asks_of_one_tenant_and_equal_ones_are_first_come_first_served():
    asks = numbered(Ask("a", NOW, 0, priority=p) for p in (0, 5, -5, 5))
    decision = assign(asks, {}, Capacity(4), NOW)
    assert [(a.priority, a.number) for a in decision.start] == [(5, 1), (5, 3), (0, 0), (-5, 2)]


def test_a_tenant_at_its_cap_holds_up_nobody_else():
    waiting = numbered([Ask("a", NOW - 9, 0, MEMORY, URGENT), Ask("b", NOW, 0, MEMORY - 1)])
    decision = assign(waiting, {"a": Held(1, 1, 0.0)}, Capacity(3, MEMORY, tenant_places=1), NOW)
    assert [ask.tenant for ask in decision.start] == ["b"]


def test_nothing_is_kept_for_an_ask_that_waits_for_its_own_tenants_places():
    waiting = numbered([Ask("a", NOW - 9, 0, MEMORY), Ask("b", NOW, 0, 2)])
    decision = assign(waiting, {"a": Held(1, 1, 0.0), "b": Held(2, 5, 0.0)}, Capacity(6, MEMORY), NOW)
    assert [ask.tenant for ask in decision.start] == ["b"]


@pytest.mark.parametrize(("places", "started"), [(2, 0), (3, 1), (4, 2)])
def test_one_place_and_its_memory_are_kept_for_one_large_ask_at_a_time(places: int, started: int):
    large = [Ask(tenant, NOW - 9, 0, MEMORY) for tenant in "ab"]
    small = [Ask("c", NOW, 0, memory) for memory in (1, 0, 0, 0)]
    decision = assign(numbered(large + small), {"d": Held(1, 4, 0.0)}, Capacity(places, MEMORY), NOW)
    assert [ask.memory_bytes for ask in decision.start] == [0] * started


@pytest.mark.parametrize(("apart", "passes"), [(19.75, True), (20.25, False)])
def test_from_the_lowest_priority_to_the_highest_is_20_ageing_steps(apart: float, passes: bool):
    waited_s = apart * AGEING_S
    asks = numbered([Ask("a", NOW - waited_s, 0, priority=PRIORITIES[0]), Ask("a", NOW, 0, priority=URGENT)])
    assert assign(asks, {}, Capacity(1), NOW).start == (asks[passes],)


def test_a_share_is_the_greater_of_places_and_memory():
    waiting = numbered([Ask("a", NOW - 1, 0, 1), Ask("b", NOW, 0, 1)])
    decision = assign(waiting, {"a": Held(1, 6, 0.0), "b": Held(2, 2, 0.0)}, Capacity(8, MEMORY), NOW)
    assert [ask.tenant for ask in decision.start] == ["b", "a"]
