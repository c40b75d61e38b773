"""What a caller asks for, checked against what this server lets callers have. Nothing here opens a path (H12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from fumehood.agent.wire import table
from fumehood.config import TIERS, Config
from fumehood.errors import Forbidden, InvalidInput, PolicyError
from fumehood.model import GIB, MIB, Limits, SandboxSpec
from fumehood.policy.load import preset_names
from fumehood.policy.resolve import digest, resolve
from fumehood.policy.rules import Policy
from fumehood.records import Caller, OnExpiry, SnapshotRecord
from fumehood.service import spec_json

PolicyAsk = str | Mapping[str, Any] | None
# What one sandbox of a caller who is no admin may ask for at most. What is missing here is bounded by the admission
# (memory and swap, and with them the disk, which is memory) or harms nobody but its own sandbox. Output is held by the server.
CEILINGS: Mapping[str, float] = {
    "pids": 4_096, "output_bytes": 16 * MIB, "output_kill_bytes": 16 * GIB, "open_files": 65_536,
    "cpu_weight": 100,  # what everybody has: more would be taken from the neighbours
}  # fmt: skip

MAX_VALUES = 8_192  # of a policy, nested ones too
MAX_METADATA_CHARS = 16_384
_NO_FILES = "a server opens no files for its callers"


@dataclass(frozen=True, slots=True)
class CreateAsk:
    """A sandbox as a caller describes it. `wait_s`: how long it may wait for its place, from now; None = the server's bound."""

    policy: PolicyAsk = None
    template: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict[str, Any])
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    tier: str = "auto"
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    lease_s: float | None = None
    on_expiry: OnExpiry = "kill"
    auto_resume: bool = False
    priority: int = 0
    wait_s: float | None = None
    snapshot: str | None = None  # to go on from; it has its template, tier, policy and limits


@dataclass(frozen=True, slots=True)
class Kind:
    """What sandboxes have in common that can stand for each other: the class of the warm pool.

    `spec` is without what is bound at the claim: env, and the limits that the runtime can still change. Those that go on
    from a `snapshot` are never warm.
    """

    name: str
    tier: str
    digest: str
    spec: SandboxSpec = field(compare=False, repr=False)
    snapshot: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.tier}"


def kind_of(spec: SandboxSpec, tier: str, late_limits: frozenset[str]) -> Kind:
    plain = Limits()
    bare = replace(spec, env={}, limits=replace(spec.limits, **{name: getattr(plain, name) for name in late_limits}))
    name = spec.policy_name if spec.template.name == "python" else f"{spec.policy_name}/{spec.template.name}"
    return Kind(name, tier, digest(bare), bare)


class Asks:
    """Resolves asks under one config. `late_limits(tier)`: what the tier's runtime can bind late."""

    def __init__(self, config: Config, late_limits: Callable[[str], frozenset[str]]) -> None:
        self._config, self._late_limits = config, late_limits
        self._named = lru_cache(1_024)(self._resolve_named)  # agents ask for the same again and again: 0.5 ms each

    def resolve(self, caller: Caller, ask: CreateAsk) -> tuple[SandboxSpec, Kind]:
        """Raises PolicyError, InvalidInput, Forbidden."""
        tier = self._tier(ask.tier)
        if ask.policy is None or isinstance(ask.policy, str):
            if wrong := [n for n, v in ask.limits.items() if isinstance(v, bool) or not isinstance(v, int | float | str)]:
                raise PolicyError(f"policy refused: limits.{wrong[0]}: no amount", remediation="see docs/policy.md")
            # The type too: 1.0 equals 1, and may be wrong where 1 is not.
            limits = frozenset((name, value, type(value).__name__) for name, value in ask.limits.items())
            spec, kind = self._named(ask.policy, ask.template, limits, tier)
        else:
            spec = resolve(_safe(caller, ask.policy), overrides=_laid_over(ask.limits), template=ask.template)
            kind = kind_of(spec, tier, self._late_limits(tier))
        _within(caller, spec.limits, self._config)
        check_labels(ask.metadata)
        return (replace(spec, env={**spec.env, **Policy(env=dict(ask.env)).env}) if ask.env else spec), kind

    def restored(self, caller: Caller, ask: CreateAsk, snapshot: SnapshotRecord) -> tuple[SandboxSpec, Kind]:
        """The same for a sandbox that goes on from a snapshot: what is in its memory can't be chosen any more, but for env."""
        spec = spec_json.from_text(snapshot.spec)
        limits: Mapping[str, Any] = Policy(limits=dict(ask.limits)).limits.model_dump(exclude_none=True)
        _check_kept(snapshot, {name: (value, getattr(spec.limits, name)) for name, value in limits.items()})
        tier = None if ask.tier == "auto" else ask.tier
        kept = {"template": (ask.template, snapshot.template), "policy": (ask.policy, snapshot.policy)}
        _check_kept(snapshot, {"tier": (tier, snapshot.tier), **kept})
        _within(caller, spec.limits, self._config)
        check_labels(ask.metadata)
        kind = Kind(snapshot.policy, snapshot.tier, snapshot.policy_hash, spec, snapshot.id)
        return (replace(spec, env={**spec.env, **Policy(env=dict(ask.env)).env}) if ask.env else spec), kind

    def lease_s(self, ask: CreateAsk, spec: SandboxSpec) -> float:
        """Raises InvalidInput for one that this server does not give."""
        lease_s = spec.limits.lifetime_s if ask.lease_s is None else ask.lease_s
        if not 0 < lease_s <= self._config.max_lifetime_s:
            raise InvalidInput(
                f"lease_s = {lease_s:g}",
                cause=f"this server gives leases of up to {self._config.max_lifetime_s:g} s",
                remediation="ask for less, and extend it while it is needed",
            )
        return lease_s

    def _tier(self, asked: str) -> str:
        own = self._config.tier
        if asked not in TIERS:
            raise InvalidInput(f"unknown tier: {asked[:32]!r}", cause=f"known: {', '.join(TIERS)}", remediation="name one")
        if asked == "fake" and own != "fake":
            raise Forbidden(
                "the fake tier isolates nothing", cause="this server is not set to it", remediation="leave tier out"
            )
        return own if asked == "auto" else asked

    def _resolve_named(
        self, policy: str | None, template: str | None, limits: frozenset[tuple[str, Any, str]], tier: str
    ) -> tuple[SandboxSpec, Kind]:
        if policy is not None:
            _preset(policy)
        named = self._config.default_policy if policy is None else policy
        spec = resolve(named, overrides=_laid_over({name: value for name, value, _ in limits}), template=template)
        return spec, kind_of(spec, tier, self._late_limits(tier))


