"""Whether guests run on this host is proved by one that does: booted, asked, stopped, restored, asked again.

Nothing else tells. /dev/kvm may be there and emulate too little; a kernel that boots elsewhere may hang here.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fumehood.agent import wire
from fumehood.config import Config
from fumehood.errors import CapacityExceeded, FumehoodError, ProtectionUnavailable, SetupFailed
from fumehood.model import MIB, Limits
from fumehood.runtime.link import Link
from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Assets, Manifest
from fumehood.runtime.microvm.boot import boot_args, kernel_file
from fumehood.runtime.microvm.firecracker import Firecracker
from fumehood.runtime.microvm.image import ROOTFS, agent_digest
from fumehood.runtime.microvm.kernel import INITRD
from fumehood.runtime.microvm.machine import Machine, MachineSpec, Place, Vmm
from fumehood.runtime.microvm.places import Places
from fumehood.runtime.microvm.proof import PROGRAMS, Proof, facts, program, save
from fumehood.runtime.microvm.qemu import Qemu

Step = Callable[[str, int, int], None]
# In this order, unless one is asked for by name. `pvm` turns protections of its kernel off: its turn is when the others failed.
KERNELS = {"firecracker": ("small", "stock", "pvm"), "qemu": ("small", "stock")}
_INSTALL = {
    "firecracker": "put firecracker and its jailer, of one release from 1.14.4 on (GitHub: firecracker-microvm/firecracker),"
    " into one directory, with mode 755, on PATH or named by FUMEHOOD_FIRECRACKER",
    "qemu": "apt-get install --no-install-recommends qemu-system-x86",
}
_MEMORY_BYTES = 256 * MIB
_BOOT_S = 60.0
_USUAL_TIMEOUT_S = 300.0  # the setting's default: whoever doubles it has a host on which everything takes twice as long
_HEARD_CHARACTERS = 1_000


@dataclass(frozen=True, slots=True)
class Attempt:
    kernel: Manifest
    accel: str
    deadline_s: float

    def __str__(self) -> str:
        return f"the kernel {self.kernel.name} with {self.accel}"


def monitor(config: Config, tier: str, accel: str = "") -> Vmm:
    """Raises ProtectionUnavailable when the tier's program is not there."""
    found = program(config, tier)
    if found is None:
        named = getattr(config, tier)
        cause = f"{named} is no file that can be executed" if named else f"there is no {PROGRAMS[tier]} on PATH"
        raise ProtectionUnavailable(f"the tier {tier} has no monitor", cause=cause, remediation=_INSTALL[tier])
    return Firecracker(found) if tier == "firecracker" else Qemu(found, accel or "tcg")


async def prove(
    config: Config,
    tier: str,
    step: Step = lambda text, done, total: None,
    *,
    image: str = "python",
    kernels: Sequence[str] | None = None,
) -> Proof:
    """Tries the guest kernels that are built (or `kernels`) until one works, and stores what came of it.

    Raises CapacityExceeded: a host that is full proves nothing, and nothing is stored.
    """
    at, started = time.time(), time.monotonic()
    proof = await _found(config, tier, step, image, KERNELS[tier] if kernels is None else kernels)
    seconds = round(time.monotonic() - started, 3)
    return await asyncio.to_thread(save, config, replace(proof, at=at, seconds=seconds))


async def _found(config: Config, tier: str, step: Step, image_name: str, kernels: Sequence[str]) -> Proof:
    try:
        version = await monitor(config, tier).version()
        image = await asyncio.to_thread(_current, Assets(config.state_dir), image_name)
        attempts = await asyncio.to_thread(_attempts, config, tier, kernels)
    except (ProtectionUnavailable, SetupFailed) as e:
        return Proof(tier, reason=str(e))
    failures: list[str] = []
    places = Places(config)
    try:
        for number, attempt in enumerate(attempts):
            step(f"booting a guest: {attempt}", number, len(attempts))
            now = await asyncio.to_thread(facts, config, tier, attempt.kernel, image)
            if not (failure := await failure_of(places, monitor(config, tier, attempt.accel), attempt, image)):
                return Proof(tier, "", attempt.kernel.name, attempt.accel, image.name, version, now)
            failures.append(f"{attempt}: {failure}")
    finally:
        places.aclose()
    return Proof(tier, reason="\n".join(failures), version=version)


def _attempts(config: Config, tier: str, kernels: Sequence[str]) -> list[Attempt]:
    """Raises SetupFailed when none of the kernels is built, ProtectionUnavailable where KVM is needed and is not there."""
    patience_s = _patience_s(config)
    built = _built(Assets(config.state_dir), kernels)
    if tier == "firecracker":
        kvm.check()
        longest_s = config.microvm_boot_timeout_s
        return [Attempt(kernel, "kvm", longest_s if kernel.name == "pvm" else patience_s) for kernel in built]
    # Where KVM works a guest is up in a second.
    quick = [Attempt(kernel, "kvm", patience_s / 3) for kernel in built if kernel.name == "small" and _has_kvm()]
    return quick + [Attempt(kernel, "tcg", patience_s) for kernel in built]


