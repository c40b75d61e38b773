"""The shapes of answers, for /openapi.json alone: what is sent is made of the records themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from fumehood.model import Result
from fumehood.records import OnExpiry


class Problem(BaseModel):
    """RFC 9457, with what fumehood knows beside."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    message: str
    cause: str
    remediation: str
    retryable: bool
    request_id: str
    details: dict[str, Any] = {}


class Sandbox(BaseModel):
    id: str
    tenant: str
    key_id: str
    template: str
    tier: str
    policy: str
    state: str
    created_at: float
    end_at: float
    on_expiry: OnExpiry
    auto_resume: bool
    metadata: dict[str, str]
    ended_at: float | None
    cause: str


class Opened(Sandbox):
    protections: list[dict[str, Any]] = []
    limits: dict[str, float] = {}


class Sandboxes(BaseModel):
    sandboxes: list[Sandbox]
    next: str | None


class Forks(BaseModel):
    sandboxes: list[Sandbox]


class Snapshot(BaseModel):
    id: str
    sandbox_id: str
    tier: str
    template: str
    created_at: float
    size_bytes: int
    metadata: dict[str, str]


class Snapshots(BaseModel):
    snapshots: list[Snapshot]
    next: str | None


class Execution(BaseModel):
    id: str
    sandbox_id: str
    tenant: str
    kind: str
    state: str
    queued_at: float
    started_at: float | None
    finished_at: float | None
    status: str | None
    cause: str
    result: Result | None = None


class Executions(BaseModel):
    executions: list[Execution]
    next: str | None


class Entry(BaseModel):
    name: str
    type: str
    path: str
    size: int
    mode: int
    owner: str
    group: str
    modified_s: float
    target: str | None = None
