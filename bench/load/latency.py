"""How long single requests take: the generator's own ceiling, warm claims, an emptied pool, runs in live sessions."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from bench.figures import summary
from bench.load import programs
from bench.load.http import Client
from bench.load.server import Server, status
from bench.load.tenants import Session, Tenant, make_tenants
from fumehood import Sandbox

CALLERS = 8
CEILING_S = 3.0
EMPTY_AT_ONCE, EMPTY_ROUNDS, EMPTY_REST_S = 40, 3, 8.0
SETTLE_S = 5.0

Call = Callable[[], Awaitable[float]]


def ceiling(server: Server) -> dict[str, Any]:
    """What the generator does against /healthz with CALLERS connections: the server's least work is in it too."""
    return uvloop.run(_ceiling(server))


async def _ceiling(server: Server) -> dict[str, Any]:
    client, times = server.client(), list[float]()
    until = time.perf_counter() + CEILING_S

    async def caller() -> None:
        while (started := time.perf_counter()) < until:
            if (await client.ask("GET", "/healthz")).status == 200:
                times.append((time.perf_counter() - started) * 1e3)

    spent = time.process_time()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    own_us = (time.process_time() - spent) / max(1, len(times)) * 1e6
    client.close()
    row = summary(times, ())
    del row["samples_ms"]
    return {**row, "per_s": round(len(times) / CEILING_S), "generator_cpu_us_each": round(own_us, 1)}


async def _open_loop(call: Call, samples: int, per_s: float) -> list[float]:
    """`call` by CALLERS callers at random times, `per_s` together. A late start counts against the server: its last
    answer was not there yet, and that wait is part of what its caller sees."""

    async def caller(count: int) -> list[float]:
        found, due = list[float](), time.perf_counter()
        for _ in range(count):
            due += random.expovariate(per_s / CALLERS)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late_ms = (time.perf_counter() - due) * 1e3
            found.append(await call() + max(0.0, late_ms))
        return found

    return [ms for each in await asyncio.gather(*(caller(samples // CALLERS) for _ in range(CALLERS))) for ms in each]


async def _volleys(call: Call, samples: int, per_s: float) -> list[float]:
    """CALLERS calls in the same moment, then a pause that brings the rate to `per_s`: the worst of 8 concurrent callers."""
    found = list[float]()
    for _ in range(samples // CALLERS):
        began = time.perf_counter()
        found += await asyncio.gather(*(call() for _ in range(CALLERS)))
        await asyncio.sleep(max(0.0, CALLERS / per_s - (time.perf_counter() - began)))
    return found


def _one_shot(tenant: Tenant) -> Call:
    async def call() -> float:
        nonce, started = secrets.token_hex(8), time.perf_counter()
        result = await tenant.result("one shot", "/v1/run", {"code": programs.say(nonce)})
        took_ms = (time.perf_counter() - started) * 1e3
        if result is None or not tenant.judge("one shot", result, nonce):
            raise ValueError(f"a one-shot run failed: {dict(tenant.ledger.examples)}")
        return took_ms

    return call


async def _pools(admin: Client) -> dict[str, int]:
    """hits and misses over all classes."""
    rows = (await status(admin))["pools"]
    return {k: sum(row[k] for row in rows) for k in ("hits", "misses")}


def claims(server: Server, samples: int, per_s: float) -> dict[str, Any]:
    """A warm sandbox claimed, its first result, its end: POST /v1/run at a rate that the refill can follow, and beyond."""
    return uvloop.run(_claims(server, samples, per_s))


async def _claims(server: Server, samples: int, per_s: float) -> dict[str, Any]:
    tenant, admin = (await make_tenants(server, 1, "claims"))[0], server.client()
    call = _one_shot(tenant)
    await _open_loop(call, 10 * CALLERS, per_s)  # so that the pool's forecast knows the rate
    rows = dict[str, Any](per_s=per_s, callers=CALLERS)
    for name, way in (("spread", _open_loop), ("volleys", _volleys)):
        await asyncio.sleep(SETTLE_S)
        before = await _pools(admin)
        times = await way(call, samples, per_s)
        after = await _pools(admin)
        hits, misses = (after[k] - before[k] for k in ("hits", "misses"))
        rows[name] = summary(times, ()) | {"hits": hits, "misses": misses, "hit_rate": round(hits / max(1, hits + misses), 4)}
    rows["emptied"] = await _emptied(call, admin)
    tenant.client.close()
    return rows


async def _emptied(call: Call, admin: Client) -> dict[str, Any]:
    """More calls in one moment than there are warm sandboxes: what the cold ones among them cost."""
    before, times = await _pools(admin), list[float]()
    for _ in range(EMPTY_ROUNDS):
        await asyncio.sleep(EMPTY_REST_S)
        times += await asyncio.gather(*(call() for _ in range(EMPTY_AT_ONCE)))
    after = await _pools(admin)
    hits, misses = (after[k] - before[k] for k in ("hits", "misses"))
    return summary(times, ()) | {"at_once": EMPTY_AT_ONCE, "hits": hits, "misses": misses}


def sessions(server: Server, samples: int) -> dict[str, Any]:
    """A run in a live session: one caller, 8 callers with a session each, and one through the SDK."""
    return uvloop.run(_sessions(server, samples)) | {"sdk": _sdk(server, samples)}


async def _sessions(server: Server, samples: int) -> dict[str, Any]:
    tenant = (await make_tenants(server, 1, "sessions"))[0]
    found = [s for s in [await tenant.open_session() for _ in range(CALLERS)] if s]
    if len(found) < CALLERS:
        raise ValueError(f"only {len(found)} of {CALLERS} sessions: {dict(tenant.ledger.examples)}")

    async def caller(session: Session, count: int) -> list[float]:
        times = list[float]()
        for _ in range(count):
            nonce, started = secrets.token_hex(8), time.perf_counter()
            if await tenant.run(session, "run", programs.say(nonce), nonce):
                times.append((time.perf_counter() - started) * 1e3)
        return times

    await caller(found[0], samples // 10)
    alone = await caller(found[0], samples)
    eight = await asyncio.gather(*(caller(s, samples // CALLERS) for s in found))
    for session in found:
        await tenant.kill(session)
    tenant.client.close()
    return {"alone": summary(alone, ()), "eight": summary([ms for each in eight for ms in each], ())}


def _sdk(server: Server, samples: int) -> dict[str, Any]:
    times = list[float]()
    with Sandbox(url=f"http://{server.host}:{server.port}", api_key=server.key) as box:
        for n in range(samples + samples // 10):
            nonce, started = secrets.token_hex(8), time.perf_counter()
            printed = box.run(programs.say(nonce)).stdout
            if n >= samples // 10 and printed == nonce + "\n":
                times.append((time.perf_counter() - started) * 1e3)
    return summary(times, ())