def _laid_over(limits: Mapping[str, Any]) -> dict[str, Any]:
    return {"limits": dict(limits)} if limits else {}


def _preset(name: str) -> None:
    if name not in preset_names():
        raise PolicyError(
            f"no preset is named {name[:64]!r}; known: {', '.join(preset_names())}",
            cause=_NO_FILES,
            remediation="name a preset, or send the policy itself",
        )


def _safe(caller: Caller, policy: Mapping[str, Any]) -> dict[str, Any]:
    """What names files of the server's host is for nobody. What loosens the box, or shows the host in it, is for admins."""
    _check_size(policy)
    document = dict(policy)
    if document.get("extends") is not None:
        _preset(str(document["extends"]))
    if isinstance(document.get("seccomp"), str):
        raise PolicyError(
            "seccomp: a path", cause="a server opens no files for its callers", remediation="send the profile itself"
        )
    own = sorted(table(document.get("template")).keys() - {"name"})
    if document.get("seccomp") is not None:
        own.append("seccomp")
    if own and "admin" not in caller.scopes:
        raise Forbidden(
            f"this key may not set {', '.join(own)}",
            cause="they show the host's files in a sandbox, run as the server at preload, or replace its system call filter",
            remediation="leave them out, or use a key with the scope admin",
        )
    return document


def _check_size(policy: Mapping[str, Any]) -> None:
    """Whoever's it is: megabytes of wrong keys are looked at for ten seconds, in the one loop that everybody shares."""
    n_values, waiting = 0, list[Any]([policy])
    while waiting and n_values <= MAX_VALUES:
        value = waiting.pop()
        n_values += 1
        if isinstance(value, Mapping | list):
            waiting += value.values() if isinstance(value, Mapping) else value  # pyright: ignore[reportUnknownMemberType]
    if n_values > MAX_VALUES:
        raise PolicyError("the policy is too large", cause=f"it has over {MAX_VALUES} values", remediation="send a smaller one")


def _check_kept(snapshot: SnapshotRecord, words: Mapping[str, tuple[object, object]]) -> None:
    """Name -> what is asked, what it is."""
    for name, (asked, kept) in words.items():
        if asked not in (None, kept):
            raise InvalidInput(
                f"a snapshot keeps its {name}",
                cause=f"that of {snapshot.id} is {kept}",
                remediation="leave it out, or create a sandbox without the snapshot",
            )


def check_labels(metadata: Mapping[str, str]) -> None:
    """Raises InvalidInput."""
    if (size := sum(len(name) + len(value) for name, value in metadata.items())) > MAX_METADATA_CHARS:
        raise InvalidInput(
            f"the metadata has {size} characters",
            cause=f"at most {MAX_METADATA_CHARS} are kept, for they are listed a thousand sandboxes at once",
            remediation="keep what is large elsewhere, under the sandbox's id",
        )


def _within(caller: Caller, limits: Limits, config: Config) -> None:
    if "admin" in caller.scopes:
        return
    ceilings = {**CEILINGS, "lifetime_s": config.max_lifetime_s, "timeout_s": config.max_lifetime_s}
    for name, ceiling in ceilings.items():
        if getattr(limits, name) > ceiling:
            raise InvalidInput(
                f"limit {name} = {getattr(limits, name):g} is more than this server gives",
                cause=f"at most {ceiling:g}",
                remediation="ask for less",
            )
