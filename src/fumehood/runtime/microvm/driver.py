"""The microVM tier: every sandbox is a machine that goes on from a golden snapshot, with a kernel of its own.

The host's word: processor time and memory are the monitor's control group's, its end is its pidfd's. What ran out inside is the
guest kernel's word, told by its PID 1: enough for the fate of its own user, who can't reach PID 1 (H16).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, NamedTuple

from fumehood.agent.args import LIMITS
from fumehood.config import Config
from fumehood.errors import InvalidInput, Unsupported
from fumehood.events import Event
from fumehood.model import Limits, Protection, SandboxSpec
from fumehood.runtime.base import Capabilities, Handle, SnapshotFacts, Stats, check_required
from fumehood.runtime.host.accounting import Account
from fumehood.runtime.host.pidfd import kill
from fumehood.runtime.host.waiting import readable
from fumehood.runtime.microvm import protections
from fumehood.runtime.microvm.assets import Manifest
from fumehood.runtime.microvm.copies import Copies
from fumehood.runtime.microvm.golden import Golden, machine_bytes
from fumehood.runtime.microvm.identity import identity
from fumehood.runtime.microvm.machine import Machine, Vmm
from fumehood.runtime.microvm.origin import Origin
from fumehood.runtime.microvm.places import Places, monitors
from fumehood.runtime.microvm.proof import Proof

ACCOUNT = ("oom_kills", "pids_refused", "pids", "pids_peak", "disk_full", "disk_used_bytes")  # whatever else a guest says
_LATE = frozenset({"cpus", "cpu_weight", *LIMITS} - {"memory_bytes", "disk_bytes"})


class Speed(NamedTuple):
    """Of guests: Handle's numbers of that name."""

    patience: float = 1.0
    grace: float = 1.0


# A fork takes half a second on a free processor, several on a busy one. Stopping takes less than the 2 s for which an agent has
# patience with a session that gets no processor: else code that sees to that had ten times its deadline, again and again (H17).
EMULATED = Speed(15.0, 8.0)


def speed(proof: Proof) -> Speed:
    return EMULATED if proof.emulated else Speed()


class MicrovmHandle:
    """One live machine. `origin` is what it runs from; `_undo` gives back, in reverse, whatever its start took."""

    greeted = True

    def __init__(
        self, sandbox_id: str, machine: Machine, origin: Origin, account: Account, stated: tuple[Protection, ...], speed: Speed
    ) -> None:
        self.sandbox_id, self.machine, self.origin, self.protections = sandbox_id, machine, origin, stated
        self.paused, (self.patience, self.grace) = False, speed
        self._account, self._told = account, dict[str, Any]()
        self._undo = AsyncExitStack()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await self.machine.connect()

    async def pause(self) -> None:
        await self.machine.pause()
        self.paused = True

    async def resume(self) -> None:
        await self.machine.resume()
        self.paused = False

    def identity(self, spec: SandboxSpec) -> dict[str, Any]:
        return identity(spec, self.sandbox_id)

    def told(self, account: Mapping[str, Any]) -> None:
        self._told |= {name: value for name in ACCOUNT if isinstance(value := account.get(name), int)}

    def stats(self) -> Stats:
        stats = self._account.reading()
        usage = replace(stats.usage, peak_pids=self._count("pids_peak"))
        ooms = stats.oom_kills + self._count("oom_kills")
        return replace(stats, usage=usage, pids=self._count("pids"), oom_kills=ooms, pids_refused=self._count("pids_refused"))

    def disk_is_full(self) -> bool:
        return self._told.get("disk_full") is True

    def disk_used_bytes(self) -> int:
        return self._count("disk_used_bytes")

    def _count(self, name: str) -> int:
        value = self._told.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else 0

    async def limit(self, limits: Limits) -> None:
        """The host's part; the guest's part goes with the next bind. Raises InvalidInput for more memory than there is."""
        if machine_bytes(limits) > self.origin.machine.memory_bytes:
            raise InvalidInput("a machine's memory is what it was started with", remediation="create another sandbox")
        self._account.apply(monitors(limits, self.origin.machine.memory_bytes))

    async def kill(self) -> None:
        if self.machine.pidfd >= 0:
            kill(self.machine.pidfd)
            self._account.thaw()
            await self.wait_dead()

    async def wait_dead(self) -> None:
        if self.machine.pidfd >= 0:
            await readable(self.machine.pidfd)

    async def aclose(self) -> None:
        await self._undo.aclose()


