"""Firecracker as the monitor, under its jailer where we are root. Its own seccomp filter stays on; no PCI is asked for (H3).

All that a machine names is relative to the directory that its monitor sees, so a snapshot goes on in any other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path

from fumehood.errors import ProtectionUnavailable, SetupFailed
from fumehood.runtime.microvm.firecracker_api import Fault
from fumehood.runtime.microvm.firecracker_machine import FirecrackerMachine
from fumehood.runtime.microvm.jailer import Jail, on_disk
from fumehood.runtime.microvm.machine import CHANNEL, MEMORY, STATE, WRITTEN, MachineSpec, Place
from fumehood.runtime.microvm.process import Monitor

KERNEL, INITRD, ROOTFS = "kernel", "initrd", "rootfs"
GUEST_CID = 3
_VERSION_S = 10.0
_INSTALL = "install Firecracker 1.14.4 or later with its jailer, from its own release"

Version = tuple[int, int, int]


class Firecracker:
    name = "firecracker"

    def __init__(self, binary: Path | None = None) -> None:
        """None: the one on PATH. As root, a `jailer` beside it is used."""
        self._given = binary
        self._checked: dict[tuple[Path, tuple[int, ...]], str] = {}

    @property
    def jailed(self) -> str:
        """What keeps the monitor in: empty for nothing but its uid and its own filter."""
        found = os.geteuid() == 0 and _jailer(self._binary())
        return "its jailer: a chroot, a uid of its own, no capability" if found else ""

    async def version(self) -> str:
        binary = self._binary()
        try:
            key = binary, tuple(path.stat().st_mtime_ns for path in (binary, _jailer(binary)) if path)
        except OSError as e:
            raise _unusable(str(e)) from None
        if key not in self._checked:
            self._checked = {key: await asyncio.to_thread(_checked_version, binary)}
        return self._checked[key]

    async def boot(self, spec: MachineSpec, place: Place) -> FirecrackerMachine:
        async with self._started(spec, place) as machine:
            files = {KERNEL: spec.kernel, ROOTFS: spec.rootfs} | ({INITRD: spec.initrd} if spec.initrd else {})
            for name, path in files.items():
                machine.jail.link(name, path)
            source = {
                "kernel_image_path": KERNEL,
                "boot_args": spec.boot_args,
                **({"initrd_path": INITRD} if spec.initrd else {}),
            }
            size = {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_bytes >> 20, "track_dirty_pages": True}
            drive = {"drive_id": ROOTFS, "path_on_host": ROOTFS, "is_root_device": False, "is_read_only": True}
            await machine.api.ask("PUT /boot-source", source)
            await machine.api.ask("PUT /machine-config", size)
            await machine.api.ask(f"PUT /drives/{ROOTFS}", drive | (_limiter(place) if place.read_bps else {}))
            await machine.api.ask("PUT /vsock", {"guest_cid": GUEST_CID, "uds_path": CHANNEL})
            await machine.api.ask("PUT /actions", {"action_type": "InstanceStart"})
        return machine

    async def restore(self, spec: MachineSpec, snapshot: Path, place: Place) -> FirecrackerMachine:
        async with self._started(spec, place) as machine:
            machine.jail.link(ROOTFS, spec.rootfs)
            machine.base = _linked(snapshot, machine.jail)
            _check_size(os.fstat(machine.base).st_size, spec)
            backend = {"backend_type": "File", "backend_path": MEMORY}
            load = {"snapshot_path": STATE, "mem_backend": backend, "enable_diff_snapshots": True, "resume_vm": False}
            await machine.api.ask("PUT /snapshot/load", load)
            await machine.own(snapshot / WRITTEN)
            # Its disk came with the limit of another place.
            await machine.api.ask(f"PATCH /drives/{ROOTFS}", {"drive_id": ROOTFS, **_limiter(place)})
            await machine.resume()
        return machine

    @contextlib.asynccontextmanager
    async def _started(self, spec: MachineSpec, place: Place) -> AsyncGenerator[FirecrackerMachine]:
        """A monitor without a guest, ended by whatever its caller raises. Raises SetupFailed."""
        await self.version()
        binary = self._binary()
        jail = Jail(place, binary, _jailer(binary))
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(jail.aclose)
            monitor = Monitor.start(jail.command, place, file_bytes=spec.memory_bytes)
            machine = FirecrackerMachine(monitor, jail)
            undo.pop_all()
            undo.push_async_callback(machine.aclose)
            try:
                with on_disk("the machine was not started"):
                    yield machine
            except (Fault, ValueError) as e:  # the second: WRITTEN is damaged
                raise _not_started(f"{e}\n{monitor.said()[-1000:]}".strip()) from None
            undo.pop_all()

    def _binary(self) -> Path:
        found = self._given or shutil.which("firecracker")
        if found is None:
            raise _unusable("there is no `firecracker` on PATH")
        return Path(found)


def _jailer(binary: Path) -> Path | None:
    beside = binary.with_name("jailer")
    return beside if beside.exists() else None


def _limiter(place: Place) -> dict[str, object]:
    """A bucket that fills up within a second; one of size 0 is none."""
    return {"rate_limiter": {"bandwidth": {"size": place.read_bps, "refill_time": 1000}}}


def _linked(snapshot: Path, jail: Jail) -> int:
    """A descriptor of its memory. The directory is held: another snapshot may take its name between two links."""
    directory = os.open(snapshot, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in (STATE, MEMORY):
            jail.link(name, name, directory)
        return os.open(MEMORY, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)


def _check_size(size_bytes: int, spec: MachineSpec) -> None:
    """A file that is too short would be mapped all the same, and end the monitor at the first page that it lacks."""
    if size_bytes != spec.memory_bytes:
        raise _not_started(f"the snapshot's memory has {size_bytes} bytes of {spec.memory_bytes}")


def _not_started(cause: str) -> SetupFailed:
    return SetupFailed("Firecracker did not start the machine", cause=cause, remediation="run `fumehood doctor`")


def refusal(version: Version) -> str:
    """Why that one is not used; empty when it is (H3)."""
    if version < (1, 12, 0):
        return "older than 1.12, the first that was tried"
    if (1, 13, 0) < version < (1, 14, 4) or version == (1, 15, 0):
        return "a guest can write outside its memory by virtio-pci, or a user redirect its jailer"
    return ""


def _checked_version(binary: Path) -> str:
    version, jailer = _printed_version(binary), _jailer(binary)
    text = ".".join(map(str, version))
    if why := refusal(version):
        raise _unusable(f"{binary} is {text}: {why}")
    if jailer is not None and _printed_version(jailer) != version:
        raise _unusable(f"{jailer} is of another version than {binary}")
    return text


def _printed_version(binary: Path) -> Version:
    try:
        command = [str(binary), "--version"]
        said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_S, env={}).stdout
    except (OSError, subprocess.TimeoutExpired) as e:
        raise _unusable(str(e)) from None
    found = re.match(rb"(?:Firecracker|Jailer) v(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise _unusable(f"{binary} --version says {said[:80]!r}")
    return int(found[1]), int(found[2]), int(found[3])


def _unusable(cause: str) -> ProtectionUnavailable:
    return ProtectionUnavailable("Firecracker can't be used", cause=cause, remediation=_INSTALL)
