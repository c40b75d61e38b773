"""A moment to decide in: who waits, who holds what. Times are quarters of a second, which floats hold exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st

from fumehood.scheduler import PRIORITIES, Ask, Capacity, Decision, Held, assign

UNTIMED = settings(deadline=None)  # the machine is shared
NOW = 100.0
MEMORY = 12
URGENT = PRIORITIES[-1]
PRIORITY = st.integers(PRIORITIES[0], URGENT)
CAPACITY = st.builds(Capacity, places=st.integers(1, 6), memory_bytes=st.just(MEMORY), tenant_places=st.integers(0, 4))


def seconds(first: float, last: float) -> st.SearchStrategy[float]:
    return st.integers(int(first * 4), int(last * 4)).map(lambda quarters: quarters / 4)


ASK = st.builds(
    Ask,
    tenant=st.sampled_from("abc"),
    arrived_at=seconds(NOW - 30, NOW),
    number=st.just(0),
    memory_bytes=st.integers(0, MEMORY),
    priority=PRIORITY,
    deadline_at=st.none() | seconds(NOW - 5, NOW + 5),
)


@dataclass
class Moment:
    """All that a decision is made from, and what is left once it is carried out."""

    waiting: list[Ask]
    held: dict[str, Held]
    capacity: Capacity
    now: float = NOW

    def decide(self) -> Decision:
        return assign(self.waiting, self.held, self.capacity, self.now)

    def after(self, decision: Decision) -> Moment:
        gone, held = {*decision.start, *decision.expire}, dict(self.held)
        for ask in decision.start:
            hold(held, ask, self.now)
        return replace(self, waiting=[a for a in self.waiting if a not in gone], held=held)

    @property
    def places(self) -> int:
        return self.capacity.places - sum(h.places for h in self.held.values())

    @property
    def memory(self) -> int:
        return self.capacity.memory_bytes - sum(h.memory_bytes for h in self.held.values())

    def places_of(self, tenant: str) -> int:
        return self.held.get(tenant, Held()).places

    def capped(self, tenant: str) -> bool:
        return bool(self.capacity.tenant_places) and self.places_of(tenant) >= self.capacity.tenant_places

    def fits(self, ask: Ask) -> bool:
        return self.places > 0 and ask.memory_bytes <= self.memory and not self.capped(ask.tenant)


def hold(held: dict[str, Held], ask: Ask, now: float) -> None:
    mine = held.get(ask.tenant, Held())
    held[ask.tenant] = Held(mine.places + 1, mine.memory_bytes + ask.memory_bytes, now)


def numbered(asks: Iterable[Ask]) -> list[Ask]:
    return [replace(ask, number=n) for n, ask in enumerate(sorted(asks, key=lambda a: a.arrived_at))]


def before(one: Ask, other: Ask) -> bool:
    return (one.turn, one.number) < (other.turn, other.number)


@st.composite
def moments(draw: st.DrawFn) -> Moment:
    moment = Moment([], {}, draw(CAPACITY))
    for ask in draw(st.lists(ASK, max_size=6)):
        if moment.fits(ask):
            hold(moment.held, ask, ask.arrived_at)
    moment.waiting = numbered(draw(st.lists(ASK, max_size=14)))
    return moment