class MicrovmRuntime:
    """`kernel`: which one this host's guests boot with. Raises ProtectionUnavailable where the monitor can't run."""

    late_limits = _LATE

    def __init__(self, config: Config, vmm: Vmm, kernel: Callable[[], Manifest], jailed: str, speed: Speed) -> None:
        self.tier, self._speed = vmm.name, speed
        self._config, self._vmm = config, vmm
        self._places = Places(config)
        self._golden = Golden(config, vmm, self._places, kernel)
        self._copies = Copies(config, self._places, vmm.name)
        rootless = os.geteuid() != 0
        self.protections = protections.state(self._places.layout, rootless=rootless, jailed="" if rootless else jailed)

    def capabilities(self) -> Capabilities:
        return Capabilities(self.tier, available=True, protections=self.protections, snapshot=True, fork=True)

    async def start(self, spec: SandboxSpec, sandbox_id: str, on_event: Callable[[Event], None]) -> MicrovmHandle:
        """Raises ProtectionUnavailable, Unsupported, CapacityExceeded, SetupFailed; whatever was taken is given back."""
        self._check(spec)
        return await self._run(await self._golden.of(spec), spec, sandbox_id)

    def _check(self, spec: SandboxSpec) -> None:
        check_required(spec.require, self.protections)
        if spec.seccomp is not None:
            raise Unsupported(
                f"the tier {self.tier} takes no seccomp profile",
                cause="none is applied in guests, and nothing is weakened silently",
                remediation="leave it out, or use the tier native",
            )

    async def _run(self, origin: Origin, spec: SandboxSpec, sandbox_id: str) -> MicrovmHandle:
        if machine_bytes(spec.limits) > origin.machine.memory_bytes:
            raise InvalidInput("the snapshot's machine has less memory than that", remediation="ask for less")
        async with AsyncExitStack() as undo:
            undo.enter_context(origin.held())
            place, account = await undo.enter_async_context(self._places.taken(origin.machine.memory_bytes, spec.limits))
            machine = await self._vmm.restore(origin.machine, origin.directory, place)
            undo.push_async_callback(machine.aclose)
            account.entered(machine.pid)  # before a byte of a caller's: what it was started with is no proof (H13)
            handle = MicrovmHandle(sandbox_id, machine, origin, account, self.protections, self._speed)
            handle._undo = undo.pop_all()  # pyright: ignore[reportPrivateUsage]
            return handle

    async def snapshot(self, handle: Handle, snapshot_id: str) -> SnapshotFacts:
        """Raises Conflict, CapacityExceeded, SetupFailed, SandboxGone."""
        ours = _own(handle)
        return await self._copies.keep(ours.machine, ours.origin, ours.sandbox_id, snapshot_id, paused=ours.paused)

    async def restore(
        self, snapshot_id: str, spec: SandboxSpec, sandbox_id: str, on_event: Callable[[Event], None]
    ) -> MicrovmHandle:
        self._check(spec)
        origin = await self._copies.open(snapshot_id, await self._golden.current())
        with origin.held():
            return await self._run(origin, spec, sandbox_id)

    async def fork(
        self, handle: Handle, spec: SandboxSpec, sandbox_ids: Sequence[str], on_event: Callable[[str, Event], None]
    ) -> list[Handle]:
        ours = _own(handle)
        async with self._copies.passing(ours.machine, ours.origin, paused=ours.paused) as origin:
            runs = [asyncio.create_task(self._run(origin, spec, sandbox_id)) for sandbox_id in sandbox_ids]
            try:
                return list[Handle](await asyncio.gather(*runs))
            except BaseException:
                await self._end(runs)
                raise

    async def _end(self, runs: Sequence[asyncio.Task[MicrovmHandle]]) -> None:
        """All of them, those that are still on their way too."""
        for run in runs:
            run.cancel()
        for made in await asyncio.gather(*runs, return_exceptions=True):
            if isinstance(made, MicrovmHandle):
                await made.aclose()

    def snapshots(self) -> list[SnapshotFacts]:
        return self._copies.all()

    async def discard(self, snapshot_id: str) -> None:
        await self._copies.discard(snapshot_id)

    async def aclose(self) -> None:
        self._places.aclose()


def _own(handle: Handle) -> MicrovmHandle:
    if not isinstance(handle, MicrovmHandle):
        raise TypeError(f"a {type(handle).__name__} is another tier's")
    return handle
