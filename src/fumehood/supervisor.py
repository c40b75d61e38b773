"""Creates, finds, copies and ends live sandboxes: where a resolved spec meets the runtime of its tier.

Embedded, one supervisor runs in a background loop of the caller's process (client/engine.py); served, it runs behind
service.py and the gateway. It executes no guest byte and follows no guest path.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fumehood.config import Config
from fumehood.errors import AgentUnresponsive, InvalidInput, NotFound, SandboxGone, Unsupported
from fumehood.live import Live
from fumehood.model import SandboxSpec, SandboxState, move
from fumehood.runtime.base import Handle, Runtime, SnapshotFacts, Snapshots
from fumehood.runtime.link import Link
from fumehood.runtime.tiers import Choice, choose

_log = logging.getLogger("fumehood")
T = TypeVar("T")
MAX_FORKS = 64  # of one sandbox at once


class Supervisor:
    """Creates, finds and ends sandboxes. `tiers`: how to make the runtime of each, on first use."""

    def __init__(self, config: Config, tiers: Mapping[str, Callable[[Config], Runtime]]) -> None:
        self.config, self._tiers = config, tiers
        self._runtimes: dict[str, Runtime] = {}
        self._live: dict[str, Live] = {}
        self._closed = False
        # At once. The disk is the bound; and each holds a thread of the loop's pool, in which its monitor needs others.
        self._snapshots_at_once = asyncio.Semaphore(2)

    @functools.cached_property
    def choice(self) -> Choice:
        """What `auto` is as long as this lives: what is proven meanwhile counts for the next."""
        found = choose(self.config)
        if found.weaker:
            _log.warning("%s", found.weaker)
        return found

    def runtime(self, tier: str) -> Runtime:
        """`auto` is the strongest tier here that was proved to work; a named one is that one or an error, never a weaker."""
        name = self.choice.tier if tier == "auto" else tier
        if name not in self._tiers:
            known = ", ".join(["auto", *self._tiers])
            raise InvalidInput(f"unknown tier: {tier!r}", cause=f"this build has: {known}", remediation="pick one of them")
        if name not in self._runtimes:
            self._runtimes[name] = self._tiers[name](self.config)
        return self._runtimes[name]

    def copying(self, tier: str) -> Snapshots:
        """Its runtime, if it can copy live sandboxes. Raises Unsupported, and what `runtime` raises."""
        runtime = self.runtime(tier)
        if not isinstance(runtime, Snapshots):
            raise Unsupported(
                "this sandbox can't be copied as a whole",
                cause=f"the tier {runtime.tier} has no snapshots of memory and processes",
                remediation="use the tier firecracker or qemu; every tier has checkpoint and rollback of a context",
            )
        return runtime

    async def create(self, spec: SandboxSpec, tier: str = "auto") -> Live:
        """A ready sandbox that ends after its `lifetime_s`. Raises what Runtime.start raises; nothing is left behind then."""
        return _timed(await self.make(spec, tier))

    async def make(self, spec: SandboxSpec, tier: str = "auto") -> Live:
        """The same, without an end: its owner keeps the time."""
        runtime = self.runtime(tier)
        return await self._begun(self._new(spec, runtime.tier), lambda live: runtime.start(spec, live.id, live.note))

    # -- copies

    async def snapshot(self, live: Live, snapshot_id: str | None = None) -> SnapshotFacts:
        """All of a sandbox in which nothing runs; it goes on, paused if it was, and whoever follows something in it has to
        attach again. Raises Unsupported, InvalidTransition, CapacityExceeded, SetupFailed, SandboxGone; then nothing is kept.
        """
        runtime, name = self.copying(live.tier), snapshot_id or "p" + secrets.token_hex(8)
        async with self._snapshots_at_once, contextlib.AsyncExitStack() as undo:
            facts = await _whole(_taken(live, runtime, name, undo))
            undo.pop_all()
        return facts

    async def restore(self, snapshot_id: str, spec: SandboxSpec, tier: str = "auto", *, timed: bool = True) -> Live:
        """A new sandbox that goes on from it. `timed`: it ends after its `lifetime_s`. Raises as `snapshot`, and NotFound."""
        runtime = self.copying(tier)
        new = self._new(spec, self.runtime(tier).tier)
        live = await self._begun(new, lambda live: runtime.restore(snapshot_id, spec, live.id, live.note))
        return _timed(live) if timed else live

    async def fork(self, live: Live, count: int, *, timed: bool = True) -> list[Live]:
        """So many new sandboxes that go on from where `live` is, all or none. Raises as `snapshot`, and InvalidInput."""
        if not 1 <= count <= MAX_FORKS:
            raise InvalidInput(f"{count} forks", cause=f"from 1 to {MAX_FORKS} at once", remediation="ask for so many")
        runtime, started = self.copying(live.tier), time.monotonic()
        forks = [self._new(live.spec, live.tier) for _ in range(count)]
        async with contextlib.AsyncExitStack() as undo:
            await _whole(self._copy(live, runtime, forks, undo))
            await self._join_all(forks, undo)
            undo.pop_all()
        for fork in forks:
            self._keep(_timed(fork) if timed else fork, started)
        return forks

    async def rollback(self, live: Live, snapshot_id: str) -> None:
        """`live` goes on from that snapshot, under its own id and paused if it was; what runs in it is killed. The old
        machine goes on until the new one is ready, and stays when that fails. Raises as `restore`.
        """
        runtime = self.copying(live.tier)
        async with live.still(), contextlib.AsyncExitStack() as undo:
            handle = await runtime.restore(snapshot_id, live.spec, live.id, live.note)
            undo.push_async_callback(handle.aclose)
            link = await self._bound(handle, live.spec, undo)
            if live.is_paused:
                await handle.pause()
            live.check_alive()
            undo.pop_all()
            await _whole(live.replace(handle, link, f"the sandbox was rolled back to {snapshot_id}"))

    def snapshots(self, tier: str = "auto") -> list[SnapshotFacts]:
        """Of one tier, whoever made them. Raises Unsupported."""
        return self.copying(tier).snapshots()

    async def discard(self, snapshot_id: str, tier: str = "auto") -> None:
        """Sandboxes that run from it go on. Raises NotFound, Unsupported."""
        await self.copying(tier).discard(snapshot_id)

    async def _copy(self, live: Live, runtime: Snapshots, forks: Sequence[Live], undo: contextlib.AsyncExitStack) -> None:
        by_id = {fork.id: fork for fork in forks}
        async with live.copied():
            handles = await runtime.fork(live.handle, live.spec, list(by_id), lambda name, event: by_id[name].note(event))
            for handle in handles:
                undo.push_async_callback(handle.aclose)
                by_id[handle.sandbox_id].handle = handle

    async def _join_all(self, forks: Sequence[Live], undo: contextlib.AsyncExitStack) -> None:
        """A few at a time: each agent has its timeout from when it is asked, and there are only so many processors."""
        turns = asyncio.Semaphore(os.cpu_count() or 1)

        async def join(fork: Live) -> None:
            async with turns:
                fork.link = await self._bound(fork.handle, fork.spec, undo)

        for outcome in await asyncio.gather(*map(join, forks), return_exceptions=True):
            if outcome is not None:
                raise outcome

    # -- one by one

    def _new(self, spec: SandboxSpec, tier: str) -> Live:
        return Live("s" + secrets.token_hex(8), spec, tier, self._linked)

    async def _begun(self, live: Live, start: Callable[[Live], Awaitable[Handle]]) -> Live:
        started = time.monotonic()
        async with contextlib.AsyncExitStack() as undo:
            try:
                live.handle = await start(live)
            except OSError as e:
                if self._closed:  # and what it starts from was taken away meanwhile
                    raise SandboxGone("the sandbox was not made", cause="its supervisor was closed") from e
                raise
            undo.push_async_callback(live.handle.aclose)
            live.link = await self._bound(live.handle, live.spec, undo)
            undo.pop_all()
        return self._keep(live, started)

    async def _bound(self, handle: Handle, spec: SandboxSpec, undo: contextlib.AsyncExitStack) -> Link:
        """Its agent has spoken, and knows whose it is."""
        link = await self._linked(handle)
        # Before the handle: a channel closed under its transport leaves the loop watching a number that is reused.
        undo.push_async_callback(link.aclose)
        if (identity := handle.identity(spec)) or spec.env:
            await link.call("bind", env=dict(spec.env), **identity)
        return link

    async def _linked(self, handle: Handle) -> Link:
        timeout_s = self.config.agent_timeout_s * handle.patience
        try:
            async with asyncio.timeout(timeout_s):
                link = Link(*await handle.connect())
        except TimeoutError:
            raise AgentUnresponsive(f"the sandbox took no connection within {timeout_s:g} s") from None
        try:
            await link.start(timeout_s, greeted=handle.greeted)
        except BaseException:
            await link.aclose()
            raise
        return link

    def _keep(self, live: Live, started: float) -> Live:
        live.create_ms = (time.monotonic() - started) * 1e3
        live.state = move(live.state, SandboxState.READY)
        self._live[live.id] = live
        return live

    def get(self, sandbox_id: str) -> Live:
        try:
            return self._live[sandbox_id]
        except KeyError:
            raise NotFound(f"no sandbox {sandbox_id[:40]!r}", remediation="it may have ended; list them") from None

    async def close_sandbox(self, sandbox_id: str) -> None:
        if live := self._live.pop(sandbox_id, None):
            await live.close()

    async def aclose(self) -> None:
        """All of it, whatever one of them raises."""
        self._closed = True
        async with contextlib.AsyncExitStack() as undo:
            for runtime in self._runtimes.values():
                undo.push_async_callback(runtime.aclose)
            for sandbox_id in list(self._live):
                undo.push_async_callback(self.close_sandbox, sandbox_id)


def _timed(live: Live) -> Live:
    live.expire_after(live.spec.limits.lifetime_s)
    return live


async def _taken(live: Live, runtime: Snapshots, snapshot_id: str, undo: contextlib.AsyncExitStack) -> SnapshotFacts:
    async with live.copied():
        facts = await runtime.snapshot(live.handle, snapshot_id)
        undo.push_async_callback(runtime.discard, snapshot_id)
    return facts


async def _whole(work: Coroutine[Any, Any, T]) -> T:
    """Cancelling whoever waits here takes effect once `work`, which must not stop half way, is over."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # so that it counts as seen
        raise
