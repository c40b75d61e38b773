"""Who goes next: admission, a bounded queue, a fair share for each tenant, deadlines from arrival (M11, H17).

`assign()` decides and is pure; `Scheduler` keeps the queue around it, for one event loop. Nothing here starts a sandbox.

| of          | guaranteed                                                                                           |
|-------------|------------------------------------------------------------------------------------------------------|
| over-commit | never more places or memory held than the capacity, nor more places by one tenant than tenant_places |
| tenants     | two with equal demand hold places that differ by at most one                                         |
| one tenant  | earliest turn first; priority is worth at most 20 * AGEING_S of waiting                              |
| large asks  | after RESERVE_AFTER_S of waiting, what is freed is kept for them, one at a time in fair order        |
| idle room   | what fits waits only to leave what is kept, or behind an old ask of its own tenant, not for a cap     |
| queue       | never longer than queue_limit; one tenant can't keep others out of it; QueueFull says when to retry  |
| deadline    | wait_s counts from arrival, on the server; wait_s=0 never passes one who waits for the same room     |
| cancelling  | leaves the queue; a place granted in the same tick comes back                                        |
| draining    | whoever waits is told at once; what is held stays until released, and idle() waits for it            |
"""

from fumehood.scheduler.assign import AGEING_S, PRIORITIES, RESERVE_AFTER_S, Ask, Capacity, Decision, Held, assign
from fumehood.scheduler.queue import Grant, Scheduler

__all__ = [
    "AGEING_S",
    "PRIORITIES",
    "RESERVE_AFTER_S",
    "Ask",
    "Capacity",
    "Decision",
    "Grant",
    "Held",
    "Scheduler",
    "assign",
]
