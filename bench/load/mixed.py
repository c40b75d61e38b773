"""Mixed load at a fixed rate of executions; afterwards every request is accounted for, and nothing may be left."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import uvloop

from bench.load import operations
from bench.load.ledger import Ledger, reconcile, records
from bench.load.pace import Pace
from bench.load.server import Server, status
from bench.load.tenants import Tenant, make_tenants
from bench.sustained import leaks

TENANTS, SESSIONS = 4, 6  # and sessions of each
FILES_PER_S = 5.0
WARM_UP_S = 10.0
DRAIN_S = 120.0  # for what is still on its way when the time is over
SAME_S, SETTLE_S = 5.0, 90.0


def measure(server: Server, seconds: float, per_s: float) -> dict[str, Any]:
    """A short load goes first, so that `before` is a server that has done all of this already."""
    floor = uvloop.run(pooled(server, "target"))
    uvloop.run(_load(server, min(WARM_UP_S, seconds), per_s, "warm"))
    before = settled(server, floor)
    row = uvloop.run(_load(server, seconds, per_s, "load"))
    after, calm_s = server.calm(before)
    return {**row, "before": before, "after": after, "calm_s": calm_s, "leaks": leaks(before, after)}


async def pooled(server: Server, what: str) -> int:
    """How many warm sandboxes it holds now (`warm`), or means to hold (`target`)."""
    admin = server.client()
    try:
        return sum(row[what] for row in (await status(admin))["pools"])
    finally:
        admin.close()


def settled(server: Server, floor: int) -> dict[str, float]:
    """What is held once two looks agree and the pool is back at its floor. After SETTLE_S whatever there is."""
    held, until = server.held(), time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        time.sleep(SAME_S)
        now = server.held()
        if uvloop.run(pooled(server, "warm")) <= floor and all(now[k] == held[k] for k in held if not k.endswith("_mib")):
            return now
        held = now
    return held


async def _load(server: Server, seconds: float, per_s: float, prefix: str) -> dict[str, Any]:
    tenants = await make_tenants(server, TENANTS, prefix)
    await asyncio.gather(*(t.refill() for t in tenants for _ in range(SESSIONS)))
    work, weights = zip(*operations.EXECUTIONS, strict=True)
    pace, rss_mib = Pace(), list[float]()
    watch = asyncio.create_task(_watch(server, rss_mib))
    started = time.monotonic()
    await asyncio.gather(
        pace.run(seconds, per_s, lambda: random.choices(work, weights)[0](random.choice(tenants))),
        pace.run(seconds, FILES_PER_S, lambda: operations.files(random.choice(tenants))),
    )
    took_s = time.monotonic() - started
    stuck = await pace.drain(DRAIN_S)
    watch.cancel()
    await asyncio.gather(*(_end(t) for t in tenants))
    row = await _account(tenants)
    return {
        "seconds": round(took_s, 1),
        "asked_per_s": per_s,
        "executions_per_s": round(row["records"] / took_s, 1),
        "executions_asked_per_s": round((len(pace.lags_ms) - int(seconds * FILES_PER_S)) / took_s, 2),
        "stuck": stuck,
        "generator": pace.report(),
        "rss_mib": {"first": rss_mib[0], "last": rss_mib[-1], "most": max(rss_mib)},
        **row,
    }


async def _watch(server: Server, rss_mib: list[float]) -> None:
    """RSS of the server each second, until cancelled."""
    while True:
        rss_mib.append(server.rss_mib())
        await asyncio.sleep(1.0)


async def _end(tenant: Tenant) -> None:
    while not tenant.free.empty():
        await tenant.kill(tenant.free.get_nowait())


async def _account(tenants: list[Tenant]) -> dict[str, Any]:
    """All ledgers as one, and each tenant's records beside its own."""
    whole, wrong, kept = Ledger(), list[str](), 0
    for tenant in tenants:
        found = await records(tenant.client)
        kept += len(found)
        wrong += [f"{tenant.name}: {line}" for line in reconcile(tenant.ledger, found)]
        whole.add(tenant.ledger)
        tenant.client.close()
    return {**whole.report(), "records": kept, "records_wrong": len(wrong), "records_wrong_examples": wrong[:10]}
