"""The contract that every tier keeps. tests/contract runs it over fake, native, and later oci and microvm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fumehood.errors import ProtectionUnavailable
from fumehood.events import Event
from fumehood.model import Enforcement, Limits, Protection, SandboxSpec, Usage


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a tier can do on this host, probed, not assumed."""

    tier: str
    available: bool
    protections: tuple[Protection, ...]
    snapshot: bool = False
    fork: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Stats:
    """A live reading from the host's accounting."""

    usage: Usage
    memory_bytes: int
    pids: int
    oom_kills: int  # since the start of the sandbox
    pids_refused: int  # forks refused by the pids limit, since the start


class Handle(Protocol):
    """One live sandbox. Every method is idempotent where the word allows it."""

    sandbox_id: str
    protections: tuple[Protection, ...]
    greeted: bool  # connect() says the host's HELLO; else it is said once the agent's was heard
    patience: float  # how many times longer than usual its agent may take to speak
    grace: float  # the same, to stop something whose deadline has passed

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The one duplex byte stream to the agent, at its HELLO frame. Callable once, but for machines that were copied."""
        ...

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    def stats(self) -> Stats: ...
    def disk_is_full(self) -> bool: ...
    def disk_used_bytes(self) -> int: ...
    async def limit(self, limits: Limits) -> None:
        """Bind other limits late, on a live sandbox (cgroup writes only)."""
        ...

    def identity(self, spec: SandboxSpec) -> dict[str, Any]:
        """What its agent has to be told beside the environment whenever it becomes somebody's: arguments of the verb `bind`.
        Empty where the host sees to all of it.
        """
        ...

    def told(self, account: Mapping[str, Any]) -> None:
        """What the guest's own kernel counted, told by its agent at the end of each execution: for stats() and disk_*().
        Where the host counts by itself it is ignored (H16).
        """
        ...

    async def kill(self) -> None:
        """End every process of the sandbox at once. Returns when none is left."""
        ...

    async def aclose(self) -> None:
        """Kill, then give every resource back: cgroups, uid, journal entry, descriptors."""
        ...

    async def wait_dead(self) -> None:
        """Returns when the sandbox has ended, for whatever reason."""
        ...


class Runtime(Protocol):
    """`late_limits`: the fields of Limits that Handle.limit() can still change once a sandbox lives."""

    tier: str
    late_limits: frozenset[str]

    async def start(self, spec: SandboxSpec, sandbox_id: str, on_event: Callable[[Event], None]) -> Handle: ...
    def capabilities(self) -> Capabilities: ...
    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """A snapshot of a live sandbox: all of its memory, processes and disk, as files of this host."""

    id: str
    sandbox_id: str
    created_at: float
    size_bytes: int  # on the disk


@runtime_checkable
class Snapshots(Protocol):
    """A runtime that can copy its live sandboxes: those whose capabilities() say `snapshot`.

    A restored one has the agent that it had, with its contexts and programs, and no connection to anybody; its id, entropy,
    clock and names are new with the next bind (H20). All may raise SetupFailed, CapacityExceeded, SandboxGone.
    """

    async def snapshot(self, handle: Handle, snapshot_id: str) -> SnapshotFacts:
        """Kept until discard(). The sandbox stands still meanwhile. Raises Conflict when the id is taken."""
        ...

    async def restore(self, snapshot_id: str, spec: SandboxSpec, sandbox_id: str, on_event: Callable[[Event], None]) -> Handle:
        """Raises NotFound; SetupFailed for one whose files are damaged, or that another version of the monitor made."""
        ...

    async def fork(
        self, handle: Handle, spec: SandboxSpec, sandbox_ids: Sequence[str], on_event: Callable[[str, Event], None]
    ) -> list[Handle]:
        """So many copies of a live sandbox as there are ids, all or none; they go from the disk with the last of them."""
        ...

    def snapshots(self) -> list[SnapshotFacts]: ...

    async def discard(self, snapshot_id: str) -> None:
        """Raises NotFound. Sandboxes that run from it go on."""
        ...


def check_required(required: frozenset[str], protections: Sequence[Protection]) -> None:
    """Raises ProtectionUnavailable unless each is enforced: creation fails closed (H13)."""
    if lacking := missing(required, protections):
        raise ProtectionUnavailable(
            "required protections can't be enforced: " + ", ".join(p.name for p in lacking),
            cause="; ".join(f"{p.name} is {p.state}: {p.detail}" for p in lacking),
            remediation="; ".join(dict.fromkeys(p.fix for p in lacking if p.fix)) or "see `fumehood doctor`",
        )


def missing(required: frozenset[str], protections: Sequence[Protection]) -> list[Protection]:
    """The required protections that are not enforced; a required name that no tier knows counts as missing."""
    known = {p.name: p for p in protections}
    absent = [Protection(name, Enforcement.OFF, "unknown to this tier") for name in sorted(required - known.keys())]
    return absent + [known[n] for n in sorted(required & known.keys()) if known[n].state is not Enforcement.ENFORCED]
