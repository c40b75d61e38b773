"""Snapshots of whole sandboxes, as a caller names and sees them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fumehood.errors import InvalidInput, NotFound
from fumehood.runtime.base import SnapshotFacts

MAX_FORKS = 64  # of one call, as the server has it
_ID = re.compile(r"p[0-9a-f]{16}\Z")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a sandbox at one moment: memory, processes, files. `Sandbox(snapshot=ID)` goes on from it.

    `created_at` is Unix time, `size_bytes` what it takes of the host's disk. `metadata` is what a server keeps with it.
    """

    id: str
    sandbox_id: str
    created_at: float
    size_bytes: int
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


def of_this_host(facts: SnapshotFacts) -> Snapshot:
    return Snapshot(facts.id, facts.sandbox_id, facts.created_at, facts.size_bytes)


def check_id(snapshot_id: str) -> str:
    """Raises InvalidInput."""
    if not _ID.match(snapshot_id):
        raise InvalidInput(
            f"bad snapshot id: {snapshot_id[:40]!r}",
            cause="it is p and 16 hexadecimal digits",
            remediation="take it from snapshot() or the list of snapshots",
        )
    return snapshot_id


def check_count(count: object) -> int:
    """Raises InvalidInput."""
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_FORKS:
        raise InvalidInput(f"fork({count!r})", cause=f"not a number from 1 to {MAX_FORKS}", remediation="ask for so many")
    return count


def is_checkpoint(name: str) -> bool:
    """Of a context (`context:name`); else it is a snapshot's id."""
    return ":" in name


def check_name(name: str) -> str:
    """What there is to roll back to. Raises NotFound for what can be neither a checkpoint nor a snapshot."""
    if not is_checkpoint(name) and not _ID.match(name):
        raise NotFound(
            f"no checkpoint or snapshot {name[:40]!r}",
            cause="it has the form of neither",
            remediation="give what checkpoint() returned, or the id of a snapshot",
        )
    return name


def check_origin(snapshot: str | None, template: object) -> None:
    """What Sandbox(snapshot=) can't be asked for. Raises InvalidInput."""
    if snapshot is None:
        return
    check_id(snapshot)
    if template is not None:
        raise InvalidInput(
            "snapshot and template", cause="a snapshot has the template that it was made from", remediation="leave template out"
        )
