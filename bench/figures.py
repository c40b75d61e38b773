"""Statistics of samples, pure. Times are milliseconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def percentile(samples: Sequence[float], p: float) -> float:
    """Nearest rank: always a value that was measured, never one between two. Raises ValueError for nothing or a bad p."""
    if not samples or not 0 < p <= 100:
        raise ValueError(f"no percentile {p} of {len(samples)} samples")
    # p * n first: 95 / 100 * 20 is 19.000000000000004 in some orders, and its ceiling the wrong rank.
    return sorted(samples)[math.ceil(p * len(samples) / 100) - 1]


def summary(samples: Sequence[float], failures: Sequence[str]) -> dict[str, Any]:
    """Percentiles over the successes only; how many of all attempts those are stands beside them, with why others failed."""
    row: dict[str, Any] = {"attempts": len(samples) + len(failures), "ok": len(samples), "failures": list(failures[:3])}
    if samples:
        row |= {f"p{p}_ms": round(percentile(samples, p), 3) for p in (50, 95, 99)}
        row["samples_ms"] = [round(s, 3) for s in samples]
    return row


def ratio(value: float, base: float) -> float:
    """How many times `base`. Raises ValueError unless base is positive."""
    if base <= 0:
        raise ValueError(f"no ratio to {base}")
    return value / base


def against(value: float, limit: float, at_least: bool = False) -> dict[str, Any]:
    """A target's verdict. `miss`: how many times off the limit it is; 1 = met, None = missed with
    no ratio (a limit of 0)."""
    met = value >= limit if at_least else value <= limit
    base, over = (value, limit) if at_least else (limit, value)
    miss = 1.0 if met else round(ratio(over, base), 2) if base > 0 else None
    return {"value": round(value, 3), "limit": limit, "at_least": at_least, "met": met, "miss": miss}
