"""The nouns: frozen, no I/O. Sizes are bytes, times are seconds unless the name says otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Literal

from fumehood.errors import InvalidInput, InvalidTransition

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# The one pattern for every id that may become part of a path, a cgroup name or a URL (H14).
ID_PATTERN = re.compile(r"[a-z][a-z0-9]{3,31}\Z")


def check_id(value: str, what: str = "id") -> str:
    """`value` itself, when it matches ID_PATTERN. Raises InvalidInput that names `what`."""
    if not ID_PATTERN.match(value):
        raise InvalidInput(f"bad {what}: {value[:40]!r}", remediation=f"it must match {ID_PATTERN.pattern}")
    return value


class SandboxState(StrEnum):
    CREATING = "creating"
    READY = "ready"
    RUNNING = "running"
    PAUSED = "paused"
    QUARANTINED = "quarantined"
    STOPPED = "stopped"


_MOVES: Mapping[SandboxState, frozenset[SandboxState]] = {
    SandboxState.CREATING: frozenset({SandboxState.READY, SandboxState.STOPPED}),
    SandboxState.READY: frozenset({SandboxState.RUNNING, SandboxState.PAUSED, SandboxState.QUARANTINED, SandboxState.STOPPED}),
    SandboxState.RUNNING: frozenset({SandboxState.READY, SandboxState.PAUSED, SandboxState.QUARANTINED, SandboxState.STOPPED}),
    SandboxState.PAUSED: frozenset({SandboxState.READY, SandboxState.RUNNING, SandboxState.QUARANTINED, SandboxState.STOPPED}),
    SandboxState.QUARANTINED: frozenset({SandboxState.PAUSED, SandboxState.STOPPED}),
    SandboxState.STOPPED: frozenset(),
}


def move(current: SandboxState, target: SandboxState) -> SandboxState:
    """The only way a state changes. Raises InvalidTransition for a move that the table lacks."""
    if target not in _MOVES[current]:
        raise InvalidTransition(f"a {current} sandbox can't become {target}", current=current, target=target)
    return target


class Enforcement(StrEnum):
    ENFORCED = "enforced"
    DEGRADED = "degraded"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Protection:
    """One mechanism as it is on this host, for this sandbox. `fix` says how to have it enforced."""

    name: str
    state: Enforcement
    detail: str = ""
    fix: str = ""


Status = Literal[
    "ok",
    "error",
    "timeout",
    "oom",
    "pids_limit",
    "disk_full",
    "output_limit",
    "killed",
    "syscall_refused",
    "egress_denied",
    "approval_pending",
    "approval_denied",
    "quarantined",
    "cancelled",
]


def _range(low: float, high: float, unit: str = "") -> dict[str, Any]:
    return {"low": low, "high": high, "unit": unit}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sandbox may use. Out of range raises InvalidInput."""

    cpus: float = field(default=1.0, metadata=_range(0.01, 1024))
    cpu_weight: int = field(default=100, metadata=_range(1, 10_000))
    memory_bytes: int = field(default=512 * MIB, metadata=_range(32 * MIB, 1 << 44))
    swap_bytes: int = field(default=0, metadata=_range(0, 1 << 44))
    pids: int = field(default=128, metadata=_range(8, 1 << 22))
    disk_bytes: int = field(default=256 * MIB, metadata=_range(1 * MIB, 1 << 44))
    inodes: int = field(default=16_384, metadata=_range(64, 1 << 32))
    open_files: int = field(default=1_024, metadata=_range(32, 1 << 20))
    io_read_bps: int = field(default=0, metadata=_range(0, 1 << 44))  # 0 = no throttle
    io_write_bps: int = field(default=0, metadata=_range(0, 1 << 44))
    timeout_s: float = field(default=30.0, metadata=_range(0.01, 86_400))
    output_bytes: int = field(default=1 * MIB, metadata=_range(0, 1 * GIB))  # captured, per stream
    output_kill_bytes: int = field(default=64 * MIB, metadata=_range(1 * KIB, 1 << 44))  # then status output_limit
    lifetime_s: float = field(default=300.0, metadata=_range(0.1, 30 * 86_400))

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise InvalidInput(
                    f"limit {f.name} = {value!r} is out of range",
                    cause=f"{f.name} must be a number from {low} to {high}",
                    remediation=f"set {f.name} inside that range",
                )

    def replace(self, **changes: Any) -> Limits:
        """A copy with those fields changed, checked again. Raises InvalidInput."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class FileRules:
    """What user code sees of the file system, inside paths. deny (hidden) beats read_only beats writable."""

    writable: tuple[str, ...] = ("/home/user", "/tmp", "/dev/shm")
    read_only: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mount:
    """A host path shown inside. Read-only unless `writable`; nosuid and nodev always."""

    source: str
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """What a zygote is built from. `root` None = the host's own Python environment, else a directory with an image."""

    name: str = "python"
    root: str | None = None
    preload: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """A resolved description: nothing in it still has to be looked up."""

    template: Template = Template()
    limits: Limits = Limits()
    files: FileRules = FileRules()
    # The OCI/Docker seccomp profile as parsed JSON; None = fumehood's own.
    seccomp: Mapping[str, Any] | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    hostname: str = "sandbox"
    require: frozenset[str] = frozenset()  # names of protections that must be enforced, else creation fails closed
    policy_name: str = "default"
    policy_hash: str = ""


@dataclass(frozen=True, slots=True)
class CodeRequest:
    """Code for a context. `context` None = the default one of `language`."""

    code: str
    language: str = "python"
    context: str | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class ExecRequest:
    """A program. `pty` is (rows, cols). `stdin` None = /dev/null; bytes = written, then closed."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    cwd: str | None = None
    stdin: bytes | None = None
    pty: tuple[int, int] | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class RichResult:
    """One displayed value, keyed by MIME type; binary types are base64 text."""

    data: Mapping[str, Any]
    is_main_result: bool = False

    @property
    def text(self) -> str | None:
        return self.data.get("text/plain")


@dataclass(frozen=True, slots=True)
class CodeError:
    name: str
    value: str
    traceback: str


@dataclass(frozen=True, slots=True)
class FileChange:
    path: str
    kind: Literal["created", "modified", "removed"]
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RefusedSyscall:
    name: str
    count: int
    arch: str = "x86_64"


@dataclass(frozen=True, slots=True)
class ConnectionAttempt:
    """A connect/send that was tried. `allowed` is False for everything without egress rules."""

    address: str
    port: int
    protocol: str
    allowed: bool = False
    count: int = 1


@dataclass(frozen=True, slots=True)
class Usage:
    """From the host's own accounting, never from the guest."""

    cpu_s: float = 0.0
    peak_memory_bytes: int = 0
    peak_pids: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Timings:
    queue_ms: float = 0.0
    create_ms: float = 0.0
    execute_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """What one execution came to. Everything but the output, results, error and changes is the host's own word."""

    status: Status
    cause: str = ""
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    results: tuple[RichResult, ...] = ()
    error: CodeError | None = None
    changes: tuple[FileChange, ...] = ()
    usage: Usage = Usage()
    refused_syscalls: tuple[RefusedSyscall, ...] = ()
    connections: tuple[ConnectionAttempt, ...] = ()
    protections: tuple[Protection, ...] = field(default=(), repr=False)
    timings: Timings = Timings()
    sandbox_id: str = ""
    context: str | None = None
    execution_count: int | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def text(self) -> str | None:
        """The text of the last expression, as a notebook would show it."""
        return next((r.text for r in self.results if r.is_main_result), None)
