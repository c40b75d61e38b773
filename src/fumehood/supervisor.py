"""Creates, finds and ends live sandboxes: where a resolved spec meets the runtime of its tier.

Embedded, one supervisor runs in a background loop of the caller's process (client/engine.py); served, it runs behind
service.py and the gateway. It executes no guest byte and follows no guest path.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import time
from collections.abc import Callable, Mapping

from fumehood.config import Config
from fumehood.errors import InvalidInput, NotFound
from fumehood.live import Live
from fumehood.model import SandboxSpec, SandboxState, move
from fumehood.runtime.base import Runtime
from fumehood.runtime.link import Link
from fumehood.runtime.tiers import Choice, choose

_log = logging.getLogger("fumehood")


class Supervisor:
    """Creates, finds and ends sandboxes. `tiers`: how to make the runtime of each, on first use."""

    def __init__(self, config: Config, tiers: Mapping[str, Callable[[Config], Runtime]]) -> None:
        self.config, self._tiers = config, tiers
        self._runtimes: dict[str, Runtime] = {}
        self._live: dict[str, Live] = {}

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

    async def create(self, spec: SandboxSpec, tier: str = "auto") -> Live:
        """A ready sandbox that ends after its `lifetime_s`. Raises what Runtime.start raises; nothing is left behind then."""
        live = await self.make(spec, tier)
        live.expire_after(spec.limits.lifetime_s)
        return live

    async def make(self, spec: SandboxSpec, tier: str = "auto") -> Live:
        """The same, without an end: its owner keeps the time."""
        started = time.monotonic()
        live = Live("s" + secrets.token_hex(8), spec)
        async with contextlib.AsyncExitStack() as undo:
            live.handle = await self.runtime(tier).start(spec, live.id, live.note)
            undo.push_async_callback(live.handle.aclose)
            live.link = Link(*await live.handle.connect())
            # Before the handle: a channel closed under its transport leaves the loop watching a number that is reused.
            undo.push_async_callback(live.link.aclose)
            await live.link.start(self.config.agent_timeout_s)
            if (identity := live.handle.identity(spec)) or spec.env:
                await live.link.call("bind", env=dict(spec.env), **identity)
            undo.pop_all()
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
        for sandbox_id in list(self._live):
            await self.close_sandbox(sandbox_id)
        for runtime in self._runtimes.values():
            await runtime.aclose()
