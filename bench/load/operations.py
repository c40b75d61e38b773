"""The mixed load's operations: each takes a tenant, makes one execution of its kind, and enters what became of it."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from bench.load import programs
from bench.load.http import Gone
from bench.load.ledger import ANSWER_S
from bench.load.tenants import BROKEN, Session, Tenant

Operation = Callable[[Tenant], Awaitable[None]]
FILE_BYTES = 64 << 10
KILL_AFTER_S = 0.1
DROP_WITHIN_S = 0.08
STREAM_LINES, STREAM_PAUSE_S = 5, 0.05


async def run(tenant: Tenant) -> None:
    nonce = secrets.token_hex(8)
    await tenant.with_session("run", lambda s: tenant.run(s, "run", programs.say(nonce), nonce))


async def recall(tenant: Tenant) -> None:
    """The session still knows whose it is and how often it was asked."""

    async def work(session: Session) -> bool:
        session.turns += 1
        return await tenant.run(session, "recall", programs.RECALL, f"{session.nonce} {session.turns}\n")

    await tenant.with_session("recall", work)


async def execute(tenant: Tenant) -> None:
    nonce = secrets.token_hex(8)

    async def work(session: Session) -> bool:
        result = await tenant.result("exec", f"{session.path}/exec", {"argv": ["/bin/echo", nonce]})
        return result is not None and tenant.judge("exec", result, nonce)

    await tenant.with_session("exec", work)


async def _once(tenant: Tenant, kind: str, nonce: str, body: dict[str, Any], ends: frozenset[str]) -> None:
    try:
        result = await tenant.result(kind, "/v1/run", body)
    except BROKEN as e:
        tenant.ledger.enter(kind, "lost", f"{type(e).__name__}: {e}")
        tenant.ledger.unseen += 1
    else:
        if result is not None:
            tenant.judge(kind, result, nonce, ends)


async def one_shot(tenant: Tenant) -> None:
    nonce = secrets.token_hex(8)
    await _once(tenant, "one shot", nonce, {"code": programs.say(nonce)}, frozenset({"ok"}))


async def hostile(tenant: Tenant) -> None:
    name, nonce = random.choice(list(programs.HOSTILE)), secrets.token_hex(8)
    program = programs.HOSTILE[name]
    limits = {**programs.HOSTILE_LIMITS, "timeout_s": program.timeout_s}
    await _once(tenant, name, nonce, {"code": programs.hostile(name, nonce), "limits": limits}, program.ends)


def _events(raw: bytes | bytearray) -> list[tuple[str, dict[str, Any]]]:
    """(event, data) of a text/event-stream's whole blocks; comments are left out."""
    found = list[tuple[str, dict[str, Any]]]()
    for block in raw.decode().replace("\r\n", "\n").split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "event" in fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


async def stream(tenant: Tenant) -> None:
    """An SSE stream read to its end: every line in order, then the result."""
    nonce = secrets.token_hex(8)
    said = "".join(f"{nonce} {n}\n" for n in range(STREAM_LINES))
    body = {"code": programs.tick(nonce, STREAM_LINES, STREAM_PAUSE_S)}

    async def work(session: Session) -> bool:
        async with asyncio.timeout(ANSWER_S), _sse(tenant, session, body) as connection:
            reply = await connection.reply()
        events = _events(reply.body)
        result = next((e["result"] for kind, e in events if kind == "end"), None)
        streamed = "".join(e["text"] for kind, e in events if kind == "stdout")
        if result is None or streamed != result["stdout"]:
            raise Gone(f"{reply.status}: streamed {streamed!r}, events {[kind for kind, _ in events]}")
        return tenant.judge("stream", result, said)

    await tenant.with_session("stream", work)


def _sse(tenant: Tenant, session: Session, body: dict[str, Any]) -> Any:
    return tenant.client.sent("POST", f"{session.path}/executions", body, Accept="text/event-stream")


async def hang_up(tenant: Tenant) -> None:
    """The client dies while its program runs: the program must be stopped and have exactly one record."""
    nonce = secrets.token_hex(8)

    async def work(session: Session) -> bool:
        async with asyncio.timeout(ANSWER_S):
            id = await _start_and_abort(tenant, session, programs.linger(nonce))
        tenant.ledger.enter("hang up", "aborted")
        tenant.ledger.answered[session.id] += 1
        tenant.ledger.cut_off.add(id)
        # The next execution waits for the stopped one to be gone, and still finds the session's own state.
        session.turns += 1
        return await tenant.run(session, "after hang up", programs.RECALL, f"{session.nonce} {session.turns}\n")

    await tenant.with_session("hang up", work)


async def _start_and_abort(tenant: Tenant, session: Session, code: str) -> str:
    """The execution's id, once its first output has come, and the connection then reset."""
    async with _sse(tenant, session, {"code": code}) as connection:
        async for reply in connection.pieces():
            events = _events(reply.body)
            if any(kind == "stdout" for kind, _ in events):
                connection.abort()
                return next(str(e["execution_id"]) for kind, e in events if kind == "started")
    raise Gone("the stream ended before its first output")


async def drop(tenant: Tenant) -> None:
    """The client of a one-shot run dies at any moment from the request's first byte on."""
    body = {"code": programs.linger(secrets.token_hex(8))}
    async with tenant.client.sent("POST", "/v1/run", body) as connection:
        await asyncio.sleep(random.uniform(0, DROP_WITHIN_S))
        connection.abort()
    tenant.ledger.unseen += 1
    tenant.ledger.enter("drop", "aborted")


async def kill(tenant: Tenant) -> None:
    """A sandbox is killed while it works: its run says so, or that the sandbox is gone."""
    session = await tenant.free.get()
    tenant.ledger.perhaps[session.id] += 1
    try:
        body = {"code": programs.linger("killed")}
        pending = asyncio.create_task(tenant.ask("POST", f"{session.path}/executions", body))
        await asyncio.sleep(KILL_AFTER_S)
        await tenant.kill(session)
        reply = await pending
        good = reply.status == 410 or (reply.status == 200 and reply.json()["status"] == "killed")
        tenant.ledger.check("killed run", good, f"{reply.status}: {bytes(reply.body[:200])!r}", "unexpected")
    except BROKEN as e:
        tenant.ledger.enter("killed run", "lost", f"{type(e).__name__}: {e}")
    await tenant.refill()


async def files(tenant: Tenant) -> None:
    """Write, read back, compare, remove. No execution, so it is beside the rate."""
    content = secrets.token_bytes(FILE_BYTES)

    async def work(session: Session) -> bool:
        path = f"{session.path}/files?path=/home/user/{secrets.token_hex(4)}"
        replies = [await tenant.ask(method, path, body) for method, body in (("PUT", content), ("GET", None), ("DELETE", None))]
        read = replies[1]
        why = f"PUT, GET, DELETE answered {[r.status for r in replies]}, {len(read.body)} bytes read"
        same = bytes(read.body) == content and replies[2].status == 204
        return tenant.ledger.check("file", same, why, "wrong_owner" if read.status == 200 else "lost")

    await tenant.with_session("file", work)


# Shares of all executions. Hostile ones are the 5% that the target names.
EXECUTIONS: tuple[tuple[Operation, int], ...] = (
    (run, 50),
    (recall, 10),
    (execute, 10),
    (one_shot, 12),
    (stream, 6),
    (hang_up, 3),
    (drop, 2),
    (kill, 2),
    (hostile, 5),
)
