"""The decision, pure: which of those who wait start now.

Between tenants: dominant resource fairness (Ghodsi et al., NSDI 2011). A tenant's share is the greater of
places held / places and memory held / memory; the tenant with the smallest share goes first. Equal shares are common
(with one place they are always 0), so ties go by max(when the tenant was last served, its head's turn): the start tag
of start-time fair queueing (Goyal et al., SIGCOMM 1996). A tenant that marks everything urgent thus passes the others
once; from then on its own last start counts, and it can't starve them.

Within a tenant: turn = arrival - priority * AGEING_S, earliest first. Every AGEING_S of waiting is worth one step of
priority, so nothing that comes 20 * AGEING_S later can pass, whatever its priority; equal priority is first come, first served.

A large ask that does not fit is passed by smaller ones at first. After RESERVE_AFTER_S nothing of its own tenant passes
it, and the first such ask in fair order reserves what is freed, if other tenants are in its way: others then take only
what it does not need. One reservation at a time is enough, for what is reserved is next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

AGEING_S = 1.0
RESERVE_AFTER_S = 5.0
PRIORITIES = range(-10, 11)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for a place. Times are of the scheduler's clock; `number` is unique and grows by arrival."""

    tenant: str
    arrived_at: float
    number: int
    memory_bytes: int = 0
    priority: int = 0
    deadline_at: float | None = None

    @property
    def turn(self) -> float:
        return self.arrived_at - self.priority * AGEING_S


@dataclass(frozen=True, slots=True)
class Capacity:
    """`memory_bytes` 0: only asks without memory can be met. `tenant_places` 0: no bound for one tenant."""

    places: int
    memory_bytes: int = 0
    tenant_places: int = 0

    def caps(self, mine: Held) -> bool:
        """Whether a tenant that holds `mine` may have no more places, free or not."""
        return 0 < self.tenant_places <= mine.places


class Held(NamedTuple):
    places: int = 0
    memory_bytes: int = 0
    started_at: float = -math.inf  # when the tenant was last served


class Decision(NamedTuple):
    start: tuple[Ask, ...]
    expire: tuple[Ask, ...]


class _Room:
    """What is free while one decision is made."""

    def __init__(self, held: Mapping[str, Held], capacity: Capacity) -> None:
        self.held, self.capacity, self.reserved = dict(held), capacity, False
        self.places = capacity.places - sum(h.places for h in held.values())
        self.memory = capacity.memory_bytes - sum(h.memory_bytes for h in held.values())

    def of(self, tenant: str) -> Held:
        return self.held.get(tenant, Held())

    def rank(self, ask: Ask) -> tuple[float, float, int]:
        mine, whole = self.of(ask.tenant), self.capacity
        memory = mine.memory_bytes / whole.memory_bytes if whole.memory_bytes else 0.0
        return max(mine.places / whole.places, memory), max(mine.started_at, ask.turn), ask.number

    def take(self, ask: Ask, now: float) -> bool:
        if ask.memory_bytes > self.memory:
            return False
        mine = self.of(ask.tenant)
        self.held[ask.tenant] = Held(mine.places + 1, mine.memory_bytes + ask.memory_bytes, now)
        self.places, self.memory = self.places - 1, self.memory - ask.memory_bytes
        return True

    def reserve(self, ask: Ask) -> None:
        """Not for an ask that waits for its own tenant's releases: holding others up would not help it."""
        if not self.reserved and self.of(ask.tenant).memory_bytes + ask.memory_bytes <= self.capacity.memory_bytes:
            self.reserved = True
            self.places, self.memory = self.places - 1, max(0, self.memory - ask.memory_bytes)


def assign(waiting: Sequence[Ask], held: Mapping[str, Held], capacity: Capacity, now: float) -> Decision:
    """Which asks start now, in order, and which have waited past their deadline. O(n log n): each ask is looked at once.

    `held`: what each tenant holds. Once-only is sound because within one decision room only shrinks.
    """
    expire = tuple(a for a in waiting if a.deadline_at is not None and a.deadline_at <= now)
    room, start = _Room(held, capacity), list[Ask]()
    if room.places <= 0:
        return Decision((), expire)
    queues = _queues(waiting, now)
    order = [(*room.rank(queue[0][-1]), tenant) for tenant, queue in queues.items()]
    heapify(order)
    while order and room.places > 0:
        tenant = heappop(order)[-1]
        if capacity.caps(room.of(tenant)):
            continue
        ask = heappop(queues[tenant])[-1]
        if room.take(ask, now):
            start.append(ask)
        elif now - ask.arrived_at >= RESERVE_AFTER_S:
            room.reserve(ask)
            continue  # nothing of its own tenant may pass it any more
        if queue := queues[tenant]:
            heappush(order, (*room.rank(queue[0][-1]), tenant))
    return Decision(tuple(start), expire)


def _queues(waiting: Sequence[Ask], now: float) -> dict[str, list[tuple[float, int, Ask]]]:
    queues: dict[str, list[tuple[float, int, Ask]]] = {}
    for ask in waiting:
        if ask.deadline_at is None or ask.deadline_at > now:
            queues.setdefault(ask.tenant, []).append((ask.turn, ask.number, ask))
    for queue in queues.values():
        heapify(queue)
    return queues
