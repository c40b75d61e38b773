"""What both faces of a Sandbox share: where it is to run, checked words of the caller, and the port once it is open."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from fumehood.client.address import Address
from fumehood.client.engine import Engine
from fumehood.client.listing import server
from fumehood.client.port import Embed, Embedded, Forked, Opening, Port, Terms
from fumehood.client.snapshots import Snapshot, check_count, check_name, check_origin
from fumehood.config import Config
from fumehood.errors import InvalidInput, InvalidTransition, Unsupported
from fumehood.execution import Sinks
from fumehood.live import Live
from fumehood.model import CodeRequest, ExecRequest, Limits, Protection, Result, SandboxSpec, Template, check_id
from fumehood.policy.load import chain
from fumehood.policy.resolve import TEMPLATES, resolve, settle
from fumehood.policy.rules import Policy
from fumehood.records import OnExpiry

PolicyLike = str | Path | Policy | Mapping[str, Any] | None


class Core:
    """No I/O of its own; `opening` says how the port comes about."""

    def __init__(
        self,
        *,
        policy: PolicyLike = None,
        template: str | Template | None = None,
        snapshot: str | None = None,
        limits: Mapping[str, Any] | Limits | None = None,
        env: Mapping[str, str] | None = None,
        tier: str = "auto",
        url: str | None = None,
        api_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        lease_s: float | None = None,
        on_expiry: OnExpiry = "kill",
        auto_resume: bool = False,
        config: Config | None = None,
    ) -> None:
        self._engine = Engine.of_this_process(config)
        self._port: Port | None = None
        terms = Terms(dict(metadata or {}), lease_s, on_expiry, auto_resume)
        limits = asdict(limits) if isinstance(limits, Limits) else dict(limits or {})
        address = Address.of(config or self._engine.supervisor.config, url, api_key)
        check_origin(snapshot, template)
        self._spec: SandboxSpec | None = None
        if address is not None:
            self._opening: Opening = _create(address, policy, template, snapshot, limits, env or {}, tier, terms)
            return
        terms.refuse_without_server()
        chosen = policy if policy is not None else self._engine.supervisor.config.default_policy
        self._spec = resolve(chosen, overrides={"limits": limits} if limits else {}, env=env or {}, template=template)
        self._opening = Embed(self._spec, tier, terms, snapshot, as_kept=policy is None and not limits)

    @classmethod
    def _joining(cls, sandbox_id: str, url: str | None, api_key: str | None) -> Self:
        """Not open yet."""
        from fumehood.client.remote import Join

        engine = Engine.of_this_process()
        return cls._around(engine, Join(server(engine, url, api_key), check_id(sandbox_id, "sandbox id")))

    @classmethod
    def _around(cls, engine: Engine, opening: Opening, port: Port | None = None, spec: SandboxSpec | None = None) -> Self:
        box = cls.__new__(cls)
        box._engine, box._opening, box._port, box._spec = engine, opening, port, spec
        return box

    @property
    def spec(self) -> SandboxSpec:
        """What an embedded sandbox is made of, resolved. A server resolves its own: raises Unsupported for those."""
        if self._spec is None:
            raise Unsupported("the spec of this sandbox is the server's", remediation="see its policy in Sandbox.list()")
        return self._spec

    @property
    def port(self) -> Port:
        if self._engine.pid != os.getpid():
            raise InvalidTransition(
                "this sandbox belongs to the process that forked this one", remediation="make a new one here"
            )
        if self._port is None:
            raise InvalidTransition("this sandbox is not open", remediation="use it inside `with`, or call open() first")
        return self._port

    @property
    def live(self) -> Live:
        """For tests of what lies below. Raises Unsupported for a sandbox of a server."""
        if not isinstance(self.port, Embedded):
            raise Unsupported("this sandbox lives on a server", remediation="use its methods")
        return self.port.live

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def id(self) -> str:
        return self.port.id

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.port.metadata

    @property
    def policy(self) -> str:
        """The name of its policy."""
        return self.port.policy

    @property
    def tier(self) -> str:
        """Where it runs: what `auto` came to."""
        return self.port.tier

    @property
    def protections(self) -> Sequence[Protection]:
        """Each mechanism as it is for this sandbox: enforced, degraded or off."""
        return self.port.protections

    async def _open(self) -> None:
        if self._port is None:
            self._port = await self._opening.open(self._engine)
            if isinstance(self._port, Embedded):
                self._spec = self._port.live.spec  # of a snapshot it may be another

    async def _close(self) -> None:
        if self._port is not None:
            port, self._port = self._port, None
            await port.close()

    def _snapshot(self, metadata: Mapping[str, str] | None) -> Coroutine[Any, Any, Snapshot]:
        return self.port.snapshot(dict(metadata or {}))

    async def _fork(self, count: int) -> list[Self]:
        forks = await self.port.fork(check_count(count))
        return [self._around(self._engine, Forked(), fork, self._spec) for fork in forks]

    def _rollback(self, name: str) -> Coroutine[Any, Any, None]:
        return self.port.rollback(check_name(name))

    def _code(
        self, code: str, language: str, context: str | None, timeout_s: float | None, env: Mapping[str, str] | None
    ) -> Callable[[Sinks], Coroutine[Any, Any, Result]]:
        request = CodeRequest(code, language, context, env or {}, timeout_s)
        return lambda sinks: self.port.run(request, sinks)

    def _program(
        self,
        argv: Sequence[str] | str,
        cwd: str | None,
        env: Mapping[str, str] | None,
        stdin: bytes | None,
        timeout_s: float | None,
    ) -> Callable[[Sinks], Coroutine[Any, Any, Result]]:
        request = ExecRequest(as_argv(argv), env or {}, cwd, stdin, None, timeout_s)
        return lambda sinks: self.port.exec(request, sinks)

    def _extend(self, seconds: float) -> Coroutine[Any, Any, None]:
        if not math.isfinite(seconds):
            raise InvalidInput(f"extend({seconds!r})", cause="not a time", remediation="give a number of seconds")
        return self.port.extend(seconds)


def by_name(policy: str) -> bool:
    """Whether it names a preset and can't be a path: whoever is asked for it opens no file of the asker's choice (H12)."""
    return "/" not in policy and "." not in policy


def as_argv(argv: Sequence[str] | str) -> tuple[str, ...]:
    """A string is a line for bash, as in every shell."""
    return ("/bin/bash", "-c", argv) if isinstance(argv, str) else tuple(argv)


def _create(
    address: Address,
    policy: PolicyLike,
    template: str | Template | None,
    snapshot: str | None,
    limits: dict[str, Any],
    env: Mapping[str, str],
    tier: str,
    terms: Terms,
) -> Opening:
    """Imported late: HTTP costs 0.1 s at import, which nobody pays who embeds."""
    from fumehood.client.remote import Create

    if isinstance(template, Template):
        raise InvalidInput("a Template object can't be sent to a server", remediation="name it, or describe it in the policy")
    given: dict[str, Any] = {"policy": _document(policy), "template": template, "snapshot": snapshot}
    given |= {"limits": limits or None, "env": dict(env) or None}
    kept = {"tier": None if tier == "auto" else tier, "metadata": terms.metadata or None, "lease_s": terms.lease_s}
    asked = {"on_expiry": None if terms.on_expiry == "kill" else terms.on_expiry, "auto_resume": terms.auto_resume or None}
    return Create(address, {name: value for name, value in {**given, **kept, **asked}.items() if value is not None})


def _document(policy: PolicyLike) -> str | dict[str, Any] | None:
    """A preset goes by its name. All else is read and resolved here: a server must not open its callers' paths (H12)."""
    if policy is None or (isinstance(policy, str) and by_name(policy)):
        return policy
    spec = settle(chain(policy))
    own = TEMPLATES.get(spec.template.name) != spec.template
    return {
        "name": spec.policy_name,
        "template": asdict(spec.template) if own else spec.template.name,
        "limits": asdict(spec.limits),
        "files": asdict(spec.files),
        "env": dict(spec.env),
        "require": sorted(spec.require),
        **({"seccomp": spec.seccomp} if spec.seccomp is not None else {}),
    }
