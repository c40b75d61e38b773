"""The queue around assign(): who waits, who holds a place, and when a decision is due."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from fumehood.errors import DeadlineExceeded, Draining, FumehoodError, InvalidInput, QueueFull
from fumehood.scheduler.assign import PRIORITIES, Ask, Capacity, Held, assign

_RELEASES = 64  # remembered, for the rate


class Grant:
    """A place, until it is released: once, however often that is said. `queue_ms`: how long it was waited for."""

    __slots__ = ("_release", "memory_bytes", "queue_ms", "tenant")

    def __init__(self, tenant: str, memory_bytes: int, queue_ms: float, release: Callable[[Grant], None]) -> None:
        self.tenant, self.memory_bytes, self.queue_ms = tenant, memory_bytes, queue_ms
        self._release: Callable[[Grant], None] | None = release

    def release(self) -> None:
        give_back, self._release = self._release, None
        if give_back:
            give_back(self)

    def __enter__(self) -> Grant:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Scheduler:
    """The queue around assign(), for one event loop. Raises InvalidInput for a capacity without places.

    The queue itself is shared out too: when it is full, the tenant that waits with most asks loses its last one to a tenant
    with at least two fewer (buffer stealing, McKenney 1990). So one tenant alone may use all of it, and can't keep others out.
    """

    def __init__(self, capacity: Capacity, queue_limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if capacity.places < 1 or min(capacity.memory_bytes, capacity.tenant_places, queue_limit) < 0:
            raise InvalidInput(f"{capacity} with a queue of {queue_limit}", cause="there must be a place, and nothing below 0")
        self.capacity, self.queue_limit, self._clock = capacity, queue_limit, clock
        self._held: dict[str, Held] = {}
        self._places = self._memory = self._number = 0
        self._waiting: dict[int, tuple[Ask, asyncio.Future[Grant]]] = {}
        self._releases: deque[float] = deque(maxlen=_RELEASES)
        self._draining, self._turn_is_due, self._idle = False, False, asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._idle.set()

    async def admit(self, tenant: str, *, memory_bytes: int = 0, priority: int = 0, wait_s: float | None = None) -> Grant:
        """A place, at once when there is room and nobody waits for it (who waits for its own tenant's cap does not).

        `wait_s` counts from now; None = as long as it takes, 0 = at once or not at all.
        Raises InvalidInput (it could never be met), Draining, QueueFull (`details["retry_after_s"]`), DeadlineExceeded.
        Cancelling leaves the queue, and gives back what was granted meanwhile.
        """
        self._check(memory_bytes, priority, wait_s)
        ask = self._ask(tenant, memory_bytes, priority, wait_s)
        if self._fits(ask) and self._is_next():
            return self._grant(ask, ask.arrived_at)
        if wait_s == 0:
            raise _too_late(0.0)
        if len(self._waiting) >= self.queue_limit:
            self._find_a_slot_for(tenant)
        future = asyncio.get_running_loop().create_future()
        self._waiting[ask.number] = ask, future
        self._turn_soon()
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(ask, future)
            raise

    def drain(self) -> None:
        """Nothing new from now on; whoever waits gets Draining. What is held stays until released."""
        self._draining = True
        self._forget_cancelled()
        for ask, _ in list(self._waiting.values()):
            self._fail(ask, _draining())

    async def idle(self) -> None:
        """Returns when nothing is held."""
        await self._idle.wait()

    def snapshot(self) -> dict[str, Any]:
        """For metrics: `waiting` and `held` (places, memory_bytes) by tenant, totals, capacity, queue_limit, draining."""
        held = {t: {"places": h.places, "memory_bytes": h.memory_bytes} for t, h in self._held.items() if h.places}
        return {
            "waiting": dict(Counter(ask.tenant for ask, _ in self._waiting.values())),
            "held": held,
            "held_total": {"places": self._places, "memory_bytes": self._memory},
            "capacity": {"places": self.capacity.places, "memory_bytes": self.capacity.memory_bytes},
            "queue_limit": self.queue_limit,
            "draining": self._draining,
        }

    def _check(self, memory_bytes: int, priority: int, wait_s: float | None) -> None:
        if self._draining:
            raise _draining()
        if not 0 <= memory_bytes <= self.capacity.memory_bytes:
            cause = f"this server gives out {self.capacity.memory_bytes} bytes in all"
            raise InvalidInput(f"{memory_bytes} bytes of memory can't be had", cause=cause, remediation="ask for less")
        if priority not in PRIORITIES or (wait_s is not None and not wait_s >= 0):
            cause = "priority is -10 to 10, wait_s is 0 or more"
            raise InvalidInput(f"priority={priority!r}, wait_s={wait_s!r}", cause=cause, remediation="correct it")

    def _ask(self, tenant: str, memory_bytes: int, priority: int, wait_s: float | None) -> Ask:
        now, self._number = self._clock(), self._number + 1
        return Ask(tenant, now, self._number, memory_bytes, priority, None if wait_s is None else now + wait_s)

    def _fits(self, ask: Ask) -> bool:
        room = self._places < self.capacity.places and self._memory + ask.memory_bytes <= self.capacity.memory_bytes
        return room and not self._at_its_cap(ask.tenant)

    def _is_next(self) -> bool:
        return all(self._at_its_cap(ask.tenant) for ask, _ in self._waiting.values())

    def _at_its_cap(self, tenant: str) -> bool:
        return self.capacity.caps(self._held.get(tenant, Held()))

    def _grant(self, ask: Ask, now: float) -> Grant:
        self._account(ask.tenant, 1, ask.memory_bytes, now)
        return Grant(ask.tenant, ask.memory_bytes, (now - ask.arrived_at) * 1e3, self._released)

    def _account(self, tenant: str, places: int, memory_bytes: int, started_at: float) -> None:
        mine = self._held.get(tenant, Held())
        self._held[tenant] = Held(mine.places + places, mine.memory_bytes + memory_bytes, max(mine.started_at, started_at))
        self._places, self._memory = self._places + places, self._memory + memory_bytes
        (self._idle.clear if self._places else self._idle.set)()

    def _released(self, grant: Grant) -> None:
        self._account(grant.tenant, -1, -grant.memory_bytes, -math.inf)
        self._releases.append(self._clock())
        if self._waiting:
            self._turn_soon()  # which also forgets tenants that have nothing here any more
        elif not self._held[grant.tenant].places:
            del self._held[grant.tenant]

    def _turn_soon(self) -> None:
        """One decision for all that happens in a tick of the loop."""
        if not self._turn_is_due:
            self._turn_is_due = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_is_due, now = False, self._clock()
        self._forget_cancelled()
        decision = assign([ask for ask, _ in self._waiting.values()], self._held, self.capacity, now)
        for ask in decision.start:
            self._waiting.pop(ask.number)[1].set_result(self._grant(ask, now))
        for ask in decision.expire:
            self._fail(ask, _too_late(now - ask.arrived_at))
        here = {ask.tenant for ask, _ in self._waiting.values()}
        self._held = {tenant: h for tenant, h in self._held.items() if h.places or tenant in here}
        self._wake_at_the_next_deadline(now)

    def _wake_at_the_next_deadline(self, now: float) -> None:
        """Never sooner than in 1 ms: a loop's clock may be that much ahead of ours, and would spin."""
        if self._timer:
            self._timer.cancel()
        deadlines = [ask.deadline_at for ask, _ in self._waiting.values() if ask.deadline_at is not None]
        delay_s = max(0.001, min(deadlines, default=math.inf) - now)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._turn_soon) if delay_s < math.inf else None

    def _forget_cancelled(self) -> None:
        """Cancelling a task cancels its future at once, but runs the task only later: until then it would still be here."""
        self._waiting = {number: entry for number, entry in self._waiting.items() if not entry[1].done()}

    def _fail(self, ask: Ask, error: FumehoodError) -> None:
        self._waiting.pop(ask.number)[1].set_exception(error)

    def _abandon(self, ask: Ask, future: asyncio.Future[Grant]) -> None:
        """Cancelled: it may have been granted, or failed, in the same tick, and then is no longer in the queue."""
        self._waiting.pop(ask.number, None)
        if future.done() and not future.cancelled() and not future.exception():
            future.result().release()
        self._turn_soon()  # it may have held a reservation

    def _find_a_slot_for(self, tenant: str) -> None:
        self._forget_cancelled()
        if len(self._waiting) < self.queue_limit:
            return
        counts = Counter(ask.tenant for ask, _ in self._waiting.values())
        longest, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if most < counts[tenant] + 2:
            raise self._queue_full()
        last = max((ask for ask, _ in self._waiting.values() if ask.tenant == longest), key=lambda a: (a.turn, a.number))
        self._fail(last, self._queue_full())

    def _queue_full(self) -> QueueFull:
        """Come again when, at the rate of the recent releases, all who wait now have had their turn (1 to 60 s)."""
        span_s = self._clock() - self._releases[0] if self._releases else 0.0
        wait_s = len(self._waiting) * span_s / len(self._releases) if span_s > 0 else 5.0
        retry_after_s = min(60, max(1, math.ceil(wait_s)))
        cause = f"{len(self._waiting)} requests are waiting"
        return QueueFull(
            "the queue is full", cause=cause, remediation=f"retry in {retry_after_s} s", retry_after_s=retry_after_s
        )


def _too_late(waited_s: float) -> DeadlineExceeded:
    cause = f"no place came free in {waited_s:.1f} s"
    return DeadlineExceeded("waited until its deadline", cause=cause, remediation="allow a longer wait_s, or retry later")


def _draining() -> Draining:
    return Draining("the server is shutting down", remediation="retry later, or at another server")
