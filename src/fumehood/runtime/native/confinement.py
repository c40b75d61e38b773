"""What this kernel lets us enforce on user code, asked of the kernel itself: five protections, each with its floor (H13)."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import cache

from fumehood.errors import ProtectionUnavailable
from fumehood.model import Enforcement, Protection
from fumehood.runtime.native import bpf, capabilities, landlock, libseccomp, notify, peek, syscalls

_GET_ACTION_AVAIL = 2
_CAP_SYS_PTRACE = 19
_FULL_LANDLOCK = 6  # scopes signals and abstract sockets
_KERNEL = "upgrade the kernel: "


@cache
def protections() -> tuple[Protection, ...]:
    """seccomp, syscall-count, landlock, capabilities, no-new-privs. Asked once: none of it changes while we run."""
    return tuple(probe() for probe in (_seccomp, _syscall_count, _landlock, _capabilities, _no_new_privs))


def _off(name: str, detail: str, fix: str) -> Protection:
    return Protection(name, Enforcement.OFF, detail, fix)


def _has_action(action: int) -> bool:
    with suppress(OSError):
        syscalls.call(syscalls.SECCOMP, _GET_ACTION_AVAIL, 0, struct.pack("=I", action))
        return True
    return False


def _seccomp() -> Protection:
    try:
        newest = libseccomp.newest()
    except ProtectionUnavailable as e:
        return _off("seccomp", f"{e.message}: {e.cause}", e.remediation)
    if not (_has_action(bpf.ERRNO) and _has_action(bpf.TRACE)):
        return _off("seccomp", "this kernel has no seccomp filters", _KERNEL + "CONFIG_SECCOMP_FILTER, Linux 4.14")
    return Protection("seccomp", Enforcement.ENFORCED, f"filters; calls above number {newest} get ENOSYS")


def _syscall_count() -> Protection:
    if not _has_action(bpf.NOTIFY):
        return _off("syscall-count", "no user notification", _KERNEL + "Linux 5.6 (notification, pidfd_getfd)")
    if os.geteuid() == 0 and not capabilities.current()["effective"] >> _CAP_SYS_PTRACE & 1:
        return _off("syscall-count", "root without CAP_SYS_PTRACE can't reach into other uids", notify.REACH_FIX)
    try:
        os.close(_copy_from_a_child())
    except OSError as e:
        return _off("syscall-count", f"can't copy a descriptor of a child: {e}", notify.REACH_FIX)
    return Protection("syscall-count", Enforcement.ENFORCED, "user notification")


def _copy_from_a_child() -> int:
    """What take_listener() will have to do, done once on a process of our own."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:  # ends with the pipe
        return peek.copy_descriptor(child.pid, 0)


def _landlock() -> Protection:
    version = landlock.abi()
    if not version:
        return _off("landlock", "not in this kernel", _KERNEL + "Linux 5.13, landlock in CONFIG_LSM or lsm= at boot")
    state = Enforcement.ENFORCED if version >= _FULL_LANDLOCK else Enforcement.DEGRADED
    lacks = {2: "renames between directories", 3: "truncation", 5: "device ioctls", 6: "signals and abstract sockets"}
    missing = [what for since, what in lacks.items() if version < since]
    detail = f"ABI {version}" + (f", without control of {', '.join(missing)}" if missing else "")
    return Protection("landlock", state, detail, "" if not missing else _KERNEL + "Linux 6.12")


def _readable(name: str, ask: Callable[[], object], floor: str) -> Protection:
    try:
        ask()
    except OSError as e:
        return _off(name, str(e), _KERNEL + floor)
    return Protection(name, Enforcement.ENFORCED)


def _capabilities() -> Protection:
    return _readable("capabilities", capabilities.current, "Linux 4.3 (ambient capabilities)")


def _no_new_privs() -> Protection:
    return _readable("no-new-privs", lambda: syscalls.prctl(capabilities.PR_GET_NO_NEW_PRIVS), "Linux 3.5")
