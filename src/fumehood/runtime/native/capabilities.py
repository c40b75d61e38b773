"""Gives up every capability, for good. Standard library only: runs inside the template's root. capabilities(7)."""

from __future__ import annotations

import ctypes
import errno
import struct
from functools import cache

from fumehood.runtime.native import syscalls

_VERSION_3 = 0x20080522
_PR_CAPBSET_READ, _PR_GET_SECUREBITS, _PR_SET_SECUREBITS, PR_GET_NO_NEW_PRIVS = 23, 27, 28, 39
_PR_CAP_AMBIENT_IS_SET = 1
# NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off, NO_CAP_AMBIENT_RAISE, and the lock of each: uid 0 means nothing any more.
_SECUREBITS = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40 | 0x80
_LAST_POSSIBLE = 63


@cache
def _known() -> tuple[int, ...]:
    """The capabilities of this kernel, asked without /proc; in a zygote once for all its forks."""
    known: list[int] = []
    for number in range(_LAST_POSSIBLE + 1):
        try:
            syscalls.prctl(_PR_CAPBSET_READ, number)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            break
        known.append(number)
    return tuple(known)


def current() -> dict[str, int]:
    """Five sets as bit masks, plus securebits and no_new_privs."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)
    data = ctypes.create_string_buffer(24)
    syscalls.call(syscalls.CAPGET, header, data)
    e0, p0, i0, e1, p1, i1 = struct.unpack("=6I", data.raw)
    known = _known()
    return {
        "effective": e1 << 32 | e0,
        "permitted": p1 << 32 | p0,
        "inheritable": i1 << 32 | i0,
        "bounding": sum(syscalls.prctl(_PR_CAPBSET_READ, n) << n for n in known),
        "ambient": sum(syscalls.prctl(syscalls.PR_CAP_AMBIENT, _PR_CAP_AMBIENT_IS_SET, n) << n for n in known),
        "securebits": syscalls.prctl(_PR_GET_SECUREBITS),
        "no_new_privs": syscalls.prctl(PR_GET_NO_NEW_PRIVS),
    }


def drop_all() -> None:
    """Empties all five sets and locks the securebits. Raises OSError if anything could be left.

    Order: securebits and the bounding set need CAP_SETPCAP, so they go before the permitted set. A caller that never
    had it keeps a bounding set, which no_new_privs makes worthless; without no_new_privs that is refused.
    """
    try:
        syscalls.prctl(_PR_SET_SECUREBITS, _SECUREBITS)
        for number in _known():
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
    except PermissionError:
        if not syscalls.prctl(PR_GET_NO_NEW_PRIVS):
            raise
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0), 8)
    syscalls.call(syscalls.CAPSET, header, ctypes.create_string_buffer(24))
    left = ctypes.create_string_buffer(24)  # the ambient set is a subset of two of these three (capabilities(7))
    syscalls.call(syscalls.CAPGET, header, left)
    if any(left.raw):
        raise OSError(errno.EPERM, f"capabilities are left: {left.raw.hex()}")


def no_new_privs() -> None:
    """No execve() grants anything from here on: set-user-id bits and file capabilities are ignored."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    if syscalls.prctl(PR_GET_NO_NEW_PRIVS) != 1:
        raise OSError(errno.EPERM, "no_new_privs did not take")
