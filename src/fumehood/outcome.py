"""From the host's facts to the one status of a result. Pure: no I/O, no clock, and no word of the guest outranks a fact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fumehood.model import Limits, RefusedSyscall, Status, Usage
from fumehood.runtime.base import Stats

Ended = Literal["end", "timeout", "output_limit", "gone", "cancelled"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen. Everything but `outcome`, `exit_code` and `signal` is the host's own observation."""

    ended: Ended
    before: Stats
    after: Stats
    disk_full: bool = False
    refused: tuple[RefusedSyscall, ...] = ()
    egress_denied: int = 0
    deadline_s: float = 0.0
    gone_because: str = ""
    outcome: str = ""
    exit_code: int | None = None
    signal: int | None = None


def decide(facts: Facts, limits: Limits) -> tuple[Status, str]:
    """(status, cause). The first row that holds wins: who ended it, then what ran out, then what was refused."""
    new_ooms = facts.after.oom_kills - facts.before.oom_kills
    failed = facts.outcome != "ok" or bool(facts.exit_code) or facts.signal is not None
    if facts.ended == "cancelled":
        return "cancelled", "the caller cancelled it"
    if new_ooms > 0 and (failed or facts.ended != "end"):
        peak = facts.after.usage.peak_memory_bytes
        return "oom", f"ended for memory: limit {limits.memory_bytes}, peak {peak} bytes"  # by the kernel or by a watchdog
    if facts.ended == "timeout":
        return "timeout", f"the deadline of {facts.deadline_s:g} s, enforced by the host, passed"
    if facts.ended == "output_limit":
        return "output_limit", f"more than {limits.output_kill_bytes} bytes of output"
    if facts.ended == "gone":
        return "killed", facts.gone_because or "the sandbox ended"
    if not failed:
        return "ok", ""
    return _failure(facts, limits)


def _failure(facts: Facts, limits: Limits) -> tuple[Status, str]:
    refused_forks = facts.after.pids_refused - facts.before.pids_refused
    if refused_forks > 0:
        return "pids_limit", f"{refused_forks} fork(s) were refused: pids limit {limits.pids}"
    if facts.disk_full:
        return "disk_full", f"no space left: {limits.disk_bytes} bytes, {limits.inodes} inodes"
    if facts.refused:
        return "syscall_refused", ", ".join(f"{r.name} x{r.count}" for r in facts.refused[:16])
    if facts.egress_denied:
        return "egress_denied", f"{facts.egress_denied} connection attempt(s): the sandbox has no network"
    if facts.signal is not None:
        return ("killed" if facts.signal == 9 else "error"), f"it died of signal {facts.signal}"
    if facts.outcome == "died":
        return "error", f"its process ended with exit code {facts.exit_code}"
    return "error", "" if facts.exit_code is None else f"exit code {facts.exit_code}"


def used(before: Stats, after: Stats, wall_s: float) -> Usage:
    b, a = before.usage, after.usage
    return Usage(
        cpu_s=max(0.0, a.cpu_s - b.cpu_s),
        peak_memory_bytes=a.peak_memory_bytes,
        peak_pids=a.peak_pids,
        io_read_bytes=max(0, a.io_read_bytes - b.io_read_bytes),
        io_write_bytes=max(0, a.io_write_bytes - b.io_write_bytes),
        wall_s=wall_s,
    )
