"""From what was seen of one execution to its Result."""

from __future__ import annotations

from dataclasses import dataclass

from fumehood.execution import Followed
from fumehood.model import ConnectionAttempt, Limits, Protection, RefusedSyscall, Result, Timings
from fumehood.outcome import Facts, decide, used
from fumehood.runtime.base import Stats

_LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class Seen:
    """The host's own observations."""

    before: Stats
    after: Stats
    disk_full: bool
    refused: tuple[RefusedSyscall, ...]
    attempts: tuple[ConnectionAttempt, ...]
    deadline_s: float
    gone_because: str


def result_of(done: Followed, seen: Seen, limits: Limits, protections: tuple[Protection, ...]) -> Result:
    capture, exit_code = done.capture, done.number("exit_code")
    facts = Facts(
        done.ended,
        seen.before,
        seen.after,
        disk_full=seen.disk_full,
        refused=seen.refused,
        egress_denied=sum(attempt.count for attempt in seen.attempts),
        deadline_s=seen.deadline_s,
        gone_because=seen.gone_because or done.gone_because,
        outcome=str(done.end.get("outcome", "ok")),
        exit_code=exit_code,
        signal=done.number("signal"),
    )
    status, cause = decide(facts, limits)
    return Result(
        status=status,
        cause=cause,
        exit_code=exit_code if exit_code is not None else 0 if status == "ok" else None,
        stdout=capture.text("stdout"),
        stderr=capture.text("stderr"),
        stdout_truncated="stdout" in capture.truncated,
        stderr_truncated="stderr" in capture.truncated,
        results=tuple(capture.results),
        error=capture.error,
        changes=done.changes(),
        usage=used(seen.before, seen.after, done.execute_s),
        refused_syscalls=seen.refused,
        connections=seen.attempts,
        protections=protections,
        timings=Timings(execute_ms=done.execute_s * 1e3),
        context=_name(done.end.get("context")),
        execution_count=capture.execution_count,
    )


def _name(said: object) -> str | None:
    """Of a context, which is the guest's word: results are kept, and shown to others."""
    return said if isinstance(said, str) and len(said) <= _LONGEST_NAME else None
