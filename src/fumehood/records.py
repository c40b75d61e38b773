"""The nouns of the service: who calls, what is leased to whom, what is kept. Frozen, no I/O. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fumehood.model import Status

Scope = Literal["sandboxes", "admin"]
SCOPES: tuple[Scope, ...] = ("sandboxes", "admin")
OnExpiry = Literal["kill", "pause"]
ExecutionKind = Literal["code", "exec"]
ExecutionState = Literal["queued", "running", "done"]
SnapshotState = Literal["making", "ready", "gone"]


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may do at once. 0 = the server's own limit is the only one."""

    requests_per_s: float = 200.0
    burst: int = 400
    concurrent_requests: int = 256
    sandboxes: int = 0
    priority: int = 0  # -10 (last) to 10 (first); a request may lower it, never raise it


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept: `digest` is the SHA-256 (hex) of its secret part, which is nowhere kept.

    `compat` holds the E2B compatibility switches of docs/e2b.md; every one of them is off by default.
    """

    id: str
    tenant: str
    digest: str
    scopes: frozenset[str]
    name: str = ""
    limits: KeyLimits = KeyLimits()
    compat: frozenset[str] = frozenset()
    created_at: float = 0.0
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever a request was authenticated as."""

    tenant: str
    key_id: str
    scopes: frozenset[str] = frozenset(SCOPES)
    limits: KeyLimits = KeyLimits()
    compat: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    """The history of one sandbox. `state` is a SandboxState; `cause` says why it ended."""

    id: str
    tenant: str
    key_id: str
    template: str
    tier: str
    policy: str
    state: str
    created_at: float
    end_at: float  # of the lease
    on_expiry: OnExpiry = "kill"
    auto_resume: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    ended_at: float | None = None
    cause: str = ""


@dataclass(frozen=True, slots=True)
class ExecutionRecord:
    """One execution: exactly one record, whatever happens (`kill -9` included). `result` is the Result as JSON text, once done.

    An execution that a killed server left behind is found as `done`, with status `killed` and the cause.
    """

    id: str
    sandbox_id: str
    tenant: str
    kind: ExecutionKind
    state: ExecutionState
    queued_at: float
    started_at: float | None = None
    finished_at: float | None = None
    status: Status | None = None
    cause: str = ""
    result: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A copy of a whole sandbox. `spec` is what the next one from it is made with, as JSON text (service/spec_json.py).

    `making`: its files may be there in part, `size_bytes` is what it may come to; `gone`: the files were lost.
    """

    id: str
    tenant: str
    key_id: str
    sandbox_id: str
    tier: str
    template: str
    policy: str
    policy_hash: str
    spec: str
    state: SnapshotState
    created_at: float
    size_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class EventRecord:
    """Something that happened, for one tenant. `seq` grows by one for each, over all tenants."""

    seq: int
    tenant: str
    sandbox_id: str
    at: float
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class IdempotentReply:
    """The answer that an idempotency key got. `body_digest` tells a repetition from another request under the same key."""

    tenant: str
    key: str
    body_digest: str
    status: int  # 0 while the first request is still being answered
    body: str = ""
    created_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a killed server had left alive, by count: each is ended now."""

    sandboxes: int = 0
    executions: int = 0
    replies: int = 0
