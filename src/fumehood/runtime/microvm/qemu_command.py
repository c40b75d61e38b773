"""What QEMU is told on its command line: the smallest machine that boots, and nothing that QEMU adds by itself (H2)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fumehood.runtime.microvm.machine import CHANNEL, MEMORY, MachineSpec, Place

Version = tuple[int, int]
KERNEL, INITRD, ROOTFS = "kernel", "initrd", "rootfs"  # as the machine's directory calls them
FLOOR: Version = (7, 2)
_CHROOT_MOVED, _MEMORY_READ_ONLY, _USER_MOVED = (8, 1), (8, 2), (9, 1)
_TRANSLATED_MIB = 32  # of code by TCG, which would otherwise take up to 1 GiB of the host for each machine
_CONSOLE = "-chardev stdio,id=console,signal=off -serial chardev:console"
_DISK_THREADS = 8


@dataclass(frozen=True, slots=True)
class Boot:
    """A machine that starts with its kernel."""


@dataclass(frozen=True, slots=True)
class Clone:
    """One that is told by QMP where its state comes from. Its memory is MEMORY, copied page by page when written to."""


@dataclass(frozen=True, slots=True)
class Template:
    """One that never runs: takes another's memory from the socket `stream` into the file MEMORY, then can save its state."""

    stream: int


Role = Boot | Clone | Template


def parse_version(text: str) -> Version | None:
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def command(binary: Path, version: Version, accel: str, spec: MachineSpec, place: Place, role: Role, qmp: int) -> list[str]:
    """All names are those in the place's directory, which QEMU has as its root once it has opened them. `qmp`: a descriptor."""
    told = [str(binary), *_machine(accel, spec), *_memory(version, spec, role), *_devices(place, role)]
    told += ["-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control"]
    return told + _role(spec, role) + _jail(version, place)


def _machine(accel: str, spec: MachineSpec) -> list[str]:
    # mem-merge: KSM would tell one guest what pages another has, by the time that writing takes.
    machine = f"microvm,acpi={'on' if spec.initrd else 'off'},memory-backend=ram,mem-merge=off,dump-guest-core=off"
    cpu = ("tcg,tb-size=" + str(_TRANSLATED_MIB), "max") if accel == "tcg" else (accel, "host")
    told = ["-M", machine, "-accel", cpu[0], "-cpu", cpu[1], "-smp", str(spec.vcpus), "-m", f"{spec.memory_bytes >> 10}k"]
    return [*told, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]


def _memory(version: Version, spec: MachineSpec, role: Role) -> list[str]:
    backend = f"memory-backend-file,id=ram,size={spec.memory_bytes},mem-path={MEMORY}"
    if isinstance(role, Boot):
        return ["-object", f"memory-backend-ram,id=ram,size={spec.memory_bytes}"]
    if isinstance(role, Template):
        return ["-object", f"{backend},share=on"]
    # An older one holds MEMORY open for writing, though it maps it privately: who took over such a QEMU could change what other
    # clones read. It can't hide that: the file's time of change, which is root's, goes with it, and Assets.load() looks at it.
    return ["-object", f"{backend},share=off" + (",readonly=on,rom=off" if version >= _MEMORY_READ_ONLY else "")]


def _devices(place: Place, role: Role) -> list[str]:
    drive, channel = f"driver=raw,file.driver=file,file.filename={ROOTFS},file.locking=off", f"socket,path={CHANNEL},server=on"
    if isinstance(role, Template):
        drive, channel = "driver=null-co", "null"
    throttle = f",throttling.bps-read={place.read_bps}" if place.read_bps else ""
    return [
        *("-drive", f"id=root,if=none,readonly=on,{drive}{throttle}", "-device", "virtio-blk-device,drive=root"),
        *("-chardev", f"{channel},id=channel" + ("" if channel == "null" else ",wait=off")),
        *("-device", "virtio-serial-device,max_ports=2", "-device", "virtserialport,chardev=channel,name=fumehood.agent"),
        *_CONSOLE.split(),
        *("-object", f"main-loop,id=main-loop,thread-pool-max={_DISK_THREADS}"),  # QEMU aborts when it may not start another
    ]


def _role(spec: MachineSpec, role: Role) -> list[str]:
    # Without its state being told, a restored machine runs as soon as it is there: one word less to wait for.
    told = ["-global", "migration.store-global-state=off"]
    if isinstance(role, Clone):
        return [*told, "-incoming", "defer"]
    if isinstance(role, Template):
        return [*told, "-S", "-incoming", f"fd:{role.stream}"]
    # There is no keyboard controller to reset it: a kernel that tries falls into the firmware and at times hangs there.
    boot_args = re.sub(r"\breboot=\S+", "reboot=triple", spec.boot_args)
    return [*told, "-kernel", KERNEL, "-append", boot_args, *(["-initrd", INITRD] if spec.initrd else [])]


def _jail(version: Version, place: Place) -> list[str]:
    """Seccomp, and as root another root directory and uid, once all files are open."""
    sandbox = "on,obsolete=deny,spawn=deny,resourcecontrol=deny"
    if place.uid is None:
        return ["-sandbox", f"{sandbox},elevateprivileges=deny"]
    # The filter is there before QEMU changes its uid, so it has to allow that. Without capabilities, and with no_new_privs,
    # there is nothing left that it could become.
    user = f"{place.uid}:{place.uid}"
    if version >= _USER_MOVED:
        return ["-sandbox", sandbox, "-run-with", f"chroot=.,user={user}"]
    chroot = ["-run-with", "chroot=."] if version >= _CHROOT_MOVED else ["-chroot", "."]
    return ["-sandbox", sandbox, *chroot, "-runas", user]
