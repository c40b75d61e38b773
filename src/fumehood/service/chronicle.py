"""What happened, told to whoever listens and kept in the store; what is too old is forgotten, what was freed given back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Self

from fumehood.bus import EventBus
from fumehood.config import Config
from fumehood.errors import FumehoodError
from fumehood.lease import Lease
from fumehood.records import EventRecord, ExecutionRecord
from fumehood.runtime.host.heap import give_back
from fumehood.store import Store

_log = logging.getLogger("fumehood.service")
_PRUNE_EVERY_S = 600.0


class Chronicle:
    """Numbers the events: a listener and the store know each by the same `seq`."""

    def __init__(self, store: Store, seq: int, config: Config) -> None:
        self.events = EventBus()
        self._store, self._seq, self._config = store, seq, config
        self._full = asyncio.Event()
        self._pruning: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, store: Store, config: Config) -> Self:
        chronicle = cls(store, await store.last_seq(), config)
        chronicle._pruning = asyncio.create_task(chronicle._prune())
        return chronicle

    async def aclose(self) -> None:
        self.events.close()
        if self._pruning is not None:
            self._pruning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pruning

    def lease(self, lease: Lease, kind: str, data: dict[str, Any]) -> None:
        self._note(lease.tenant, lease.id, kind, data)

    def execution(self, record: ExecutionRecord) -> None:
        facts = {"execution_id": record.id, "kind": record.kind, "status": record.status, "cause": record.cause}
        self._note(record.tenant, record.sandbox_id, "execution.done", facts)
        # Of all tenants together: no tenant passes its bound by more than this quarter before the oldest results go.
        if 4 * self._store.unpruned_bytes > self._config.retention_bytes_per_tenant:
            self._full.set()

    def _note(self, tenant: str, sandbox_id: str, kind: str, data: dict[str, Any]) -> None:
        self._seq += 1
        self.events.publish(EventRecord(self._seq, tenant, sandbox_id, time.time(), kind, data))
        try:
            self._store.append_event(tenant, sandbox_id, kind, data, seq=self._seq)
        except FumehoodError as e:  # whoever ends a sandbox must not fail because its event can't be kept
            _log.error("an event was not kept: %s", e, extra={"sandbox_id": sandbox_id, "kind": kind})

    async def _prune(self) -> None:
        config = self._config
        while True:
            self._full.clear()
            try:
                await self._store.prune(
                    older_than_s=config.retention_s,
                    max_rows=config.retention_rows,
                    max_bytes_per_tenant=config.retention_bytes_per_tenant,
                )
            except FumehoodError as e:
                _log.error("old records could not be forgotten: %s", e)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PRUNE_EVERY_S):
                    await self._full.wait()
                    continue
            give_back()
