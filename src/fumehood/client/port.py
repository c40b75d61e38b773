"""What a Sandbox talks to: one in this process (Embedded, here) or one behind a server (Remote, remote.py).

All of it runs in the engine's loop. Files, contexts and processes speak the verbs of docs/wire.md through a Link and
don't know which of the two it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fumehood.agent import wire
from fumehood.client.engine import Engine
from fumehood.client.snapshots import Snapshot, is_checkpoint, of_this_host
from fumehood.errors import InvalidInput, InvalidTransition
from fumehood.execution import Sinks
from fumehood.live import Live
from fumehood.model import CodeRequest, ExecRequest, Protection, Result, SandboxSpec
from fumehood.records import OnExpiry
from fumehood.runtime.base import Stats


class Stream(Protocol):
    """One exchange: iterate for DATA and EVENT frames; then `ok` holds what it came to. Raises what ended it otherwise."""

    ok: dict[str, Any]

    def __aiter__(self) -> AsyncIterator[wire.Frame]: ...
    async def result(self) -> dict[str, Any]: ...
    async def send(self, data: bytes) -> None: ...
    async def close_input(self) -> None: ...
    async def cancel(self) -> None: ...


class Link(Protocol):
    async def open(self, verb: str, **arguments: Any) -> Stream: ...
    async def call(self, verb: str, **arguments: Any) -> dict[str, Any]: ...
    def checked_json(self, frame: wire.Frame) -> dict[str, Any]: ...


class Port(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def link(self) -> Link: ...
    @property
    def protections(self) -> Sequence[Protection]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def policy(self) -> str: ...
    @property
    def tier(self) -> str: ...
    async def run(self, request: CodeRequest, sinks: Sinks) -> Result: ...
    async def exec(self, request: ExecRequest, sinks: Sinks) -> Result: ...
    async def checkpoint(self, context: str | None) -> str: ...
    async def snapshot(self, metadata: Mapping[str, str]) -> Snapshot: ...
    async def fork(self, count: int) -> list[Port]: ...
    async def rollback(self, name: str) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def stats(self) -> Stats: ...
    async def extend(self, seconds: float) -> None: ...
    async def kill(self) -> None: ...
    async def close(self) -> None: ...


class Opening(Protocol):
    """How a Port comes about: with the words of the caller already checked, so that opening it is only doing."""

    async def open(self, engine: Engine) -> Port: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What a server keeps for a sandbox. `lease_s` None = as the server's policy has it."""

    metadata: Mapping[str, str]
    lease_s: float | None = None
    on_expiry: OnExpiry = "kill"
    auto_resume: bool = False

    def refuse_without_server(self) -> None:
        asked = {"lease_s": self.lease_s is not None, "on_expiry": self.on_expiry != "kill", "auto_resume": self.auto_resume}
        for name in (n for n, given in asked.items() if given):
            raise InvalidInput(
                f"{name} needs a server",
                cause="this sandbox is to run in this process, which keeps no leases",
                remediation="pass url=, or leave it out: limits={'lifetime_s': ...} bounds an embedded sandbox",
            )


@dataclass(frozen=True, slots=True)
class Embed:
    """Opens a sandbox of this process. `as_kept`: no limits or policy were given, so those of the snapshot hold."""

    spec: SandboxSpec
    tier: str
    terms: Terms
    snapshot: str | None = None
    as_kept: bool = True

    async def open(self, engine: Engine) -> Port:
        supervisor = engine.supervisor
        if self.snapshot is None:
            live = await supervisor.create(self.spec, self.tier)
        else:
            live = await supervisor.restore(self.snapshot, self._spec_of(engine, self.snapshot), self.tier)
        return Embedded(engine, live, self.terms.metadata, supervisor.runtime(self.tier).tier)

    def _spec_of(self, engine: Engine, snapshot: str) -> SandboxSpec:
        if not self.as_kept or snapshot not in engine.kept_specs:
            return self.spec
        kept = engine.kept_specs[snapshot]
        return replace(kept, env={**kept.env, **self.spec.env})


class Forked:
    """The opening of a fork, which was open from the start."""

    async def open(self, engine: Engine) -> Port:
        raise InvalidTransition(
            "this fork was closed", cause="it can not be made a second time", remediation="fork the first one again"
        )


class Embedded:
    def __init__(self, engine: Engine, live: Live, metadata: Mapping[str, str], tier: str) -> None:
        self._engine, self.live, self.metadata, self.tier = engine, live, metadata, tier

    @property
    def id(self) -> str:
        return self.live.id

    @property
    def link(self) -> Link:
        return self.live.link

    @property
    def protections(self) -> Sequence[Protection]:
        return self.live.handle.protections

    @property
    def policy(self) -> str:
        return self.live.spec.policy_name

    async def run(self, request: CodeRequest, sinks: Sinks) -> Result:
        return await self.live.run(request, sinks)

    async def exec(self, request: ExecRequest, sinks: Sinks) -> Result:
        return await self.live.exec(request, sinks)

    async def checkpoint(self, context: str | None) -> str:
        return await self.live.checkpoint(context)

    async def snapshot(self, metadata: Mapping[str, str]) -> Snapshot:
        if metadata:
            raise InvalidInput(
                "metadata of a snapshot needs a server",
                cause="this sandbox runs in this process, which keeps none",
                remediation="pass url= to Sandbox, or leave it out",
            )
        kept = await self._engine.supervisor.snapshot(self.live)
        self._engine.kept_specs[kept.id] = self.live.spec
        return of_this_host(kept)

    async def fork(self, count: int) -> list[Port]:
        forks = await self._engine.supervisor.fork(self.live, count)
        return [Embedded(self._engine, fork, self.metadata, self.tier) for fork in forks]

    async def rollback(self, name: str) -> None:
        if is_checkpoint(name):
            await self.live.rollback(name)
        else:
            await self._engine.supervisor.rollback(self.live, name)

    async def pause(self) -> None:
        await self.live.pause()

    async def resume(self) -> None:
        await self.live.resume()

    async def stats(self) -> Stats:
        return self.live.handle.stats()

    async def extend(self, seconds: float) -> None:
        self.live.expire_after(seconds)

    async def kill(self) -> None:
        await self.live.kill()

    async def close(self) -> None:
        await self._engine.supervisor.close_sandbox(self.live.id)
