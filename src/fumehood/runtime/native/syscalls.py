"""The system calls that Python has no name for. Stdlib only: the zygote imports this inside a template's root.

Calls go through PyDLL, which keeps the GIL: a raw clone() must return in the child with the interpreter's lock held.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

if os.uname().machine != "x86_64":  # aarch64 shares only the numbers from 424 on
    raise ImportError(f"fumehood's native tier knows x86-64 only, this is {os.uname().machine}")

CLONE, PIVOT_ROOT, MOUNT, UMOUNT2, SETHOSTNAME = 56, 155, 165, 166, 170
CAPGET, CAPSET, PRCTL, KEYCTL, UNSHARE = 125, 126, 157, 250, 272
SECCOMP, PIDFD_SEND_SIGNAL, PIDFD_OPEN = 317, 424, 434
OPEN_TREE, MOVE_MOUNT, OPENAT2, MOUNT_SETATTR = 428, 429, 437, 442
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE, MS_RELATIME = 4096, 16384, 1 << 18, 1 << 19, 1 << 21
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 4, 24, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4


def _argument(value: object) -> object:
    if isinstance(value, int):
        return ctypes.c_long(value)
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


def call(number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | ctypes.Structure | None) -> int:
    """One raw system call. Structures go by reference. Raises OSError with the errno."""
    result = _libc.syscall(ctypes.c_long(number), *map(_argument, args))
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


def clone(flags: int) -> int:
    """fork() that creates namespaces in the same step: one copy of the page tables instead of two.

    Only for a single-threaded process. No at-fork hook runs, Python's or glibc's: they reset locks and threads, of which
    there are none, at the price of 400 page faults. Whoever forks on by os.fork() has them run there (random is reseeded).
    """
    return call(CLONE, flags | 17, 0, 0, 0, 0)  # 17 = SIGCHLD


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    try:
        call(MOUNT, os.fsencode(source), os.fsencode(target), fstype.encode() or None, flags, data.encode() or None)
    except OSError as e:
        raise OSError(e.errno, f"mount {source} on {target}: {e.strerror}") from None


def umount(target: str, flags: int = MNT_DETACH) -> None:
    call(UMOUNT2, os.fsencode(target), flags)


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    return call(PRCTL, option, a, b, c, d)
