"""When to stop making what can't be made: the circuit breaker of one class (H18), as a value.

The three states are those of Nygard, "Release It!" (2007), with the wait doubled at each failure as in exponential backoff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

THRESHOLD = 3  # failures in a row
FIRST_S = 1.0
LONGEST_S = 60.0
_DOUBLINGS = 6  # 1 s * 2^6 is above LONGEST_S; a bound, because 2.0 ** 1024 overflows after a day of failures


@dataclass(frozen=True, slots=True)
class Breaker:
    """`failures` in a row; `retry_at`, in seconds of the pool's clock, counts once they are THRESHOLD or more."""

    failures: int = 0
    retry_at: float = 0.0

    def state(self, now: float) -> Literal["closed", "open", "half-open"]:
        """Half-open: one make may be tried, and it decides."""
        if self.failures < THRESHOLD:
            return "closed"
        return "open" if now < self.retry_at else "half-open"

    def failed(self, now: float) -> Breaker:
        failures = self.failures + 1
        if failures < THRESHOLD:
            return Breaker(failures)
        return Breaker(failures, now + min(LONGEST_S, FIRST_S * 2 ** min(failures - THRESHOLD, _DOUBLINGS)))
