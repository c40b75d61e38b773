"""Answers what the policy filter refuses, and counts it (M16, H25). One Listener per user process, in the supervisor.

A guest can stop at any moment, lie in its memory, and spam; each `handle` takes a bounded number of calls, so a spammer
waits for itself while the supervisor's other work goes on (H15). Only the look into its memory can block: it takes the
lock of the guest's memory map, which a guest can hold for seconds. So Listeners has that done `aside`, in a thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from fumehood import events
from fumehood.errors import ProtectionUnavailable, WireError
from fumehood.model import ConnectionAttempt
from fumehood.runtime.native import peek, syscalls
from fumehood.runtime.native.libseccomp import name_of
from fumehood.runtime.native.peek import Destination
from fumehood.runtime.native.seccomp_install import ANNOUNCEMENT, RENDEZVOUS

REACH_FIX = "grant the supervisor CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope below 3"
_RECV, _SEND, _ID_VALID = 0xC0502100, 0xC0182101, 0x40082102
_NOTIFICATION = struct.Struct("=QII64s")  # id, pid, flags, struct seccomp_data
_ANSWER = struct.Struct("=QqiI")  # id, value, -errno, flags
_DATA = struct.Struct("=IIQ6Q")
_CONTINUE = 1
_GET_NOTIF_SIZES = 3
_CREDENTIALS = struct.Struct("=iII")
_LINK = "anon_inode:seccomp notify"
_TALKS = ("connect", "sendto", "sendmsg", "sendmmsg")


Aside = Callable[[Callable[[], list[Destination]], Callable[[list[Destination]], None]], None]


def at_once(look: Callable[[], list[Destination]], then: Callable[[list[Destination]], None]) -> None:
    then(look())


class Call(NamedTuple):
    id: int
    pid: int  # as the supervisor sees it; a thread's id if a thread called
    data: bytes
    name: str
    arch: str
    args: tuple[int, ...]


def read_announcement(channel: socket.socket) -> tuple[int, int] | None:
    """(pid, descriptor number) of a process that is about to be filtered; None when none waits.

    The pid is the kernel's word (SCM_CREDENTIALS). Raises WireError for anything else on the channel.
    """
    try:
        data, ancillary, _, _ = channel.recvmsg(ANNOUNCEMENT.size + 1, socket.CMSG_SPACE(_CREDENTIALS.size))
    except BlockingIOError:
        return None
    pids = [_CREDENTIALS.unpack(raw)[0] for _, kind, raw in ancillary if kind == socket.SCM_CREDENTIALS]
    if len(data) != ANNOUNCEMENT.size or len(pids) != 1 or pids[0] <= 0:
        raise WireError(f"{len(data)} bytes and {len(pids)} senders are no listener announcement")
    return pids[0], ANNOUNCEMENT.unpack(data)[0]


def take_listener(pid: int, number: int) -> int | None:
    """The listener of an announced process; None while it has not installed its filter: ask again in a millisecond.

    Raises ProcessLookupError if it is gone, ProtectionUnavailable if this supervisor may not reach into it.
    """
    try:
        fd = peek.copy_descriptor(pid, number)
    except PermissionError as e:
        raise ProtectionUnavailable("can't fetch the seccomp listener", cause=str(e), remediation=REACH_FIX) from None
    except OSError as e:
        if e.errno == errno.EBADF:
            return None
        raise
    if os.readlink(f"/proc/self/fd/{fd}") == _LINK:
        return fd
    os.close(fd)  # the announcing socket itself, about to be closed
    return None


def _sizes() -> tuple[int, int]:
    """What this kernel writes and reads for one notification; newer kernels may know longer ones."""
    sizes = ctypes.create_string_buffer(6)
    syscalls.call(syscalls.SECCOMP, _GET_NOTIF_SIZES, 0, sizes)
    notification, answer, _ = struct.unpack("=HHH", sizes.raw)
    return max(notification, _NOTIFICATION.size), max(answer, _ANSWER.size)


class Listener:
    """`refused` is seccomp.refused_errno(profile). Owns `fd`. With `egress`, destinations are left to the proxy.

    `aside(look, then)` calls look(), wherever it may block, and later then(what it found) where handle() is called.
    """

    def __init__(
        self,
        fd: int,
        sandbox_id: str,
        refused: Callable[[bytes], int],
        on_event: Callable[[events.Event], None],
        *,
        egress: bool = False,
        aside: Aside = at_once,
    ) -> None:
        self._fd, self._sandbox_id, self._refused, self._on_event, self._egress = fd, sandbox_id, refused, on_event, egress
        self._aside = aside
        self._sizes = _sizes()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Calls that are still waiting, and all later ones, get ENOSYS. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def handle(self, max_n: int = 64) -> bool:
        """Answers up to `max_n` waiting calls. False once no process uses the filter any more."""
        for _ in range(max_n):
            ready = self._poll.poll(0)
            if not ready or not ready[0][1] & select.POLLIN:
                return not ready or not ready[0][1] & (select.POLLHUP | select.POLLERR)
            if call := self._receive():
                self._answer(call)
        return True

    def _receive(self) -> Call | None:
        buffer = bytearray(self._sizes[0])  # must be zero, seccomp(2)
        try:
            fcntl.ioctl(self._fd, _RECV, buffer)
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.EINTR):  # killed between poll and here
                return None
            raise
        number_id, pid, _, data = _NOTIFICATION.unpack_from(buffer)
        number, arch, _, *args = _DATA.unpack(data)
        return Call(number_id, pid, data, *name_of(arch, number), tuple(args))

    def _answer(self, call: Call) -> None:
        if call.name == "seccomp" and call.arch == "x86_64" and call.args[0] & 0xFFFFFFFF == RENDEZVOUS:
            self._send(call, 0, 0)
        elif code := self._refused(call.data):
            self._refuse(call, code)
        elif call.name in _TALKS:
            self._aside(lambda: self._destinations(call), lambda found: self._judge(call, found))
        else:  # the profile's two programs disagree: impossible, so closed
            self._refuse(call, errno.EPERM)

    def _refuse(self, call: Call, code: int) -> None:
        self._on_event(events.SyscallRefused(self._sandbox_id, call.name, call.arch, call.args, call.pid))
        self._send(call, code, 0)

    def _destinations(self, call: Call) -> list[Destination]:
        return [] if self._egress else list(peek.destinations(call.name, call.pid, call.args))

    def _judge(self, call: Call, found: list[Destination]) -> None:
        if self._fd < 0:  # closed meanwhile, and so answered
            return
        if leaving := [d for d in found if not d.stays_inside]:
            protocol = peek.protocol(call.pid, call.args[0])
            if not self._valid(call):  # died meanwhile, its pid may be another's: what was read means nothing
                return
            for d in leaving:
                attempt = ConnectionAttempt(d.address, d.port, protocol)
                self._on_event(events.EgressDenied(self._sandbox_id, attempt))
            self._send(call, errno.ENETUNREACH, 0)
        else:
            # Continuing after looking at user memory is a race in general (seccomp_unotify(2)); here nothing depends on
            # what was read, as the network namespace has no route for any other address either. A continued call skips
            # the floor too, so only calls that the floor lets pass may ever get here.
            self._send(call, 0, _CONTINUE)

    def _valid(self, call: Call) -> bool:
        try:
            fcntl.ioctl(self._fd, _ID_VALID, struct.pack("=Q", call.id))
        except OSError as e:
            if e.errno == errno.ENOENT:
                return False
            raise
        return True

    def _send(self, call: Call, code: int, flags: int) -> None:
        answer = bytearray(self._sizes[1])
        _ANSWER.pack_into(answer, 0, call.id, 0, -code, flags)
        with suppress(FileNotFoundError):  # ENOENT: the caller was killed while it waited
            fcntl.ioctl(self._fd, _SEND, answer)
