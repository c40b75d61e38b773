"""Many at once: more requests than the queue has room for, and more sessions than anybody's laptop has tabs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import uvloop

from bench.figures import percentile, summary
from bench.load import operations, programs
from bench.load.ledger import Ledger, reconcile, records
from bench.load.server import Server
from bench.load.tenants import Session, Tenant, make_tenants

TENANTS = 5
MAKERS = 8  # sessions that are made at a time


def burst(server: Server, requests: int) -> dict[str, Any]:
    """`requests` one-shot runs in the same moment, over several tenants. Each gets its result or a clean 429."""
    return uvloop.run(_burst(server, requests))


async def _burst(server: Server, requests: int) -> dict[str, Any]:
    tenants = await make_tenants(server, TENANTS, "burst")
    started = time.monotonic()
    await asyncio.gather(*(operations.one_shot(tenants[n % TENANTS]) for n in range(requests)))
    took_s = time.monotonic() - started
    wrong, whole = list[str](), Ledger()
    for tenant in tenants:
        wrong += reconcile(tenant.ledger, await records(tenant.client))
        whole.add(tenant.ledger)
        tenant.client.close()
    return {"seconds": round(took_s, 2), **whole.report(), "records_wrong": len(wrong), "records_wrong_examples": wrong[:10]}


def crowd(server: Server, sessions: int) -> dict[str, Any]:
    """That many sandboxes alive together, each with state of its own, which each is then asked for."""
    return uvloop.run(_crowd(server, sessions))


async def _crowd(server: Server, count: int) -> dict[str, Any]:
    tenant = (await make_tenants(server, 1, "crowd"))[0]
    gate = asyncio.Semaphore(MAKERS)
    before_mib = server.held()["family_pss_mib"]

    async def make() -> Session | None:
        async with gate:
            return await tenant.open_session()

    started = time.monotonic()
    made = [s for s in await asyncio.gather(*(make() for _ in range(count))) if s]
    made_s = time.monotonic() - started
    held = server.held()
    alive = (await tenant.ask("GET", f"/v1/sandboxes?limit={count}")).json()["sandboxes"]
    times = list[float]()
    own = await asyncio.gather(*(_recall(tenant, session, times) for session in made))
    await asyncio.gather(*(tenant.kill(session) for session in made))
    wrong, report = reconcile(tenant.ledger, await records(tenant.client)), tenant.ledger.report()
    tenant.client.close()
    return {
        "asked": count,
        "made": len(made),
        "made_in_s": round(made_s, 2),
        "alive": len({a["id"] for a in alive} & {s.id for s in made}),
        "own_state": sum(own),
        "all_asked_at_once": summary(times, ()) | {"most_ms": round(percentile(times, 100), 1)},
        "rss_mib": held["rss_mib"],
        "family_pss_mib_each": round((held["family_pss_mib"] - before_mib) / max(1, len(made)), 3),
        **{k: report[k] for k in ("lost", "wrong_owner", "unexpected", "refused", "examples")},
        "records_wrong": len(wrong),
        "records_wrong_examples": wrong[:10],
    }


async def _recall(tenant: Tenant, session: Session, times: list[float]) -> bool:
    started = time.perf_counter()
    good = await tenant.run(session, "recall", programs.RECALL, f"{session.nonce} 1\n")
    times.append((time.perf_counter() - started) * 1e3)
    return good
