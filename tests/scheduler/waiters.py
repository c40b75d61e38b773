"""Those who wait, as tasks of the test's own loop."""

from __future__ import annotations

import asyncio
from typing import Any

from fumehood.scheduler import Capacity, Grant, Scheduler

ONE = Capacity(places=1)


async def ticks(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def waiting(scheduler: Scheduler, *tenants: str, **how: Any) -> list[asyncio.Task[Grant]]:
    tasks = [asyncio.create_task(scheduler.admit(tenant, **how)) for tenant in tenants]
    await ticks(3)
    return tasks


async def outcomes(tasks: list[asyncio.Task[Grant]]) -> list[Any]:
    async with asyncio.timeout(5):
        return await asyncio.gather(*tasks, return_exceptions=True)
