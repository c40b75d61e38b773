"""Golden snapshots: machines that have booted, loaded their libraries and forked their first session, stopped before anybody
came. One for each kind of machine, made when it is first needed and again when anything that it was made from is another.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fumehood.config import Config
from fumehood.errors import SetupFailed, Unsupported
from fumehood.model import MIB, Limits, SandboxSpec
from fumehood.runtime.link import Link
from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Assets, Facts, Manifest
from fumehood.runtime.microvm.image import ROOTFS
from fumehood.runtime.microvm.machine import MEMORY, STATE, MachineSpec, Vmm
from fumehood.runtime.microvm.places import Places

FORMAT = 1
STEP_BYTES = 256 * MIB  # machines come in multiples of it, so that few golden snapshots serve all limits
RESERVE_BYTES = 64 * MIB  # of a machine's memory, for its kernel and PID 1
KERNEL, INITRD = "kernel", "initrd"
_BOOT = Limits(cpus=4.0)


@dataclass(frozen=True, slots=True)
class Origin:
    """What machines run from: a directory with STATE and MEMORY, and the machine that they go on as."""

    directory: Path
    machine: MachineSpec
    facts: Facts


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
                remediation="`fumehood image build NAME --root DIR` makes an image; name it as the template",
            )
        kernel, image = await asyncio.to_thread(lambda: (self._kernel(), self._assets.load("images", spec.template.name)))
        facts = await self._facts(kernel, image, spec)
        name = f"{self._vmm.name}-{spec.template.name}-{_digest(facts)[:16]}"
        async with self._making.setdefault(name, asyncio.Lock()):
            if name not in self._known:
                self._known[name] = await self._found_or_made(name, kernel, image, facts)
        return self._known[name]

    async def _facts(self, kernel: Manifest, image: Manifest, spec: SandboxSpec) -> Facts:
        """All that decides what the machine is: equal facts mean the same snapshot."""
        words = [kernel.facts["boot_args"], f"fumehood.preload={','.join(spec.template.preload)}", "fumehood.prestart=python"]
        if khz := kvm.tsc_khz():
            words.append(f"tsc_early_khz={khz}")
            if kernel.name == "pvm":  # its delay loop can't be calibrated either
                words.append(f"lpj={khz * 10}")
        return {
            "format": FORMAT,
            "vmm": self._vmm.name,
            "version": await self._vmm.version(),
            "kernel": kernel.digest,
            "image": image.digest,
            "generation": image.facts["generation"],
            "boot_args": " ".join(words),
            "memory_bytes": machine_bytes(spec.limits.memory_bytes),
        }

    async def _found_or_made(self, name: str, kernel: Manifest, image: Manifest, facts: Facts) -> Origin:
        try:
            return origin(await asyncio.to_thread(self._assets.load, "snapshots", name))
        except SetupFailed:
            return origin(await self._made(name, kernel, image, facts))

    async def _made(self, name: str, kernel: Manifest, image: Manifest, facts: Facts) -> Manifest:
        loop = asyncio.get_running_loop()

        def make(directory: Path) -> Facts:
            files = {ROOTFS: image.path(ROOTFS), KERNEL: _kernel_file(kernel, self._vmm)}
            files |= {INITRD: kernel.path(INITRD)} if INITRD in kernel.files else {}
            for file, source in files.items():
                os.link(source, directory / file)
            asyncio.run_coroutine_threadsafe(self._boot(directory, facts), loop).result()
            return facts

        return await asyncio.to_thread(
            self._assets.publish, "snapshots", name, make, facts["memory_bytes"], known=(kernel, image)
        )

    async def _boot(self, directory: Path, facts: Facts) -> None:
        machine_spec = _machine(directory, facts)
        async with self._places.taken(machine_spec.memory_bytes, _BOOT) as (place, account):
            machine = await self._vmm.boot(machine_spec, place)
            try:
                account.entered(machine.pid)
                async with asyncio.timeout(self._config.microvm_boot_timeout_s):
                    link = Link(*await machine.connect())
                    await link.start(self._config.microvm_boot_timeout_s)
                    await link.call("ping")
                await link.aclose()
                await machine.pause()
                await machine.snapshot(directory)
            except TimeoutError:
                raise SetupFailed(
                    "the guest did not come up",
                    cause=f"no answer within {self._config.microvm_boot_timeout_s:g} s",
                    remediation="run `fumehood doctor`",
                ) from None
            finally:
                await machine.aclose()


def origin(snapshot: Manifest) -> Origin:
    for file in (STATE, MEMORY, ROOTFS, KERNEL):
        snapshot.path(file)
    return Origin(snapshot.directory, _machine(snapshot.directory, snapshot.facts), snapshot.facts)


def moved(source: Origin, directory: Path) -> Origin:
    """The same machine with its files in another directory."""
    return replace(source, directory=directory, machine=_machine(directory, source.facts))


def machine_bytes(memory_bytes: int) -> int:
    """Of the machine in which user code may have so much."""
    return -(-(memory_bytes + RESERVE_BYTES) // STEP_BYTES) * STEP_BYTES


def _machine(directory: Path, facts: Facts) -> MachineSpec:
    initrd = directory / INITRD
    return MachineSpec(
        kernel=directory / KERNEL,
        rootfs=directory / ROOTFS,
        boot_args=facts["boot_args"],
        memory_bytes=facts["memory_bytes"],
        initrd=initrd if initrd.exists() else None,
    )


def _kernel_file(kernel: Manifest, vmm: Vmm) -> Path:
    return kernel.path("vmlinux" if vmm.name == "firecracker" else "bzImage")


def _digest(facts: dict[str, Any] | Facts) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
