"""The warm ones of one class, what was made and asked for, and every change of that. Nothing here waits."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fumehood.pool.breaker import THRESHOLD, Breaker
from fumehood.pool.plan import Facts, PoolSettings, plan

ARRIVALS = 512  # remembered of a class: above 17 claims/s that is less than the window, but a plan takes 0.2 ms
YOUNG_S = 5.0
_GUESS_S = 1.0  # for a make until one was measured
_LEAST_S = 1e-3  # of a make: the forecast divides by it
_NEWEST = 0.2  # weight of the last make in the mean

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Warm(Generic[T]):
    item: T
    since: float
    before: Breaker  # the make's, as it was: an early death gives it back


class Shelf(Generic[T]):
    def __init__(self) -> None:
        self.kept = False
        self.floor = 0
        self.making = 0
        self.breaker = Breaker()
        self.hits = self.misses = self.made = self.failed = self.reclaimed = 0
        self.wake = asyncio.Event()  # for who tends it: a plan may come out differently
        self.heard = asyncio.Event()  # for who waits until it is ready
        self.task: asyncio.Task[None] | None = None
        self._arrivals: deque[float] = deque(maxlen=ARRIVALS)
        self._warm: deque[_Warm[T]] = deque()
        self._make_s = _GUESS_S
        self._made_at = -math.inf

    @property
    def held(self) -> int:
        """Warm ones and those to come."""
        return len(self._warm) + self.making

    @property
    def settled(self) -> bool:
        return len(self._warm) >= self.floor or self.breaker.failures >= THRESHOLD

    def facts(self, ceiling: int, running: bool) -> Facts:
        arrivals, warm = tuple(self._arrivals), tuple(w.since for w in self._warm)
        return Facts(arrivals, warm, self.making, self._make_s, self._made_at, self.floor, ceiling, self.breaker, running)

    def claim(self, now: float) -> T | None:
        """The newest: its pages are still in the caches, and the oldest thereby become the ones nobody needs."""
        self._arrivals.append(now)
        self.wake.set()
        if not self._warm:
            self.misses += 1
            return None
        self.hits += 1
        return self._warm.pop().item

    def add(self, item: T, started: float, now: float) -> None:
        took = max(_LEAST_S, now - started)
        self._make_s += (_NEWEST if self.made else 1.0) * (took - self._make_s)
        self._made_at = now
        self._warm.append(_Warm(item, now, self.breaker))
        self.made += 1
        self.breaker = Breaker()
        self.heard.set()

    def fail(self, now: float) -> None:
        self.failed += 1
        self.breaker = self.breaker.failed(now)
        self.heard.set()

    def forget(self, item: T, now: float) -> bool:
        """False when it is not here. What dies young was not made well; else it would be made again for ever (H18)."""
        found = next((w for w in self._warm if w.item is item), None)
        if found is None:
            return False
        self._warm.remove(found)
        if now - found.since < YOUNG_S:
            self.breaker = max(self.breaker, found.before, key=lambda breaker: breaker.failures)
            self.fail(now)
        self.wake.set()
        return True

    def reclaim(self, count: int) -> list[T]:
        """The oldest `count`."""
        self.reclaimed += count
        return [self._warm.popleft().item for _ in range(count)]

    def clear(self) -> list[T]:
        items = [w.item for w in self._warm]
        self._warm.clear()
        return items

    def snapshot(self, ceiling: int, settings: PoolSettings, now: float) -> dict[str, Any]:
        state = self.breaker.state(now)
        return {
            "warm": len(self._warm),
            "making": self.making,
            "target": plan(self.facts(ceiling, False), settings, now).target,
            "hits": self.hits,
            "misses": self.misses,
            "made": self.made,
            "failed": self.failed,
            "reclaimed": self.reclaimed,
            "breaker": state,
            "retry_in_s": round(self.breaker.retry_at - now, 3) if state == "open" else 0.0,
        }
