"""How much one key may ask: a token bucket for its rate, a count for what is under way."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from fumehood.errors import RateLimited
from fumehood.records import Caller

Tickets = list[Callable[[], None]]  # called at the end of the request


@dataclass(slots=True)
class Bucket:
    """Starts full; `rate` tokens a second up to `burst`."""

    tokens: float
    at: float

    def take(self, rate: float, burst: int, now: float) -> float:
        """0.0 when one was taken, else the seconds until there is one."""
        self.tokens = min(float(burst), self.tokens + (now - self.at) * rate)
        self.at = now
        if self.tokens < 1.0:
            return (1.0 - self.tokens) / rate
        self.tokens -= 1.0
        return 0.0


class Limits:
    """For one event loop. Only known keys are counted, so there are no more buckets than keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._under_way: Counter[str] = Counter()

    def take(self, caller: Caller, tickets: Tickets) -> None:
        """Raises RateLimited (`retry_after_s`). What was taken is given back by the tickets."""
        limits, now = caller.limits, self._clock()
        bucket = self._buckets.setdefault(caller.key_id, Bucket(float(limits.burst), now))
        if wait_s := bucket.take(limits.requests_per_s, limits.burst, now):
            raise _slower(f"{limits.requests_per_s:g} requests a second, {limits.burst} at once", wait_s)
        if self._under_way[caller.key_id] >= limits.concurrent_requests:
            raise _slower(f"{limits.concurrent_requests} requests under way", 1.0)
        self._under_way[caller.key_id] += 1
        tickets.append(lambda: self._give_back(caller.key_id))

    def _give_back(self, key_id: str) -> None:
        self._under_way[key_id] -= 1
        if not self._under_way[key_id]:
            del self._under_way[key_id]


def _slower(bound: str, wait_s: float) -> RateLimited:
    retry_after_s = max(1, math.ceil(wait_s))
    return RateLimited(
        "this key asks too much", cause=f"it may have {bound}", remediation="wait, then retry", retry_after_s=retry_after_s
    )
