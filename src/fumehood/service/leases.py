"""The leases that live: found by id and tenant, paused, resumed, extended, and ended once, whoever or whatever ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fumehood.config import Config
from fumehood.errors import FumehoodError, InvalidInput, InvalidTransition, NotFound, SandboxGone
from fumehood.lease import Lease
from fumehood.model import SandboxState
from fumehood.records import Caller
from fumehood.store import Store
from fumehood.supervisor import Supervisor

_log = logging.getLogger("fumehood.service")
_REMEMBERED = 4_000  # ended ones, of which their tenant is told why they are gone: 0.3 KiB each

Note = Callable[[Lease, str, dict[str, Any]], None]


class Leases:
    """`note(lease, kind, data)` is told of every change."""

    def __init__(self, config: Config, supervisor: Supervisor, store: Store, note: Note) -> None:
        self._config, self._supervisor, self._store, self._note = config, supervisor, store, note
        self._live: dict[str, Lease] = {}
        self._ending: dict[str, Lease] = {}  # of which the store does not know yet that they ended
        self._ended: OrderedDict[str, tuple[str, str]] = OrderedDict()  # id -> (tenant, cause)
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, lease: Lease) -> None:
        """From here on its life is this object's; before it returns, the store knows of it."""
        self._live[lease.id] = lease
        lease.watch = self._spawn(self._watch(lease))
        self._set_clock(lease)
        try:
            async with lease.moving:  # nobody hears of its end before its start
                await self._store.put_sandbox(lease.record)
                self._note(lease, "sandbox.started", {"tier": lease.tier, "policy": lease.live.spec.policy_name})
        except BaseException:
            await asyncio.shield(self.end(lease, "it could not be recorded"))
            raise

    def get(self, caller: Caller, sandbox_id: str) -> Lease:
        """Raises NotFound, for another tenant's id too, and in the same words; SandboxGone for one's own that ended."""
        lease = self._live.get(sandbox_id)
        if lease is not None and lease.tenant == caller.tenant:
            return lease
        tenant, cause = self._ended.get(sandbox_id, (None, ""))
        if tenant == caller.tenant:
            raise _gone(cause)
        raise NotFound(f"no sandbox {sandbox_id[:40]!r}", remediation="list yours: it may have ended long ago")

    def find(self, sandbox_id: str) -> Lease | None:
        return self._live.get(sandbox_id)

    def of(self, tenant: str | None) -> list[Lease]:
        """Live ones, oldest first. None: of every tenant."""
        return [lease for lease in self._live.values() if tenant in (None, lease.tenant)]

    def known(self, tenant: str) -> dict[str, Lease]:
        """Those of which more is known here than in the store."""
        return {lease.id: lease for lease in (*self._live.values(), *self._ending.values()) if lease.tenant == tenant}

    def count_of_key(self, key_id: str) -> int:
        return sum(lease.key_id == key_id for lease in self._live.values())

    async def awake(self, lease: Lease) -> None:
        """Let traffic in: a paused one with auto_resume goes on, under a new lease. Raises InvalidTransition for any other
        that is paused, since what is frozen answers nobody. While one is copied its traffic waits.
        """
        if not lease.is_paused:
            async with lease.live.still():
                return
        async with lease.moving:
            if lease.auto_resume and lease.live.state is SandboxState.PAUSED:
                await self._resume(lease, lease.lease_s)
            elif lease.is_paused:
                raise InvalidTransition(f"the sandbox is {lease.live.state}", remediation="resume it first")

    @contextlib.asynccontextmanager
    async def held(self, lease: Lease) -> AsyncGenerator[None]:
        """In here it is not paused, resumed, extended or ended. Raises SandboxGone."""
        async with lease.moving:
            if lease.ended.is_set():
                raise _gone(lease.cause)
            yield

    async def pause(self, lease: Lease) -> None:
        """Its lease stands still meanwhile. Raises InvalidTransition, SandboxGone."""
        async with lease.moving:
            await self._pause(lease, max(0.0, lease.end_at - time.time()), "")

    async def _pause(self, lease: Lease, left_s: float, cause: str) -> None:
        await lease.live.pause()
        lease.left_s, lease.paused_at = left_s, time.time()
        await self._moved(lease, lease.paused_at + self._config.paused_lifetime_s, "sandbox.paused", cause)

    async def resume(self, lease: Lease) -> None:
        """With what was left of its lease, or with a new one when nothing was. Raises InvalidTransition, SandboxGone."""
        async with lease.moving:
            await self._resume(lease, lease.left_s or lease.lease_s)

    async def _resume(self, lease: Lease, lease_s: float) -> None:
        await lease.live.resume()
        now = time.time()
        lease.paused_s += now - (lease.paused_at or now)
        await self._moved(lease, min(now + lease_s, self._latest_end(lease)), "sandbox.resumed", "")

    async def _moved(self, lease: Lease, end_at: float, kind: str, cause: str) -> None:
        if lease.ended.is_set():
            raise _gone(lease.cause)
        lease.end_at = end_at
        self._set_clock(lease)
        await self._store.put_sandbox(lease.record)
        self._note(lease, kind, {"cause": cause} if cause else {})

    def _latest_end(self, lease: Lease) -> float:
        return lease.created_at + lease.paused_s + self._config.max_lifetime_s

    async def extend(self, lease: Lease, seconds: float) -> None:
        """It ends in `seconds` from now, sooner or later than before; at once for 0 and less.

        Raises InvalidInput, SandboxGone.
        """
        if not seconds <= self._config.max_lifetime_s:  # nor is it NaN
            raise InvalidInput(
                f"a lease of {seconds:g} s",
                cause=f"this server gives leases of up to {self._config.max_lifetime_s:g} s",
                remediation="extend it while it is needed",
            )
        if seconds <= 0:
            await self._expire(lease, None)
            return
        async with lease.moving:
            if lease.ended.is_set():
                raise _gone(lease.cause)
            lease.lease_s, lease.left_s = seconds, seconds
            if not lease.is_paused:
                lease.end_at = min(time.time() + seconds, self._latest_end(lease))
                self._set_clock(lease)
            await self._store.put_sandbox(lease.record)

    async def end(self, lease: Lease, cause: str) -> None:
        """Once: the first cause stays. Returns when every process and every resource of it is gone, to all who asked for it;
        cancelling one of them ends the waiting only.
        """
        if lease.ending is None:
            lease.ended_at, lease.cause = time.time(), cause
            lease.ended.set()
            self._forget(lease)
            self._ending[lease.id] = lease
            lease.ending = self._spawn(self._take_down(lease))
        await asyncio.shield(lease.ending)

    def end_soon(self, lease: Lease, cause: str) -> None:
        """The same, not waited for."""
        self._spawn(self.end(lease, cause))

    async def _take_down(self, lease: Lease) -> None:
        try:
            async with lease.moving:
                await lease.live.kill(lease.cause)
            await self._supervisor.close_sandbox(lease.id)
        except FumehoodError:
            _log.exception("a sandbox could not be taken down", extra={"sandbox_id": lease.id})
        finally:
            lease.give_back()
            self._note(lease, "sandbox.stopped", {"cause": lease.cause})
            try:
                with contextlib.suppress(NotFound):  # the very write that began it may have failed
                    await self._store.end_sandbox(lease.id, lease.cause)
            finally:
                del self._ending[lease.id]

    def _forget(self, lease: Lease) -> None:
        if lease.timer is not None:
            lease.timer.cancel()
        if lease.watch is not None and lease.watch is not asyncio.current_task():
            lease.watch.cancel()
        self._live.pop(lease.id, None)
        self._ended[lease.id] = lease.tenant, lease.cause
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    async def _watch(self, lease: Lease) -> None:
        await lease.live.wait_dead()
        await self.end(lease, lease.live.gone_because or "all of its processes ended")

    def _set_clock(self, lease: Lease) -> None:
        if lease.timer is not None:
            lease.timer.cancel()
        due, loop = lease.end_at, asyncio.get_running_loop()
        lease.timer = loop.call_later(max(0.0, due - time.time()), lambda: self._spawn(self._expire(lease, due)))

    async def _expire(self, lease: Lease, due: float | None) -> None:
        async with lease.moving:
            if lease.ended.is_set() or due not in (None, lease.end_at):
                return  # while this waited it was extended, paused or resumed, and has another end
            over = "its paused time is over" if lease.is_paused else "its lease is over"
            if lease.on_expiry == "pause" and not lease.is_paused:
                try:
                    return await self._pause(lease, 0.0, over)
                except FumehoodError as e:
                    _log.warning("can't pause at the end of the lease, so it ends: %s", e, extra={"sandbox_id": lease.id})
        await self.end(lease, over)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the end of a lease failed", exc_info=error)

    async def aclose(self, cause: str) -> None:
        while self._live or self._tasks:  # what is made meanwhile ends too
            for lease in self.of(None):
                self._spawn(self.end(lease, cause))
            await asyncio.wait(set(self._tasks))


def _gone(cause: str) -> SandboxGone:
    return SandboxGone("the sandbox ended", cause=cause, remediation="create a new sandbox")
