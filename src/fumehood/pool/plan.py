"""How many warm ones a class should have, and what to do about it now (M12, M14). Pure: facts in, a plan out.

Forecast: each claim pours one into a leaky bucket that a refill drains by one for each make time; its highest level within
the window is how many claims came faster than they could be replaced. Target: `headroom` times that, from floor to ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fumehood.pool.breaker import Breaker

REST = 4.0  # in make times, of a full class: refilling then takes at most a fifth of one core from the work that runs
RECENT_S = 1.0  # what was claimed less long ago is taken to be still at work


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """`floor` is for the classes kept from the start, others have 0. All classes that were not kept share one `ceiling`.

    The ceiling wins over the floor. `idle_s`: after which a warm one above the target is closed.
    """

    floor: int
    ceiling: int
    headroom: float
    idle_s: float
    window_s: float = 30.0
    make_timeout_s: float = 30.0
    max_classes: int = 64


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one class. `arrivals`: times of claims; `warm`: since when each is; both ascending, in seconds of the pool's clock.

    `make_s` is the mean time of a make, `made_at` the end of the last, `ceiling` what others left of it. `running`: somebody
    said that work runs now.
    """

    arrivals: Sequence[float]
    warm: Sequence[float]
    making: int
    make_s: float
    made_at: float
    floor: int
    ceiling: int
    breaker: Breaker
    running: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """`make` so many more, or `reclaim` so many of the oldest; `look_at`: when time alone may change the answer, if ever."""

    target: int
    make: int = 0
    reclaim: int = 0
    look_at: float = math.inf


def plan(facts: Facts, settings: PoolSettings, now: float) -> Plan:
    goal = target(facts, settings, now)
    lack = goal - len(facts.warm) - facts.making
    if lack > 0 and (start := _may_make_at(facts, goal, now)) > now:
        return Plan(goal, look_at=min(start, _changes_at(facts, settings, now)))
    if lack > 0:
        return Plan(goal, make=1 if facts.breaker.state(now) == "half-open" else lack)
    idle = sum(since + settings.idle_s <= now for since in facts.warm)
    reclaim = min(idle, max(0, len(facts.warm) - goal))
    return Plan(goal, reclaim=reclaim, look_at=_changes_at(facts, settings, now))


def target(facts: Facts, settings: PoolSettings, now: float) -> int:
    recent = [at for at in facts.arrivals if at + settings.window_s > now]
    # Once is no demand: else whoever invents classes would fill the host with warm ones that nobody asks for again (H11).
    idle = len(recent) < 2 or recent[-1] + settings.idle_s <= now
    wanted = 0.0 if idle else settings.headroom * peak(recent, facts.make_s)
    # Rounded first, because 1.1 * 10 is a little over 11.
    return min(facts.ceiling, max(facts.floor, math.ceil(round(wanted, 9))))


def peak(arrivals: Sequence[float], make_s: float) -> float:
    """The highest level of the bucket; 0 without arrivals. `make_s` above 0."""
    level = highest = 0.0
    before = -math.inf
    for at in arrivals:
        level = max(0.0, level - (at - before) / make_s) + 1
        highest = max(highest, level)
        before = at
    return highest


def _may_make_at(facts: Facts, goal: int, now: float) -> float:
    state = facts.breaker.state(now)
    if state == "open":
        return facts.breaker.retry_at
    if state == "half-open" and facts.making:
        return math.inf  # its end is what changes that
    # The fuller the longer. An empty one makes at once: a miss would cost the same make, with a caller waiting for it. Squared:
    # at 0.8 claims for each make time 95% are hits; in proportion 83%; with the whole rest unless empty 56%.
    rested = facts.made_at + REST * facts.make_s * (len(facts.warm) / goal) ** 2
    calm = math.inf if facts.running else (facts.arrivals[-1] + RECENT_S if facts.arrivals else -math.inf)
    return min(rested, calm)


def _changes_at(facts: Facts, settings: PoolSettings, now: float) -> float:
    """When the next of the warm ones may be old enough, or the target sink. Never, while no more are warm than must be."""
    if len(facts.warm) <= min(facts.floor, facts.ceiling):
        return math.inf
    oldest = _first((since + settings.idle_s for since in facts.warm), now)
    leaves = _first((at + settings.window_s for at in facts.arrivals), now)
    idle = _first((at + settings.idle_s for at in facts.arrivals[-1:]), now)
    return min(oldest, leaves, idle)


def _first(times: Iterable[float], now: float) -> float:
    """Of ascending times the first that is still to come."""
    return next((at for at in times if at > now), math.inf)
