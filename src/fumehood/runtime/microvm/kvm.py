"""What /dev/kvm tells of this host. Whether guests run on it is another question: see selftest.py."""

from __future__ import annotations

import contextlib
import fcntl
import os
from functools import cache

from fumehood.errors import ProtectionUnavailable

DEVICE = "/dev/kvm"
_CREATE_VM, _CREATE_VCPU, _GET_TSC_KHZ = 0xAE01, 0xAE41, 0xAEA3  # linux/kvm.h


def check() -> None:
    """Raises ProtectionUnavailable unless this process may use it."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        raise ProtectionUnavailable(
            "this host has no KVM for us",
            cause=f"{DEVICE}: {e.strerror}",
            remediation="enable virtualization, load kvm_intel or kvm_amd, join the group kvm; or use the tier qemu",
        ) from None


def modules() -> tuple[str, ...]:
    """Which of those that run guests are there."""
    return tuple(name for name in ("kvm_amd", "kvm_intel", "kvm_pvm") if os.path.exists(f"/sys/module/{name}"))


def is_emulated() -> bool:
    """Whether guest kernels run in software: a hint of what to try first; what works the self-test says."""
    return modules() == ("kvm_pvm",)


@cache
def tsc_khz() -> int:
    """What guests count with, and can't find out by themselves under emulation; 0 when there is no KVM to ask."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, kvm)
        machine = fcntl.ioctl(kvm, _CREATE_VM, 0)
        stack.callback(os.close, machine)
        cpu = fcntl.ioctl(machine, _CREATE_VCPU, 0)
        stack.callback(os.close, cpu)
        return fcntl.ioctl(cpu, _GET_TSC_KHZ)
    return 0
