"""What can happen, typed. Rooms talk to each other through these; none of them carries guest bytes unparsed."""

from __future__ import annotations

from dataclasses import dataclass

from fumehood.model import ConnectionAttempt, Protection, Status


@dataclass(frozen=True, slots=True)
class Event:
    sandbox_id: str


@dataclass(frozen=True, slots=True)
class SandboxStarted(Event):
    tier: str
    protections: tuple[Protection, ...]
    create_ms: float


@dataclass(frozen=True, slots=True)
class SandboxStopped(Event):
    cause: str


@dataclass(frozen=True, slots=True)
class ExecStarted(Event):
    exec_id: str
    what: str


@dataclass(frozen=True, slots=True)
class ExecFinished(Event):
    exec_id: str
    status: Status
    execute_ms: float


@dataclass(frozen=True, slots=True)
class SyscallRefused(Event):
    """One refused call. `args` are the six raw registers; pointers in them are the guest's and are never followed."""

    name: str
    arch: str
    args: tuple[int, ...]
    pid: int


@dataclass(frozen=True, slots=True)
class EgressDenied(Event):
    attempt: ConnectionAttempt


@dataclass(frozen=True, slots=True)
class LimitHit(Event):
    limit: str
    peak: int


@dataclass(frozen=True, slots=True)
class ZygoteLost(Event):
    template: str
