"""Installs compiled filters, inside the sandbox. Standard library only: runs in the template's root.

Handing out a listener needs no call that a profile could refuse: before the filter the process tells its supervisor the
number that the descriptor will have; the supervisor reaches in and copies it (pidfd_getfd); the process meanwhile waits
in the rendezvous, a call that every policy program turns into a notification and that only the supervisor can answer.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from contextlib import suppress

from fumehood.runtime.native import syscalls

# seccomp() with this operation: EINVAL in a bare kernel, 0 from a supervisor that holds the listener.
RENDEZVOUS = 0x66756D65
ANNOUNCEMENT = struct.Struct("!I")
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE_RECV = 1, 8, 32


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _load(program: bytes, flags: int) -> int:
    if not program or len(program) % 8 or len(program) // 8 > 4096:  # BPF_MAXINSNS
        raise ValueError(f"{len(program)} bytes are no filter program")
    buffer = ctypes.create_string_buffer(program, len(program))
    wanted = _Program(len(program) // 8, ctypes.addressof(buffer))
    return syscalls.call(syscalls.SECCOMP, _SET_MODE_FILTER, flags, wanted)


def install(program: bytes) -> None:
    """Confines the calling thread and all that it starts. Needs no_new_privs. Raises OSError."""
    _load(program, 0)


def install_with_listener(program: bytes, channel: int) -> None:
    """Confines the process; returns once the supervisor answers for it. Raises OSError, with nothing else undone.

    `channel` is a datagram socket to the supervisor (its end has SO_PASSCRED); it is closed here, before the filter, so
    user code never holds it. The process must be single-threaded: the listener's number is foretold.
    """
    # pidfd_getfd by a supervisor that is not root asks for a dumpable target (ptrace(2), access mode checking).
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
    lowest = os.dup(channel)
    expected = min(lowest, channel)  # what is the lowest free one when both are closed
    try:
        os.write(channel, ANNOUNCEMENT.pack(expected))
    finally:
        os.close(channel)
        os.close(lowest)
    listener = _load_with_listener(program)
    if listener != expected:
        raise OSError(errno.EBUSY, f"the listener is descriptor {listener}, {expected} was announced")
    # With the supervisor gone this waits for ever, killable, as the listener lives on in this process: it never runs on.
    syscalls.call(syscalls.SECCOMP, RENDEZVOUS, 0, 0)
    with suppress(OSError):  # a profile may refuse close(): the listener's ioctls are refused and it is close-on-exec
        os.close(listener)


def _load_with_listener(program: bytes) -> int:
    try:  # Linux 5.19: a signal no longer aborts and repeats a call that is being answered, so it is counted once
        return _load(program, _NEW_LISTENER | _WAIT_KILLABLE_RECV)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    return _load(program, _NEW_LISTENER)


def channel() -> tuple[socket.socket, socket.socket]:
    """(supervisor's end, sandbox's end): one pair serves every user process of a sandbox."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.setblocking(False)
    return ours, theirs
