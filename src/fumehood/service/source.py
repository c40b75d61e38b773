"""Where sandboxes come from: a warm one of their kind, bound to its claimer, else one made now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from fumehood.errors import FumehoodError
from fumehood.live import Live
from fumehood.model import SandboxSpec
from fumehood.pool import Pool, PoolSettings
from fumehood.runtime.rehearsal import rehearse
from fumehood.service.asks import Kind
from fumehood.supervisor import Supervisor

_log = logging.getLogger("fumehood.service")


class Source:
    """Owns the warm sandboxes. `start()` in the running loop, `aclose()` at the end."""

    def __init__(self, supervisor: Supervisor, settings: PoolSettings) -> None:
        self._supervisor = supervisor
        self.pool = Pool[Kind, Live](self._make_warm, self._close, settings)
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def claim(self, spec: SandboxSpec, kind: Kind) -> Live | None:
        """A warm one that has just answered, as `spec` says; None: there is none, make one. Nothing is ever reused (M12)."""
        while not kind.snapshot and (live := self.pool.claim(kind)) is not None:
            self._unwatch(live)
            try:
                async with asyncio.timeout(self._supervisor.config.agent_timeout_s):
                    await live.bind(spec)
                return live
            except (FumehoodError, TimeoutError) as e:
                _log.warning("a warm sandbox was not ready: %r", e, extra={"sandbox_id": live.id})
                await self._close(live)
                if isinstance(e, TimeoutError):
                    return None  # the next may hang as long: a new one is made sooner
            except BaseException:
                await asyncio.shield(self._close(live))
                raise
        return None

    async def make(self, spec: SandboxSpec, kind: Kind) -> Live:
        if kind.snapshot:
            return await self._supervisor.restore(kind.snapshot, spec, kind.tier, timed=False)
        return await self._supervisor.make(spec, kind.tier)

    def keep(self, kind: Kind) -> None:
        """Some of this kind are warm from the start."""
        self.pool.keep(kind)

    def busy(self, n_running: int) -> None:
        self.pool.busy(n_running)

    def start(self) -> None:
        self.pool.start()

    async def aclose(self) -> None:
        await self.pool.aclose()

    async def _make_warm(self, kind: Kind) -> Live:
        live = await self._supervisor.make(kind.spec, kind.tier)
        try:
            await rehearse(live.link)
        except BaseException:
            await asyncio.shield(self._close(live))
            raise
        self._watches[live.id] = asyncio.create_task(self._watch(live))
        return live

    async def _watch(self, live: Live) -> None:
        await live.handle.wait_dead()
        self.pool.forget(live)
        del self._watches[live.id]
        await self._supervisor.close_sandbox(live.id)

    def _unwatch(self, live: Live) -> None:
        if watch := self._watches.pop(live.id, None):
            watch.cancel()

    async def _close(self, live: Live) -> None:
        self._unwatch(live)
        await self._supervisor.close_sandbox(live.id)

    def status(self) -> list[Mapping[str, object]]:
        return list(self.pool.snapshot())
