"""The service below every face of the server: who may have a sandbox, where it comes from, what runs in it, how it ends.

gateway -> here -> scheduler (a place, a turn) -> pool (a warm one) or supervisor -> live -> result, and every step of it in
the store. One event loop; nothing here blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from fumehood.config import Config
from fumehood.errors import InvalidInput, RateLimited
from fumehood.execution import Sinks
from fumehood.lease import Lease
from fumehood.live import Live
from fumehood.model import CodeRequest, ExecRequest, Protection, Result, SandboxSpec
from fumehood.pool import PoolSettings
from fumehood.records import Caller, ExecutionRecord, SandboxRecord, SnapshotRecord
from fumehood.runtime.tiers import TIERS, Choice
from fumehood.scheduler import Grant
from fumehood.service.admission import Admission, Wait
from fumehood.service.asks import Asks, CreateAsk, Kind, check_labels
from fumehood.service.chronicle import Chronicle
from fumehood.service.executions import Executions, Running, new_id, to_json, unknown
from fumehood.service.leases import Leases
from fumehood.service.snapshots import TenantSnapshots
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
        self._snapshots = TenantSnapshots(config, self.supervisor, store)

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
            await service._snapshots.reconcile()
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
        spec, kind = await self._resolved(caller, ask)
        lease_s = self._asks.lease_s(ask, spec)
        async with contextlib.AsyncExitStack() as undo:
            with self._more_of(caller, 1):
                place = undo.enter_context(await self._admission.place(wait, _memory(spec)))
                turn = undo.enter_context(await self._admission.turn(wait)) if runs else None
                live = await self._source.claim(spec, kind)
                if live is None:
                    turn = turn or undo.enter_context(await self._admission.turn(wait))
                    live = await self._source.make(spec, kind)
            lease = self._lease(live, caller, ask, lease_s, place)
            await self._leases.add(lease)
            undo.pop_all()
        return lease, turn

    async def _resolved(self, caller: Caller, ask: CreateAsk) -> tuple[SandboxSpec, Kind]:
        if ask.snapshot is None:
            return self._asks.resolve(caller, ask)
        return self._asks.restored(caller, ask, await self._snapshots.get(caller.tenant, ask.snapshot))

    def _lease(self, live: Live, caller: Caller, ask: CreateAsk, lease_s: float, place: Grant) -> Lease:
        return Lease(
            live,
            caller.tenant,
            caller.key_id,
            live.tier,
            lease_s,
            time.time() + lease_s,
            ask.on_expiry,
            ask.auto_resume,
            ask.metadata,
            caller.limits,
            give_back=place.release,
            queue_ms=place.queue_ms,
        )

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

    # -- copies of whole sandboxes

    async def snapshot(self, caller: Caller, lease: Lease, metadata: Mapping[str, str] | None = None) -> SnapshotRecord:
        """It goes on, paused if it was. Raises Unsupported, InvalidTransition while something runs in it, CapacityExceeded."""
        self.supervisor.copying(lease.tier)
        check_labels(metadata or {})
        with await self._admission.turn(self._admission.wait(caller, 0, None)):
            async with self._leases.held(lease):
                made = await self._snapshots.take(caller, lease, metadata or {})
        self._chronicle.lease(lease, "sandbox.snapshot", {"snapshot": made.id})
        return made

    async def snapshots(
        self, caller: Caller, *, sandbox_id: str | None = None, after: str | None = None, limit: int = 100
    ) -> list[SnapshotRecord]:
        """Newest first, without their specs."""
        return await self._snapshots.page(caller.tenant, sandbox_id, after, limit)

    async def snapshot_of(self, caller: Caller, snapshot_id: str) -> SnapshotRecord:
        """Raises NotFound, for another tenant's too, and in the same words."""
        return await self._snapshots.get(caller.tenant, snapshot_id)

    async def discard(self, caller: Caller, snapshot_id: str) -> None:
        """Sandboxes that run from it go on. Raises NotFound."""
        await self._snapshots.discard(caller.tenant, snapshot_id)

    async def restore(self, caller: Caller, snapshot_id: str, ask: CreateAsk | None = None) -> Lease:
        """A new sandbox that goes on from there. Raises as `create`, and NotFound."""
        return await self.create(caller, replace(ask or CreateAsk(), snapshot=snapshot_id))

    async def rollback(self, caller: Caller, lease: Lease, snapshot_id: str) -> None:
        """The same sandbox, as it was then; what runs in it is killed. Raises NotFound, InvalidInput for a snapshot of another
        kind of sandbox, SetupFailed; then it goes on as it was.
        """
        self.supervisor.copying(lease.tier)
        snapshot, spec = await self._snapshots.get(caller.tenant, snapshot_id), lease.live.spec
        if (snapshot.tier, snapshot.policy_hash) != (lease.tier, spec.policy_hash):
            raise InvalidInput(
                "that snapshot is of another kind of sandbox",
                cause=f"of {snapshot.policy} on {snapshot.tier}; this is {spec.policy_name} on {lease.tier}, or limits differ",
                remediation="create a sandbox from it",
            )
        with await self._admission.turn(self._admission.wait(caller, 0, None)):
            async with self._leases.held(lease):
                await self.supervisor.rollback(lease.live, snapshot.id)
        self._chronicle.lease(lease, "sandbox.rolled_back", {"snapshot": snapshot.id})

    async def fork(
        self,
        caller: Caller,
        lease: Lease,
        count: int,
        *,
        lease_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Lease]:
        """So many new sandboxes, all or none, that go on from where this one is. Raises as `snapshot`; RateLimited; and
        CapacityExceeded, at once: nobody waits for so many places.
        """
        self.supervisor.copying(lease.tier)
        labels = lease.metadata if metadata is None else metadata
        ask = CreateAsk(metadata=labels, lease_s=lease_s, on_expiry=lease.on_expiry, auto_resume=lease.auto_resume)
        check_labels(labels)
        seconds, wait = self._asks.lease_s(ask, lease.live.spec), self._admission.wait(caller, 0, None)
        async with contextlib.AsyncExitStack() as undo:
            with self._more_of(caller, count):
                places = await self._admission.places(wait, count, _memory(lease.live.spec))
                for place in places:
                    undo.callback(place.release)
                with await self._admission.turn(wait):
                    async with self._leases.held(lease):
                        lives = await self.supervisor.fork(lease.live, count, timed=False)
                for live in lives:
                    undo.push_async_callback(self.supervisor.close_sandbox, live.id)
                forks = [self._lease(live, caller, ask, seconds, place) for live, place in zip(lives, places, strict=True)]
                for fork in forks:
                    await self._leases.add(fork)
                    undo.push_async_callback(self._leases.end, fork, "not all of the forks could be recorded")
            undo.pop_all()
        self._chronicle.lease(lease, "sandbox.forked", {"sandboxes": [fork.id for fork in forks]})
        return forks

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
    def _more_of(self, caller: Caller, count: int) -> Generator[None]:
        """Those that are still to come count too: asking for many at once gets nobody more."""
        bound, key = caller.limits.sandboxes, caller.key_id
        if bound and self._leases.count_of_key(key) + self._coming[key] + count > bound:
            raise RateLimited(
                f"this key may hold {bound} sandboxes",
                cause=f"with {count} more it would hold too many at once",
                remediation="end some of them",
                retry_after_s=5,
            )
        self._coming[key] += count
        try:
            yield
        finally:
            self._coming[key] -= count
            self._coming += Counter()  # forgets who has none

    def _executed(self, record: ExecutionRecord) -> None:
        self.counts[str(record.status)] += 1
        self._source.busy(len(self._executions))
        self._chronicle.execution(record)


def _memory(spec: SandboxSpec) -> int:
    return spec.limits.memory_bytes + spec.limits.swap_bytes
