"""A tenant of the load: a key, its ledger, and live sessions that are used by one request at a time."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from bench.load import programs
from bench.load.http import Client, Gone, Reply
from bench.load.ledger import ANSWER_S, Ledger, clean_refusal
from bench.load.server import Server

# The load is one machine's: a key's own limits must not be what ends it.
KEY_OPTIONS = ("--requests-per-s", "5000", "--burst", "5000", "--concurrent", "2000")
SESSION_LIMITS = {"memory_bytes": 256 << 20}  # 200 at the default of 512 MiB would pass the default budget of this machine
LEASE_S = 7200
AGAIN_S = 1.0
BROKEN = (Gone, OSError, TimeoutError)  # no answer


@dataclass
class Session:
    id: str
    nonce: str
    turns: int = 0

    @property
    def path(self) -> str:
        return f"/v1/sandboxes/{self.id}"


class Tenant:
    def __init__(self, name: str, client: Client) -> None:
        self.name, self.client, self.ledger = name, client, Ledger()
        self.free: asyncio.Queue[Session] = asyncio.Queue()

    async def ask(self, method: str, path: str, body: Any = None) -> Reply:
        """Raises one of BROKEN when no whole answer came in time."""
        async with asyncio.timeout(ANSWER_S):
            return await self.client.ask(method, path, body)

    async def result(self, kind: str, path: str, body: Any) -> dict[str, Any] | None:
        """The Result of a POST; None when it was refused, which is then entered. Raises one of BROKEN."""
        started = time.perf_counter()
        reply = await self.ask("POST", path, body)
        if reply.status == 200:
            self.ledger.samples[kind].append((time.perf_counter() - started) * 1e3)
            return reply.json()
        wrong = clean_refusal(reply)
        self.ledger.enter(kind, "lost" if wrong else "refused", wrong)
        return None

    def judge(self, kind: str, result: dict[str, Any], said: str, ends: frozenset[str] = frozenset({"ok"})) -> bool:
        """Enter a Result: whose it is comes first, then whether it is what the program should have come to."""
        self.ledger.answered[result["sandbox_id"]] += 1
        printed = result["stdout"]
        if not printed.startswith(said):
            # Nothing printed at all is an end before the first line; another's line is the worst that can happen.
            fate = "wrong_owner" if printed.strip() else "unexpected"
            self.ledger.enter(kind, fate, f"wanted {said!r}, got {printed[:80]!r}: {result['status']} {result['cause']}")
            return False
        return self.ledger.check(kind, result["status"] in ends, f"{result['status']}: {result['cause']}", "unexpected")

    async def run(self, session: Session, kind: str, code: str, said: str) -> bool:
        """Run `code`, which must end well and print `said`. Raises one of BROKEN."""
        result = await self.result(kind, f"{session.path}/executions", {"code": code})
        return result is not None and self.judge(kind, result, said)

    async def open_session(self) -> Session | None:
        """A new session that knows its nonce; None when the server refused."""
        body = {"limits": SESSION_LIMITS, "lease_s": LEASE_S}
        reply = await self.ask("POST", "/v1/sandboxes", body)
        if reply.status != 201:
            wrong = clean_refusal(reply)
            self.ledger.enter("create", "lost" if wrong else "refused", wrong)
            return None
        self.ledger.enter("create", "answered")
        session = Session(reply.json()["id"], secrets.token_hex(8))
        return session if await self.run(session, "first run", programs.remember(session.nonce), session.nonce) else None

    async def kill(self, session: Session) -> None:
        reply = await self.ask("DELETE", session.path)
        self.ledger.check("kill", reply.status == 204, f"{reply.status}: {bytes(reply.body[:200])!r}", "lost")

    async def refill(self) -> None:
        """A session in place of one that is gone; asked for until there is one, or the load would run dry."""
        session = None
        while session is None:
            try:
                session = await self.open_session()
            except BROKEN as e:
                self.ledger.enter("create", "lost", f"{type(e).__name__}: {e}")
            if session is None:
                await asyncio.sleep(AGAIN_S)
        self.free.put_nowait(session)

    async def with_session(self, kind: str, work: Callable[[Session], Awaitable[bool]]) -> None:
        """`work` says whether the session is still good; if not, it is killed and another takes its place."""
        session = await self.free.get()
        try:
            good = await work(session)
        except BROKEN as e:
            self.ledger.enter(kind, "lost", f"{type(e).__name__}: {e}")
            self.ledger.perhaps[session.id] += 1
            good = False
        if good:
            self.free.put_nowait(session)
            return
        try:
            await self.kill(session)
        except BROKEN as e:
            self.ledger.enter("kill", "lost", f"{type(e).__name__}: {e}")
        await self.refill()


async def make_tenants(server: Server, count: int, prefix: str) -> list[Tenant]:
    """Their keys are made beside the running server, as an operator makes them. Raises NoServer."""
    names = [f"{prefix}{n}" for n in range(count)]
    keys = await asyncio.gather(*(asyncio.to_thread(server.make_key, name, KEY_OPTIONS) for name in names))
    return [Tenant(name, server.client(key)) for name, key in zip(names, keys, strict=True)]
