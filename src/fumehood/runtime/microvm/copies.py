"""Copies of live machines: kept ones are assets with a manifest and digests; those of a fork last as long as its machines."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from fumehood.config import Config
from fumehood.errors import CapacityExceeded, Conflict, NotFound, SetupFailed
from fumehood.runtime.base import SnapshotFacts
from fumehood.runtime.microvm.assets import Assets, Facts, Manifest, check_space
from fumehood.runtime.microvm.machine import Machine
from fumehood.runtime.microvm.origin import BASE, Origin, link, of_asset
from fumehood.runtime.microvm.places import Places
from fumehood.runtime.microvm.publishing import publish

_LIVE = "live-"  # then the id


class Copies:
    """`facts` of an origin name monitor, version, kernel and image: a copy is of the same kind as what it was made from."""

    def __init__(self, config: Config, places: Places, kind: str) -> None:
        self._budget_bytes, self._places, self._kind = config.snapshot_budget_bytes, places, kind
        self._assets = Assets(config.state_dir)

    async def keep(self, machine: Machine, origin: Origin, sandbox_id: str, snapshot_id: str, *, paused: bool) -> SnapshotFacts:
        """Raises Conflict, CapacityExceeded."""
        if any(facts.id == snapshot_id for facts in self.all()):
            raise Conflict(f"there is a snapshot {snapshot_id}", remediation="choose another id")
        self._check_budget()

        async def fill(directory: Path) -> Facts:
            await _copy(machine, origin, directory, paused=paused)
            return {**origin.facts, "sandbox_id": sandbox_id, "created_at": time.time()}

        name, need = _LIVE + snapshot_id, origin.facts["memory_bytes"]
        return _facts(await publish(self._assets, name, fill, need, (origin.source,)))

    def _check_budget(self) -> None:
        used = sum(facts.size_bytes for facts in self.all())
        if used >= self._budget_bytes:
            raise CapacityExceeded(
                "no more snapshots are kept here",
                cause=f"they take {used >> 20} MiB of {self._budget_bytes >> 20}",
                remediation="discard some, or raise snapshot_budget_bytes",
            )

    async def open(self, snapshot_id: str, current: Facts) -> Origin:
        """To run from; goes with the last machine that does. Raises NotFound; SetupFailed for one that is damaged, or that
        another version of the monitor made.
        """
        if all(facts.id != snapshot_id for facts in self.all()):
            raise self._unknown(snapshot_id)
        found = await asyncio.to_thread(self._assets.load, "snapshots", _LIVE + snapshot_id)
        for name in ("format", "vmm", "version", "generation"):
            if found.facts.get(name) != current[name]:
                raise SetupFailed(
                    f"the snapshot {snapshot_id} can't be used here",
                    cause=f"its {name} is {found.facts.get(name)!r}, here it is {current[name]!r}",
                    remediation="discard it, or go back to that version",
                )
        directory = self._places.directory / f"{snapshot_id}-{secrets.token_hex(3)}"
        return await asyncio.to_thread(of_asset, found, directory)

    @asynccontextmanager
    async def passing(self, machine: Machine, origin: Origin, *, paused: bool) -> AsyncGenerator[Origin]:
        """A copy for machines that are started in here. Raises CapacityExceeded."""
        await asyncio.to_thread(check_space, self._places.directory, origin.facts["memory_bytes"])
        directory = self._places.directory / f"f{secrets.token_hex(5)}"
        directory.mkdir(0o700)
        copied = Origin(directory, origin.facts, origin.source)
        with copied.held():
            await _copy(machine, origin, directory, paused=paused)
            yield copied

    def all(self) -> list[SnapshotFacts]:
        """Of this tier. Damaged ones too, so that they can be discarded: their size is 0."""
        found = list[SnapshotFacts]()
        for entry in self._assets.all("snapshots"):
            if isinstance(entry, Manifest):
                if entry.name.startswith(_LIVE) and entry.facts.get("vmm") == self._kind:
                    found.append(_facts(entry))
            elif (name := str(entry.details.get("name"))).startswith(_LIVE):
                found.append(SnapshotFacts(name.removeprefix(_LIVE), "", 0.0, 0))
        return found

    def _unknown(self, snapshot_id: str) -> NotFound:
        other = "name the tier that made it; discarded ones are gone"
        return NotFound(f"the tier {self._kind} has no snapshot {snapshot_id[:40]!r}", remediation=other)

    async def discard(self, snapshot_id: str) -> None:
        """Raises NotFound."""
        if all(facts.id != snapshot_id for facts in self.all()):
            raise self._unknown(snapshot_id)
        await asyncio.to_thread(self._assets.remove, "snapshots", _LIVE + snapshot_id)


async def _copy(machine: Machine, origin: Origin, directory: Path, *, paused: bool) -> None:
    link(((name, origin.directory / name) for name in BASE), directory)
    if not paused:
        await machine.pause()
    try:
        await machine.snapshot(directory)
    finally:
        if not paused:
            await machine.resume()


def _facts(snapshot: Manifest) -> SnapshotFacts:
    """Its files on the disk, holes not counted, those that it shares with others neither."""
    own = (snapshot.directory / name for name in snapshot.files if name not in BASE)
    size_bytes = sum(path.stat().st_blocks * 512 for path in own)
    facts = snapshot.facts
    return SnapshotFacts(snapshot.name.removeprefix(_LIVE), facts["sandbox_id"], facts["created_at"], size_bytes)
