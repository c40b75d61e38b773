"""What many decisions in a row come to: nobody starves, shares stay level, a place goes round."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moment import CAPACITY, MEMORY, PRIORITY, UNTIMED, URGENT, Moment, before, seconds

from fumehood.scheduler import RESERVE_AFTER_S, Ask, Capacity, Held


@dataclass(frozen=True)
class Job:
    arrives_at: float
    tenant: str
    takes_s: float
    memory_bytes: int = 0
    priority: int = 0


@dataclass
class Simulation:
    """Jobs through assign() until nothing is left. `shares`: after each decision, the places of those who still wait."""

    capacity: Capacity
    started: list[tuple[float, Ask]] = field(default_factory=list)
    shares: list[dict[str, int]] = field(default_factory=list)

    def run(self, jobs: list[Job]) -> Simulation:
        events: list[tuple[float, int, Ask, bool]] = []
        jobs = sorted(jobs, key=lambda job: job.arrives_at)
        for n, job in enumerate(jobs):
            ask = Ask(job.tenant, job.arrives_at, n, job.memory_bytes, job.priority)
            heappush(events, (job.arrives_at, n, ask, True))
        moment = Moment([], {}, self.capacity)
        while events:
            moment.now, _, ask, arrives = heappop(events)
            self._arrive_or_end(moment, ask, arrives)
            decision = moment.decide()
            moment = moment.after(decision)
            assert moment.places >= 0 and moment.memory >= 0
            self.started += [(moment.now, ask) for ask in decision.start]
            self.shares.append({ask.tenant: moment.places_of(ask.tenant) for ask in moment.waiting})
            for ask in decision.start:
                heappush(events, (moment.now + jobs[ask.number].takes_s, ask.number, ask, False))
        return self

    def _arrive_or_end(self, moment: Moment, ask: Ask, arrives: bool) -> None:
        if arrives:
            moment.waiting.append(ask)
        else:
            mine = moment.held[ask.tenant]
            moment.held[ask.tenant] = Held(mine.places - 1, mine.memory_bytes - ask.memory_bytes, mine.started_at)

    def tenants(self) -> list[str]:
        return [ask.tenant for _, ask in self.started]


JOB = st.builds(
    Job,
    arrives_at=seconds(0, 20),
    tenant=st.sampled_from("abc"),
    takes_s=seconds(0.25, 10),
    memory_bytes=st.integers(0, MEMORY),
    priority=PRIORITY,
)


@UNTIMED
@given(CAPACITY, st.lists(JOB, max_size=25))
def test_every_ask_that_could_ever_be_met_is_started_once(capacity: Capacity, jobs: list[Job]):
    simulation = Simulation(capacity).run(jobs)
    assert sorted(ask.number for _, ask in simulation.started) == list(range(len(jobs)))


STREAM = st.builds(
    lambda priority, takes_s, every_s, memory_bytes: [
        Job(n * every_s, "a", takes_s, memory_bytes, priority) for n in range(150)
    ],
    *(PRIORITY, seconds(0.5, 6), seconds(0.25, 1), st.integers(1, 4)),
)


@UNTIMED
@given(STREAM)
def test_a_large_ask_is_not_starved_by_another_tenants_stream_of_small_ones(small: list[Job]):
    simulation = Simulation(Capacity(100, MEMORY)).run([*small, Job(1.0, "b", 1.0, MEMORY)])
    started_at = next(at for at, ask in simulation.started if ask.tenant == "b")
    # Once it has aged it waits for those that run, and at equal shares once for an earlier turn; arrives_at: between decisions.
    assert started_at - 1.0 <= RESERVE_AFTER_S + 2 * small[0].takes_s + small[1].arrives_at


@UNTIMED
@given(STREAM)
def test_a_large_ask_that_has_aged_is_passed_by_no_later_turn_of_its_own_tenant(small: list[Job]):
    started = Simulation(Capacity(100, MEMORY)).run([*small, Job(1.0, "a", 1.0, MEMORY)]).started
    at, large = next((at, ask) for at, ask in started if ask.memory_bytes == MEMORY)
    passed_by = [ask for when, ask in started if 1.0 + RESERVE_AFTER_S <= when < at]
    assert all(before(ask, large) for ask in passed_by)


@UNTIMED
@given(st.integers(1, 6), st.integers(0, 2), st.lists(seconds(0.5, 3), min_size=30, max_size=30))
def test_with_equal_demand_the_shares_of_two_tenants_differ_by_at_most_one(places, memory_bytes, takes_s):
    jobs = [Job(0.0, "ab"[n % 2], s, memory_bytes) for n, s in enumerate(takes_s)]
    shares = [share for share in Simulation(Capacity(places, MEMORY)).run(jobs).shares if len(share) == 2]
    assert all(abs(share["a"] - share["b"]) <= 1 for share in shares)


@pytest.mark.parametrize("tenants", ["ab", "abcd"])
def test_one_place_goes_round_whoever_asks_most_or_first(tenants: str):
    many = [Job(0.0, "a", 1.0) for _ in range(20)]
    few = [Job(0.5, tenant, 1.0) for tenant in tenants[1:] for _ in range(3)]
    order = Simulation(Capacity(1)).run([*many, *few]).tenants()
    turns = [Counter(order[1 + n * len(tenants) :][: len(tenants)]) for n in range(3)]
    assert turns == [Counter(tenants)] * 3


def test_a_tenant_that_marks_everything_urgent_passes_the_others_once():
    first = Job(0.0, "x", 1.0)
    plain = [Job(0.2, tenant, 1.0) for tenant in "bc" for _ in range(3)]
    urgent = [Job(0.5, "a", 1.0, priority=URGENT) for _ in range(6)]
    order = Simulation(Capacity(1)).run([first, *plain, *urgent]).tenants()
    assert "".join(order) == "x" + "abc" * 3 + "aaa"
