"""Golden snapshots: machines that have booted, loaded their libraries and forked their first session, stopped before anybody
came. One for each kind of machine, made when it is first needed and again when anything that it was made from is another.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fumehood.agent import wire
from fumehood.config import Config
from fumehood.errors import SetupFailed, Unsupported
from fumehood.model import MIB, Limits, SandboxSpec
from fumehood.runtime.host.accounting import Account
from fumehood.runtime.link import Link
from fumehood.runtime.microvm.assets import Assets, Facts, Manifest
from fumehood.runtime.microvm.boot import boot_args, kernel_file
from fumehood.runtime.microvm.identity import identity
from fumehood.runtime.microvm.image import ROOTFS, agent_digest
from fumehood.runtime.microvm.machine import WRITTEN, Machine, MachineSpec, Place, Vmm
from fumehood.runtime.microvm.origin import INITRD, KERNEL, Origin, link, machine_in, of_asset
from fumehood.runtime.microvm.places import Places
from fumehood.runtime.microvm.publishing import publish
from fumehood.runtime.rehearsal import rehearse

_log = logging.getLogger("fumehood")
FORMAT = 2
STEP_BYTES = 256 * MIB  # machines come in multiples of it, so that few golden snapshots serve all limits
RESERVE_BYTES = 64 * MIB  # of a machine's memory, for its kernel and PID 1
_BOOT = Limits(cpus=4.0)
_SETTLE_S, _LOOK_S, _IDLE_S = 10.0, 0.3, 0.02  # at most; between two looks; CPU a second of a guest that does nothing
_REHEARSALS = 3
_INPUTS = ("format", "vmm", "version", "generation", "kernel", "image", "boot_args")


class Golden:
    def __init__(self, config: Config, vmm: Vmm, places: Places, kernel: Callable[[], Manifest]) -> None:
        self._config, self._vmm, self._places, self._kernel = config, vmm, places, kernel
        self._assets = Assets(config.state_dir)
        self._known: dict[str, Origin] = {}
        self._making: dict[str, asyncio.Lock] = {}

    async def of(self, spec: SandboxSpec) -> Origin:
        """Raises SetupFailed, which says what to run when something is missing, Unsupported, CapacityExceeded."""
        if spec.template.root is not None or spec.template.mounts:
            raise Unsupported(
                "a microVM shows nothing of the host's files",
                cause="the template has root or mounts",
                remediation="`fumehood image build NAME --root DIR` makes one, for a template {name = NAME, preload = []}",
            )
        kernel, image = await asyncio.to_thread(lambda: (self._kernel(), self._assets.load("images", spec.template.name)))
        if image.facts["agent"] != agent_digest():  # an older agent would take what it does not know for nothing
            raise SetupFailed(
                f"the image {image.name!r} is of another version",
                cause="its agent is not this version's",
                remediation=f"run: fumehood image prepare {self._vmm.name} --template {image.name}",
            )
        facts = await self._facts(kernel, image, spec)
        name = f"{self._vmm.name}-{spec.template.name}-{_digest(facts)[:16]}"  # what an asset's name may have: 64 characters
        async with self._making.setdefault(name, asyncio.Lock()):
            if name not in self._known:
                self._known[name] = await self._found_or_made(name, kernel, image, facts)
        return self._known[name]

    async def _facts(self, kernel: Manifest, image: Manifest, spec: SandboxSpec) -> Facts:
        """All that decides what the machine is: equal facts mean the same snapshot."""
        preload = f"fumehood.preload={','.join(spec.template.preload)}"
        return {
            **await self.current(),
            "kernel": kernel.digest,
            "image": image.digest,
            "generation": image.facts["generation"],
            "boot_args": boot_args(kernel, preload, "fumehood.prestart=python"),
            "memory_bytes": machine_bytes(spec.limits),
        }

    async def current(self) -> dict[str, Any]:
        """What a snapshot must agree with to be run here."""
        return {
            "format": FORMAT,
            "vmm": self._vmm.name,
            "version": await self._vmm.version(),
            "generation": wire.GENERATION,
        }

    async def _found_or_made(self, name: str, kernel: Manifest, image: Manifest, facts: Facts) -> Origin:
        try:
            found = await asyncio.to_thread(self._assets.load, "snapshots", name)
        except SetupFailed:
            found = await self._made(name, kernel, image, facts)
            await asyncio.to_thread(self._forget_older, found)
        return await asyncio.to_thread(of_asset, found, self._places.directory / name, kept=True)

    async def _made(self, name: str, kernel: Manifest, image: Manifest, facts: Facts) -> Manifest:
        _log.warning("making %s, from which such machines start: once, and it takes up to a few minutes", name)
        files = {ROOTFS: image.path(ROOTFS), KERNEL: kernel_file(kernel, self._vmm.name)}
        files |= {INITRD: kernel.path(INITRD)} if INITRD in kernel.files else {}

        async def fill(directory: Path) -> Facts:
            link(files.items(), directory)
            boot_s = await self._boot(directory, facts)
            await self._try(directory, facts)
            return {**facts, "boot_s": round(boot_s, 2)}

        return await publish(self._assets, name, fill, facts["memory_bytes"], (kernel, image))

    def _forget_older(self, made: Manifest) -> None:
        """Those of the same kind that no machine starts from any more: their kernel, image or monitor is another now."""
        kind = made.name.rpartition("-")[0]
        for other in self._assets.all("snapshots"):
            if not isinstance(other, Manifest) or other.name.rpartition("-")[0] != kind:
                continue
            if any(other.facts.get(fact) != made.facts[fact] for fact in _INPUTS):
                self._assets.remove("snapshots", other.name)

    async def _boot(self, directory: Path, facts: Facts) -> float:
        """How many seconds it took to its agent's first answer."""
        spec, started = machine_in(directory, facts), time.monotonic()
        async with self._machine(spec, lambda place: self._vmm.boot(spec, place)) as (machine, link, account):
            await link.call("context.warm", language="python")  # its session is there, and has run a cell
            boot_s = time.monotonic() - started
            for _ in range(_REHEARSALS):
                await _rehearse(link, fully=True)
            await link.aclose()
            await _settled(account)
            await machine.pause()
            await machine.snapshot(directory)
            return boot_s

    async def _try(self, directory: Path, facts: Facts) -> None:
        """What the first clone writes to, all do."""
        spec = machine_in(directory, facts)
        async with self._machine(spec, lambda place: self._vmm.restore(spec, directory, place)) as (machine, link, _):
            await _rehearse(link, fully=False)
            if found := await asyncio.to_thread(machine.written):
                (directory / WRITTEN).write_bytes(found)

    @asynccontextmanager
    async def _machine(
        self, spec: MachineSpec, start: Callable[[Place], Awaitable[Machine]]
    ) -> AsyncGenerator[tuple[Machine, Link, Account]]:
        """One whose agent speaks. Raises SetupFailed when it takes too long to."""
        async with self._places.taken(spec.memory_bytes, _BOOT) as (place, account), AsyncExitStack() as undo:
            machine = await start(place)
            undo.push_async_callback(machine.aclose)
            account.entered(machine.pid)
            try:
                async with asyncio.timeout(self._config.microvm_boot_timeout_s):
                    link = Link(*await machine.connect())
                    undo.push_async_callback(link.aclose)
                    await link.start(self._config.microvm_boot_timeout_s, greeted=True)
            except TimeoutError:
                raise SetupFailed(
                    "the guest did not come up",
                    cause=f"no answer within {self._config.microvm_boot_timeout_s:g} s\n{machine.said()[-1000:]}".strip(),
                    remediation="run `fumehood doctor`",
                ) from None
            yield machine, link, account


async def _rehearse(link: Link, *, fully: bool) -> None:
    """All that a clone does for its first answer. After a few there are no pages left that are mapped when they are first read,
    or copied from PID 1's when they are first written to: a clone finds them done.
    """
    await link.call("bind", env={}, **identity(SandboxSpec(), "golden"))
    await rehearse(link, fully=fully)


def machine_bytes(limits: Limits) -> int:
    """Of the machine in which user code may have so much. Its disk is memory too, and files that a caller writes there are on
    nobody's account in the guest."""
    return -(-(limits.memory_bytes + limits.disk_bytes + RESERVE_BYTES) // STEP_BYTES) * STEP_BYTES


def _digest(facts: Facts) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


async def _settled(account: Account) -> None:
    """Until its guest has nothing left to do: whatever it is in the middle of, every clone would do again."""
    until, before_s = time.monotonic() + _SETTLE_S, -1.0
    while (now_s := account.reading().usage.cpu_s) - before_s > _IDLE_S * _LOOK_S and time.monotonic() < until:
        before_s = now_s
        await asyncio.sleep(_LOOK_S)