def _patience_s(config: Config) -> float:
    """On a busy host everything takes as many times as long as there are programs for each processor."""
    slower = max(1.0, config.microvm_boot_timeout_s / _USUAL_TIMEOUT_S)
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return min(config.microvm_boot_timeout_s, _BOOT_S * slower * busy)


def _current(assets: Assets, image: str) -> Manifest:
    """Raises SetupFailed, also for one whose agent is another version's."""
    found = assets.load("images", image)
    if found.facts.get("agent") != agent_digest():
        cause = "its agent is not this version's; run: fumehood image build " + image
        raise SetupFailed(f"the image {image!r} is of another version", cause=cause)
    return found


def _built(assets: Assets, kernels: Sequence[str]) -> list[Manifest]:
    found: list[Manifest] = []
    faults: list[SetupFailed] = []
    for name in kernels:
        try:
            found.append(assets.load("kernels", name))
        except SetupFailed as e:
            faults.append(e)
    if not found:
        raise SetupFailed("no guest kernel can be used", cause="; ".join(str(fault) for fault in faults))
    return found


def _has_kvm() -> bool:
    try:
        kvm.check()
    except ProtectionUnavailable:
        return False
    return True


async def failure_of(places: Places, vmm: Vmm, attempt: Attempt, image: Manifest) -> str:
    """Empty: a guest did what it was asked, after its boot and after a restore."""
    kernel = attempt.kernel
    initrd = kernel.path(INITRD) if INITRD in kernel.files else None
    try:
        spec = MachineSpec(kernel_file(kernel, vmm.name), image.path(ROOTFS), boot_args(kernel), _MEMORY_BYTES, initrd)
        with tempfile.TemporaryDirectory(prefix="snapshot-", dir=places.directory) as name:
            directory = Path(name)
            await _run(places, attempt, lambda place: vmm.boot(spec, place), lambda machine: _saved(machine, directory))
            await _run(places, attempt, lambda place: vmm.restore(spec, directory, place), _answers)
    except CapacityExceeded:
        raise
    except FumehoodError as e:
        return str(e)
    return ""


async def _run(
    places: Places,
    attempt: Attempt,
    start: Callable[[Place], Awaitable[Machine]],
    work: Callable[[Machine], Awaitable[None]],
) -> None:
    """Raises SetupFailed with the console's last words when it is not done in time."""
    async with places.taken(_MEMORY_BYTES, Limits(cpus=4.0)) as (place, account):
        machine: Machine | None = None
        try:
            async with asyncio.timeout(attempt.deadline_s):
                machine = await start(place)
                account.entered(machine.pid)
                await work(machine)
        except TimeoutError:
            words = machine.said()[-1000:] if machine else ""
            raise SetupFailed(f"the guest did not answer within {attempt.deadline_s:g} s", cause=words) from None
        finally:
            if machine is not None:
                await machine.aclose()


async def _saved(machine: Machine, directory: Path) -> None:
    await _answers(machine)
    await machine.pause()
    await machine.snapshot(directory)


async def _answers(machine: Machine) -> None:
    """Raises what a Link raises, and SetupFailed for a wrong answer."""
    link = Link(*await machine.connect())
    try:
        await link.start(_USUAL_TIMEOUT_S, greeted=True)
        await link.call("bind", env={}, clock_s=time.time(), entropy=b64encode(os.urandom(64)).decode())
        heard = {
            "6*7": await _heard(link, "context.run", code="6*7", language="python", env={}),
            "echo $((6*7))": await _heard(link, "exec.start", argv=["bash", "-c", "echo $((6*7))"], env={}, stdin=False),
        }
        if wrong := [f"{asked}: {answer!r}" for asked, answer in heard.items() if answer.strip() != "42"]:
            raise SetupFailed("the guest gave a wrong answer", cause="; ".join(wrong))
    finally:
        await link.aclose()


async def _heard(link: Link, verb: str, **arguments: object) -> str:
    """What it wrote and showed, the beginning of it."""
    text = ""
    stream = await link.open(verb, **arguments)
    async for frame in stream:
        if frame.kind == wire.DATA:
            text += frame.payload[1:].decode("utf-8", "replace")
        elif (event := link.checked_json(frame)).get("type") == "result":
            text += str(wire.table(event.get("data")).get("text/plain"))
        text = text[:_HEARD_CHARACTERS]
    return text
