"""Landlock: what is not writable stays unwritable even if a mount is missed. Standard library only, runs inside.

`separate`, called in each user process, gives it a domain of its own below the sandbox's: a domain may only trace inside
itself, so user code can neither trace the agent nor a child of it that is not filtered yet (H16).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fumehood.runtime.native import syscalls

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REFER, TRUNCATE, IOCTL_DEV = 1, 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
_REMOVE_AND_MAKE = (1 << 13) - (1 << 4)
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_READ = READ_FILE | READ_DIR
_WRITE = WRITE_FILE | (_REMOVE_AND_MAKE & ~(_MAKE_CHAR | _MAKE_BLOCK)) | REFER | TRUNCATE
_SCOPE_ABSTRACT_UNIX, _SCOPE_SIGNAL = 1, 2
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1

DEVICES = tuple(f"/dev/{n}" for n in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts"))


class Restricted(NamedTuple):
    """What holds now. `left_to_mounts`: read-only paths below a writable one; Landlock only ever adds up the rights
    along a path, so these need a read-only mount."""

    abi: int
    left_to_mounts: tuple[str, ...]


def abi() -> int:
    """The kernel's Landlock version, 0 if it has none."""
    try:
        return syscalls.call(syscalls.LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError as e:
        if e.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def _handled(version: int) -> int:
    rights = (1 << 13) - 1
    return rights | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0) | (IOCTL_DEV if version >= 5 else 0)


def _ruleset(version: int) -> int:
    scoped = _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL
    # Network rights stay unhandled: servers on the loopback are useful, and the namespace has no route out.
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    attributes = struct.pack("=QQQ", _handled(version), 0, scoped)[:size]
    return syscalls.call(syscalls.LANDLOCK_CREATE_RULESET, attributes, size, 0)


def _allow(ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            rights &= _OF_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, parent), 12)
        syscalls.call(syscalls.LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(parent)


def _below(path: str, parents: Iterable[str]) -> bool:
    return any(os.path.commonpath((path, parent)) == parent for parent in parents)


def split(writable: Sequence[str], read_only: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths to make writable, read-only paths left to mounts). read_only beats writable, whichever is nested."""
    writes = [w for w in map(os.path.realpath, writable) if not _below(w, map(os.path.realpath, read_only))]
    return writes, [r for r in read_only if _below(os.path.realpath(r), writes)]


def restrict(writable: Sequence[str], read_only: Sequence[str] = (), execute: Sequence[str] = ("/",)) -> Restricted:
    """Confines the calling thread and all that it starts: reading everywhere, executing below `execute`, writing
    below `writable` and to the harmless devices. Needs no_new_privs.

    Raises OSError: ENOSYS where the kernel has no Landlock, ENOENT for a writable path that does not exist.
    """
    version = abi()
    if not version:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    handled, (writes, left) = _handled(version), split(writable, read_only)
    ruleset = _ruleset(version)
    try:
        _allow(ruleset, "/", _READ)
        for path in execute:
            _allow(ruleset, path, EXECUTE)
        for path in writes:
            _allow(ruleset, path, (_WRITE | _READ) & handled)
        for path in filter(os.path.exists, DEVICES):
            _allow(ruleset, path, (WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV) & handled)
        syscalls.call(syscalls.LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return Restricted(version, tuple(left))


def separate() -> None:
    """A nested domain that takes nothing else away: making block devices is refused already. Needs no_new_privs."""
    if not abi():
        return
    ruleset = syscalls.call(syscalls.LANDLOCK_CREATE_RULESET, struct.pack("=Q", _MAKE_BLOCK), 8, 0)
    try:
        syscalls.call(syscalls.LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
