"""From documents to one SandboxSpec in which nothing has to be looked up any more. Pure, but for `resolve` calling `load`.

How documents are laid over each other, base first: limits, env, template, seccomp, writable and read_only are replaced key
by key; `hidden` and `require` only ever grow, so that no extension can drop a protection in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from fumehood.errors import InvalidInput, PolicyError
from fumehood.model import FileRules, Limits, Mount, SandboxSpec, Template
from fumehood.policy.load import Source, chain
from fumehood.policy.rules import MAX_TOLD, LimitsSection, Policy, TemplateSection, nearest

TEMPLATES: Mapping[str, Template] = {
    "python": Template("python", preload=("IPython",)),
    "data-analysis": Template("data-analysis", preload=("IPython", "numpy", "pandas", "matplotlib.pyplot")),
}
_UNTHROTTLED = ("io_read_bps", "io_write_bps")  # here 0 means "no limit", so it is the greatest value


def resolve(
    policy: Source | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    template: str | Template | None = None,
) -> SandboxSpec:
    """The spec that `policy` (preset name, path, mapping, Policy; None = "default") comes to.

    `overrides` is a document like any policy, laid over the last; `limits` in it may be a model.Limits. `env` is the
    caller's, laid over the policy's. `template` beats the policy's. Raises PolicyError, ProfileError.
    """
    documents = chain("default" if policy is None else policy)
    if overrides:
        if overrides.get("extends") is not None:  # its base would replace the policy that is to be overridden
            raise PolicyError(
                "overrides can't have extends", cause="they are laid over a policy", remediation="name it as the policy"
            )
        documents += chain(overrides)
    spec = settle(documents, template)
    # After the hash: env is bound at claim and may hold secrets, which a published hash would let one guess.
    return replace(spec, env={**spec.env, **Policy(env=dict(env or {})).env})


def settle(documents: Sequence[Policy], template: str | Template | None = None) -> SandboxSpec:
    """Lay `documents` over each other, refuse contradictions, hash what remains. No I/O."""
    limits: dict[str, Any] = {}
    for document in documents:
        limits |= document.limits.model_dump(exclude_none=True)
    spec = SandboxSpec(
        template=_template(template or _last(documents, "template") or "python"),
        limits=Limits(**limits),
        files=_files(documents),
        seccomp=_last(documents, "seccomp"),
        env={k: v for d in documents for k, v in d.env.items()},
        require=frozenset[str]().union(*(d.require for d in documents)),
        policy_name=_last(documents, "name") or "unnamed",
    )
    if faults := list(islice(contradictions(spec), MAX_TOLD)):
        raise PolicyError(
            f"{_origin(documents)}policy {spec.policy_name!r} contradicts itself: " + "; ".join(faults),
            cause="two of its rules can't both hold",
            remediation="drop one rule of each pair named above",
        )
    return replace(spec, policy_hash=digest(spec))


def _origin(documents: Sequence[Policy]) -> str:
    return next((f"{d.origin}: " for d in reversed(documents) if d.origin.startswith("/")), "")


def _last(documents: Sequence[Policy], key: str) -> Any:
    return next((v for d in reversed(documents) if (v := getattr(d, key)) is not None), None)


def _files(documents: Sequence[Policy]) -> FileRules:
    plain = FileRules()
    writable, read_only = plain.writable, plain.read_only
    for files in (d.files for d in documents):
        writable = writable if files.writable is None else files.writable
        read_only = read_only if files.read_only is None else files.read_only
    hidden = dict.fromkeys(path for d in documents for path in d.files.hidden)
    return FileRules(writable, read_only, tuple(hidden))


def _template(wanted: str | Template | TemplateSection) -> Template:
    if isinstance(wanted, Template):
        return wanted
    if isinstance(wanted, TemplateSection):
        if wanted.root is None and wanted.preload is None and not wanted.mounts:
            return _template(wanted.name)
        mounts = tuple(Mount(m.source, m.target, m.writable) for m in wanted.mounts)
        return Template(wanted.name, wanted.root, wanted.preload or (), mounts)
    if wanted not in TEMPLATES:
        raise PolicyError(
            f"no template is named {wanted[:64]!r}; {nearest(wanted, list(TEMPLATES))}",
            cause=f"builtin templates: {', '.join(TEMPLATES)}",
            remediation="use one of them, or describe your own with preload (an image of yours: preload = []), root or mounts",
        )
    return TEMPLATES[wanted]


def contradictions(spec: SandboxSpec) -> Iterator[str]:
    """Each pair of rules of `spec` that can't both hold, in words."""
    limits, files = spec.limits, spec.files
    if limits.timeout_s > limits.lifetime_s:
        yield f"limits.timeout_s {limits.timeout_s:g} is over limits.lifetime_s {limits.lifetime_s:g}"
    if limits.output_bytes > limits.output_kill_bytes:
        yield f"limits.output_bytes {limits.output_bytes} is over limits.output_kill_bytes {limits.output_kill_bytes}"
    for stronger, weaker in (("hidden", "read_only"), ("hidden", "writable"), ("read_only", "writable")):
        for path in getattr(files, weaker):
            if over := next((top for top in getattr(files, stronger) if _lies_in(path, top)), None):
                yield f"files.{weaker} {path} lies in files.{stronger} {over}, which wins"


def _lies_in(path: str, top: str) -> bool:
    """Of plain absolute paths (rules.py). As text: parsing 256 times 256 long pairs kept a server from its other callers."""
    return path == top or path.startswith(f"{top.rstrip('/')}/")


def digest(spec: SandboxSpec) -> str:
    """sha256 (hex) of the canonical form: two policies with the same effect have the same hash, whatever their text."""
    form: dict[str, Any] = {**asdict(spec), "require": sorted(spec.require)}
    del form["policy_hash"], form["policy_name"]
    for key in ("writable", "read_only", "hidden"):
        form["files"][key] = sorted(form["files"][key])
    form["limits"] = {k: float(v) for k, v in form["limits"].items()}  # 30 and 30.0 are one limit
    return hashlib.sha256(json.dumps(form, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tighten(limits: Limits, call: Mapping[str, Any]) -> Limits:
    """`limits` with those of one call laid over, sizes and durations as in a document. A call may only lower (H11).

    Raises PolicyError for an unknown or unreadable limit, InvalidInput for one that is over the sandbox's own.
    """
    wanted: LimitsSection = Policy(limits=dict(call)).limits
    changes = wanted.model_dump(exclude_none=True)
    for name, value in changes.items():
        own = getattr(limits, name)
        if _height(name, value) > _height(name, own):
            raise InvalidInput(
                f"limit {name} = {value:g} is over the sandbox's own {own:g}",
                cause="a call may lower the sandbox's limits, never raise them",
                remediation=f"ask for at most {own:g}, or make a sandbox with a higher {name}",
            )
    return replace(limits, **changes)


def _height(name: str, value: float) -> float:
    return float("inf") if name in _UNTHROTTLED and value == 0 else value
