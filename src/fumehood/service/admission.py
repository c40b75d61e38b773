"""Who is let in: a place for each sandbox (how many, how much memory), a turn for each piece of work (how many at once)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any

from fumehood.config import Config
from fumehood.errors import CapacityExceeded, DeadlineExceeded, Draining
from fumehood.records import Caller
from fumehood.scheduler import Capacity, Grant, Scheduler

_HOST_SHARE = 0.85  # of the host's memory; the rest is the server's, the kernel's and the operator's


@dataclass(frozen=True, slots=True)
class Wait:
    """How long one request may wait for all that it waits for together, from its arrival (M11)."""

    caller: Caller
    priority: int
    deadline_at: float  # of time.monotonic()

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline_at - time.monotonic())

    def within(self, timeout_s: float | None) -> Wait:
        """Not longer than the work itself may take, from now."""
        end = self.deadline_at if timeout_s is None else time.monotonic() + timeout_s
        return replace(self, deadline_at=min(self.deadline_at, end))


class Admission:
    """Two queues, each bounded and fair between tenants. Who needs both asks for the place first: no circle can form."""

    def __init__(self, config: Config) -> None:
        self._config, self.draining = config, False
        cpus = os.cpu_count() or 1
        self._places = Scheduler(_places(config), config.queue_limit)
        self._turns = Scheduler(Capacity(config.max_running or 8 * cpus), config.queue_limit)

    def wait(self, caller: Caller, priority: int, wait_s: float | None) -> Wait:
        """`priority` can be lowered below the key's own, not raised. Raises Draining."""
        if self.draining:
            raise Draining("the server is shutting down", remediation="retry later, or at another server")
        bound_s = self._config.queue_wait_s if wait_s is None else min(wait_s, self._config.queue_wait_s)
        return Wait(caller, min(priority, caller.limits.priority), time.monotonic() + bound_s)

    async def place(self, wait: Wait, memory_bytes: int) -> Grant:
        return await self._places.admit(
            wait.caller.tenant, memory_bytes=memory_bytes, priority=wait.priority, wait_s=wait.left_s
        )

    async def places(self, wait: Wait, count: int, memory_bytes: int) -> list[Grant]:
        """So many, now or never: two who each held half of what they need would wait for ever. Raises CapacityExceeded."""
        taken = list[Grant]()
        try:
            for _ in range(count):
                taken.append(await self.place(replace(wait, deadline_at=0.0), memory_bytes))
        except BaseException as e:
            for grant in taken:
                grant.release()
            if isinstance(e, DeadlineExceeded):
                raise CapacityExceeded(
                    f"there is no room for {count} more sandboxes now",
                    cause=f"{len(taken)} of them would have found a place",
                    remediation="end some, ask for fewer, or try again later",
                ) from None
            raise
        return taken

    async def turn(self, wait: Wait) -> Grant:
        return await self._turns.admit(wait.caller.tenant, priority=wait.priority, wait_s=wait.left_s)

    async def drain(self, grace_s: float) -> None:
        """Nothing new from now on, for whoever waits neither; returns when what has its turn has ended, or after `grace_s`."""
        self.draining = True
        self._places.drain()
        self._turns.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._turns.idle()

    def snapshot(self) -> dict[str, Any]:
        return {"places": self._places.snapshot(), "turns": self._turns.snapshot()}


def _places(config: Config) -> Capacity:
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    budget = config.memory_budget_bytes or int(_HOST_SHARE * host_bytes)
    tenants = config.max_sandboxes_per_tenant
    return Capacity(config.max_sandboxes, math.floor(budget * config.memory_overcommit), tenants)
