"""The snapshots that the server keeps for its tenants: whose each is, how many there may be, what is still there at a start.

A record is on the disk before the first of its files, and goes after the last: so whatever a killed server left half made is
found by its record. Files without one are those of embedded sandboxes, which use the same directory, and are let alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from fumehood.config import Config
from fumehood.errors import CapacityExceeded, FumehoodError, NotFound
from fumehood.lease import Lease
from fumehood.records import Caller, SnapshotRecord
from fumehood.service import spec_json
from fumehood.store import Store
from fumehood.supervisor import Supervisor

_log = logging.getLogger("fumehood.service")


class TenantSnapshots:
    def __init__(self, config: Config, supervisor: Supervisor, store: Store) -> None:
        self._config, self._supervisor, self._store, self._records = config, supervisor, store, store.snapshots
        self._adding = asyncio.Lock()  # what is counted and what is added to it must be one step

    async def take(self, caller: Caller, lease: Lease, metadata: Mapping[str, str]) -> SnapshotRecord:
        """Nobody may pause, resume or end the sandbox meanwhile. Raises what Supervisor.snapshot raises."""
        coming = _coming(caller, lease, metadata)
        async with contextlib.AsyncExitStack() as undo:
            async with self._adding:
                await self._check_room(coming)
                undo.push_async_callback(self._records.remove, coming.id)
                await self._records.put(coming)
            facts = await self._supervisor.snapshot(lease.live, coming.id)
            undo.push_async_callback(self._supervisor.discard, coming.id, coming.tier)
            made = replace(coming, state="ready", created_at=facts.created_at, size_bytes=facts.size_bytes)
            await self._records.put(made)
            undo.pop_all()
        return made

    async def _check_room(self, coming: SnapshotRecord) -> None:
        """What is being made counts for what it may come to."""
        count, used = await self._records.held(coming.tenant)
        bound, budget = self._config.max_snapshots_per_tenant, self._config.snapshot_budget_bytes
        if count >= bound:
            raise CapacityExceeded(
                f"there are {bound} snapshots", cause="one tenant may have no more", remediation="delete some of them"
            )
        if used + coming.size_bytes > budget:
            raise CapacityExceeded(
                "no room for another snapshot",
                cause=f"{used >> 20} of {budget >> 20} MiB are used, and it may take {coming.size_bytes >> 20}",
                remediation="delete snapshots, or have the operator raise snapshot_budget_bytes",
            )

    async def get(self, tenant: str, snapshot_id: str) -> SnapshotRecord:
        """Raises NotFound, for another tenant's too, and in the same words."""
        record = await self._records.one(tenant, snapshot_id)
        if record is None or record.state != "ready":
            raise _unknown(snapshot_id, "its files were lost" if record is not None and record.state == "gone" else "")
        return record

    async def page(self, tenant: str, sandbox_id: str | None, after: str | None, limit: int) -> list[SnapshotRecord]:
        return await self._records.page(tenant, "ready", sandbox_id=sandbox_id, after=after, limit=limit)

    async def discard(self, tenant: str, snapshot_id: str) -> None:
        """Sandboxes that run from it go on. Raises NotFound."""
        record = await self._records.one(tenant, snapshot_id)
        if record is None or record.state == "making":
            raise _unknown(snapshot_id)
        await self._remove(record)

    async def _remove(self, record: SnapshotRecord) -> None:
        with contextlib.suppress(NotFound):
            await self._supervisor.discard(record.id, record.tier)
        await self._records.remove(record.id)

    async def reconcile(self) -> None:
        """At the start. A tier that can't be had now leaves its records as they are: its files may well be there."""
        by_tier = defaultdict[str, list[SnapshotRecord]](list)
        for record in await self._records.all(frozenset({"making", "ready", "gone"})):
            by_tier[record.tier].append(record)
        for tier, records in by_tier.items():
            try:
                there = {facts.id for facts in self._supervisor.snapshots(tier)}
                for record in records:
                    await self._settle(record, record.id in there)
            except FumehoodError as e:
                _log.warning("the snapshots of the tier %s can't be looked at: %s", tier, e)

    async def _settle(self, record: SnapshotRecord, is_there: bool) -> None:
        if record.state == "making" or (record.state == "gone" and record.created_at < time.time() - self._config.retention_s):
            await self._remove(record)
        elif not is_there and record.state != "gone":
            _log.warning("the files of a snapshot were lost", extra={"snapshot_id": record.id, "sandbox_id": record.sandbox_id})
            await self._records.put(replace(record, state="gone", size_bytes=0))


def _coming(caller: Caller, lease: Lease, metadata: Mapping[str, str]) -> SnapshotRecord:
    spec = lease.live.spec
    return SnapshotRecord(
        id="p" + secrets.token_hex(8),
        tenant=caller.tenant,
        key_id=caller.key_id,
        sandbox_id=lease.id,
        tier=lease.tier,
        template=spec.template.name,
        policy=spec.policy_name,
        policy_hash=spec.policy_hash,
        spec=spec_json.to_text(spec),
        state="making",
        created_at=time.time(),
        size_bytes=spec.limits.memory_bytes,
        metadata=metadata,
    )


def _unknown(snapshot_id: str, cause: str = "") -> NotFound:
    return NotFound(f"no snapshot {snapshot_id[:40]!r}", cause=cause, remediation="list yours: it may have been deleted")
