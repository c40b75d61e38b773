"""The service below every face of the server: who may have a sandbox, where it comes from, what runs in it, how it ends.

gateway -> here -> scheduler (a place, a turn) -> pool (a warm one) or supervisor -> live -> result, and every step of it in
the store. One event loop; nothing here blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, Self

from fumehood.config import Config
from fumehood.errors import RateLimited
from fumehood.execution import Sinks
from fumehood.lease import Lease
from fumehood.model import CodeRequest, ExecRequest, Protection, Result
from fumehood.pool import PoolSettings
from fumehood.records import Caller, ExecutionRecord, SandboxRecord
from fumehood.runtime.tiers import TIERS, Choice
from fumehood.scheduler import Grant
from fumehood.service.admission import Admission, Wait
from fumehood.service.asks import Asks, CreateAsk
from fumehood.service.chronicle import Chronicle
from fumehood.service.executions import Executions, Running, new_id, to_json, unknown
from fumehood.service.leases import Leases
from fumehood.service.source import Source
from fumehood.store import Store
from fumehood.supervisor import Supervisor

__all__ = ["CreateAsk", "Service", "new_id", "to_json"]

_NO_SINKS = Sinks()
_OPERATOR = Caller("", "")
Request = CodeRequest | ExecRequest


class Service:
    """`async with await Service.open(config) as service`. Every method may raise StoreFailed."""

    def __init__(self, config: Config, store: Store, chronicle: Chronicle) -> None:
        self.config, self.store, self.events = config, store, chronicle.events
        self.supervisor = Supervisor(config, TIERS)
        self.started_at = time.time()
        self.counts = Counter[str]()  # executions done, by status
        self._coming = Counter[str]()  # sandboxes that are being made or claimed, by key
        self._closing: asyncio.Task[None] | None = None
        self._chronicle = chronicle
        self._asks = Asks(config, lambda tier: self.supervisor.runtime(tier).late_limits)
        self._admission = Admission(config)
        settings = PoolSettings(config.pool_floor, config.pool_ceiling, config.pool_headroom, config.pool_idle_s)
        self._source = Source(self.supervisor, settings)
        self._leases = Leases(config, self.supervisor, store, chronicle.lease)
        self._executions = Executions(store, self._executed)

    @classmethod
    async def open(cls, config: Config) -> Self:
        """Opens the store (what a killed server left is ended there), proves the tier, begins to warm. Raises StoreFailed."""
        async with contextlib.AsyncExitStack() as undo:
            store = await Store.open(config.state_dir / "store.db", flush=config.flush_records)
            undo.push_async_callback(store.aclose)
            chronicle = await Chronicle.open(store, config)
            undo.push_async_callback(chronicle.aclose)
            service = cls(config, store, chronicle)
            undo.push_async_callback(service.supervisor.aclose)
            for name in filter(None, (n.strip() for n in config.pool_policies.split(","))):
                service._source.keep(service._asks.resolve(_OPERATOR, CreateAsk(policy=name))[1])
            service._source.start()
            undo.pop_all()
        return service

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def drain(self, grace_s: float) -> None:
        """Nothing new from now on; what runs may end within `grace_s`, and is cancelled then."""
        await self._admission.drain(grace_s)
        await self._executions.stop_all()

    async def aclose(self) -> None:
        """Ends every sandbox and closes the store. Twice is once; cancelling it ends the waiting only."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._admission.draining = True
        await self._executions.stop_all()
        await self._source.aclose()
        await self._leases.aclose("the server stopped")
        await self.supervisor.aclose()
        await self._chronicle.aclose()
        await self.store.aclose()

    @property
    def draining(self) -> bool:
        return self._admission.draining

    # -- sandboxes

    async def create(self, caller: Caller, ask: CreateAsk) -> Lease:
        """A ready sandbox. Raises what its policy, the admission and the runtime raise; then nothing is left of it."""
        lease, turn = await self._create(caller, ask, self._admission.wait(caller, ask.priority, ask.wait_s))
        if turn is not None:
            turn.release()
        return lease

    async def run_once(
        self,
        caller: Caller,
        ask: CreateAsk,
        request: Request,
        sinks: Sinks = _NO_SINKS,
        *,
        execution_id: str | None = None,
    ) -> Result:
        """A sandbox for this one execution. It ends with it; its caller does not wait for that, but its place is held."""
        wait = self._admission.wait(caller, ask.priority, ask.wait_s).within(request.timeout_s)
        lease, turn = await self._create(caller, replace(ask, on_expiry="kill", lease_s=None), wait, runs=True)
        try:
            waited_ms = lease.queue_ms
            running = self._begin(lease, request, sinks, wait, execution_id=execution_id, turn=turn, waited_ms=waited_ms)
            return await self._executions.result(running)
        finally:
            if turn is not None:
                turn.release()
            self._leases.end_soon(lease, "its one execution ended")

    async def _create(self, caller: Caller, ask: CreateAsk, wait: Wait, *, runs: bool = False) -> tuple[Lease, Grant | None]:
        """Also the turn that it still holds: when it had to be made, for that takes as much of the processors as a run; and
        when it `runs` at once, so that no sandbox is taken for a run that is turned away.
        """
        spec, kind = self._asks.resolve(caller, ask)
        lease_s = self._asks.lease_s(ask, spec)
        async with contextlib.AsyncExitStack() as undo:
            with self._one_more_of(caller):
                place = undo.enter_context(await self._admission.place(wait, spec.limits.memory_bytes + spec.limits.swap_bytes))
                turn = undo.enter_context(await self._admission.turn(wait)) if runs else None
                live = await self._source.claim(spec, kind)
                if live is None:
                    turn = turn or undo.enter_context(await self._admission.turn(wait))
                    live = await self._source.make(spec, kind)
            lease = Lease(
                live,
                caller.tenant,
                caller.key_id,
                self.supervisor.runtime(kind.tier).tier,
                lease_s,
                time.time() + lease_s,
                ask.on_expiry,
                ask.auto_resume,
                ask.metadata,
                caller.limits,
                give_back=place.release,
                queue_ms=place.queue_ms,
            )
            await self._leases.add(lease)
            undo.pop_all()
        return lease, turn

    def lease(self, caller: Caller, sandbox_id: str) -> Lease:
        """Live, in whatever state. Raises NotFound (another tenant's too, in the same words), SandboxGone."""
        return self._leases.get(caller, sandbox_id)

    async def awake(self, caller: Caller, sandbox_id: str) -> Lease:
        """The same, for traffic: one that was paused goes on if its lease says so, else InvalidTransition is raised."""
        lease = self._leases.get(caller, sandbox_id)
        await self._leases.awake(lease)
        return lease

    def leases(self, caller: Caller) -> list[Lease]:
        return self._leases.of(caller.tenant)

    def find(self, sandbox_id: str) -> Lease | None:
        """Of any tenant: for whoever checks the sandbox's own token next."""
        return self._leases.find(sandbox_id)

    def everyone(self) -> list[Lease]:
        return self._leases.of(None)

    async def pause(self, caller: Caller, lease: Lease) -> None:
        await self._leases.pause(lease)

    async def resume(self, caller: Caller, lease: Lease) -> None:
        await self._leases.resume(lease)

    async def extend(self, caller: Caller, lease: Lease, seconds: float) -> None:
        await self._leases.extend(lease, seconds)

    async def kill(self, caller: Caller, lease: Lease, cause: str = "killed by its owner") -> None:
        await self._leases.end(lease, cause)

    async def history(
        self, caller: Caller, *, states: frozenset[str] | None = None, after: str | None = None, limit: int = 100
    ) -> list[SandboxRecord]:
        """Newest first. `end_at`, `state` of what lives are those of this moment."""
        known = self._leases.known(caller.tenant)
        found = await self.store.sandboxes(caller.tenant, states=states, after=after, limit=limit)
        return [known[record.id].record if record.id in known else record for record in found]

    async def record(self, caller: Caller, sandbox_id: str) -> SandboxRecord | None:
        """Of one that ended, too; None when it is unknown, forgotten or another tenant's."""
        if lease := self._leases.known(caller.tenant).get(sandbox_id):
            return lease.record
        return await self.store.sandbox(caller.tenant, sandbox_id)

    # -- executions

    async def run(
        self,
        caller: Caller,
        lease: Lease,
        request: Request,
        sinks: Sinks = _NO_SINKS,
        *,
        execution_id: str | None = None,
        priority: int = 0,
        wait_s: float | None = None,
    ) -> Result:
        """Cancelling this stops the program."""
        wait = self._admission.wait(caller, priority, wait_s)
        return await self._executions.result(self._begin(lease, request, sinks, wait, execution_id=execution_id))

    exec = run

    def submit(self, caller: Caller, lease: Lease, request: Request, *, priority: int = 0, wait_s: float | None = None) -> str:
        """In the background; the id to ask for it with."""
        return self._begin(lease, request, _NO_SINKS, self._admission.wait(caller, priority, wait_s)).record.id

    def _begin(
        self,
        lease: Lease,
        request: Request,
        sinks: Sinks,
        wait: Wait,
        *,
        execution_id: str | None = None,
        turn: Grant | None = None,
        waited_ms: float = 0.0,
    ) -> Running:
        """A timeout that was asked for counts from here: what is spent in the queue is not had afterwards (M11)."""
        live, waited_s = lease.live, waited_ms / 1e3
        live.deadline(request.timeout_s)

        async def granted() -> Grant:
            nonlocal waited_s
            grant = turn or await self._admission.turn(wait.within(request.timeout_s))
            waited_s += grant.queue_ms / 1e3
            return grant

        async def work() -> Result:
            now = request
            if request.timeout_s is not None:
                now = replace(request, timeout_s=max(0.001, request.timeout_s - waited_s))
            return await (live.run(now, sinks) if isinstance(now, CodeRequest) else live.exec(now, sinks))

        kind = "code" if isinstance(request, CodeRequest) else "exec"
        running = self._executions.begin(lease.tenant, lease.id, kind, granted, work, execution_id, waited_ms)
        self._source.busy(len(self._executions))
        return running

    async def execution(self, caller: Caller, execution_id: str) -> ExecutionRecord:
        """What this says of it is on the disk, that it began above all. Raises NotFound."""
        alive = self._executions.alive(caller.tenant, execution_id)
        found = await self.store.execution(caller.tenant, execution_id)
        record = found if found is not None and found.state == "done" else alive or found
        if record is None:
            raise unknown(execution_id)
        return record

    async def executions(
        self, caller: Caller, *, sandbox_id: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[ExecutionRecord]:
        found = await self.store.executions(caller.tenant, sandbox_id=sandbox_id, after=after, limit=limit)
        return [self._executions.alive(caller.tenant, record.id) or record for record in found]

    async def cancel(self, caller: Caller, execution_id: str) -> None:
        """Reaches the program; nothing happens when it has ended. Raises NotFound."""
        if not self._executions.cancel(caller.tenant, execution_id):
            await self.execution(caller, execution_id)

    # -- the whole

    def status(self) -> dict[str, Any]:
        """For admins."""
        leases = self._leases.of(None)
        return {
            "uptime_s": round(time.time() - self.started_at, 3),
            "draining": self.draining,
            "tier": {"name": self.tier.tier, "why": self.tier.why},
            "sandboxes": len(leases),
            "paused": sum(lease.is_paused for lease in leases),
            "executions": len(self._executions),
            "scheduler": self._admission.snapshot(),
            "pools": self._source.status(),
            "records_lost": self.store.lost,
        }

    @property
    def tier(self) -> Choice:
        """Of sandboxes whose creator names none."""
        return self.supervisor.choice

    def protections(self) -> Sequence[Protection]:
        """Of the operator's own tier, as probed on this host."""
        return self.supervisor.runtime(self.config.tier).capabilities().protections

    @contextlib.contextmanager
    def _one_more_of(self, caller: Caller) -> Generator[None]:
        """Those that are still to come count too: asking for many at once gets nobody more."""
        bound, key = caller.limits.sandboxes, caller.key_id
        if bound and self._leases.count_of_key(key) + self._coming[key] >= bound:
            raise RateLimited(
                f"this key holds {bound} sandboxes",
                cause="it may hold no more at once",
                remediation="end one of them",
                retry_after_s=5,
            )
        self._coming[key] += 1
        try:
            yield
        finally:
            self._coming[key] -= 1
            self._coming += Counter()  # forgets who has none

    def _executed(self, record: ExecutionRecord) -> None:
        self.counts[str(record.status)] += 1
        self._source.busy(len(self._executions))
        self._chronicle.execution(record)
