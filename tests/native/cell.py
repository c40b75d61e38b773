"""A real confined child for one probe, and the supervisor's side of it, in one process pair."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fumehood.events import EgressDenied, Event, SyscallRefused
from fumehood.runtime.native import capabilities, notify, seccomp_install
from fumehood.runtime.native.libseccomp import number_of

DEADLINE_S = 10.0  # only so that a broken barrier can't hang the suite
_libc = ctypes.CDLL(None, use_errno=True)


def raw(number: int, *args: int | None) -> int:
    """A bare system call: its value, or minus the errno."""
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a or 0) for a in args))
    return -ctypes.get_errno() if result == -1 else result


def call(name: str, *args: int) -> int:
    number = number_of(name)
    assert number is not None
    return raw(number, *args)


@dataclass
class Outcome:
    report: Any = None
    events: list[Event] = field(default_factory=list[Event])
    status: int = 0  # of waitpid(); SIGKILL if the child never came back

    @property
    def refused(self) -> list[tuple[str, str]]:
        return [(e.name, e.arch) for e in self.events if isinstance(e, SyscallRefused)]

    @property
    def attempts(self) -> list[tuple[str, int, str]]:
        return [(e.attempt.address, e.attempt.port, e.attempt.protocol) for e in self.events if isinstance(e, EgressDenied)]


def in_child(probe: Callable[[], Any]) -> Outcome:
    """Forks, runs the probe, gives its JSON-able value back. No filter is installed here."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(probe, writer)
    os.close(writer)
    return _collect(pid, reader, lambda: None)


def confined(
    probe: Callable[[], Any],
    policy: bytes,
    refused: Callable[[bytes], int],
    floor: bytes | None = None,
    prepare: Callable[[], Any] = lambda: None,
    egress: bool = False,
    deadline_s: float = DEADLINE_S,
) -> Outcome:
    """The same under floor and policy, with a live listener."""
    ours, theirs = seccomp_install.channel()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.close(reader)

        def body() -> Any:
            prepare()
            capabilities.no_new_privs()
            if floor:
                seccomp_install.install(floor)
            seccomp_install.install_with_listener(policy, theirs.detach())
            return probe()

        _child(body, writer)
    theirs.close()
    os.close(writer)
    outcome = Outcome()
    listener = notify.Listener(fetch(ours), "sbxtest", refused, outcome.events.append, egress=egress)
    ours.close()
    try:
        return _collect(pid, reader, listener.handle, outcome, deadline_s)
    finally:
        listener.close()


def fetch(channel: socket.socket) -> int:
    """What the supervisor's loop does, as one blocking step."""
    end = time.monotonic() + DEADLINE_S
    select.select([channel], [], [], DEADLINE_S)
    announced = notify.read_announcement(channel)
    assert announced, "the child announced nothing"
    while (fd := notify.take_listener(*announced)) is None:
        assert time.monotonic() < end, "the child never installed its filter"
        time.sleep(0.0005)
    return fd


def _child(probe: Callable[[], Any], writer: int) -> None:
    faulthandler.disable()  # its handler would be called again and again where rt_sigreturn is refused
    try:
        os.write(writer, json.dumps(probe()).encode())
    except BaseException as e:
        os.write(writer, json.dumps({"raised": repr(e)}).encode())
        os.write(2, f"{e!r}\n".encode())
    finally:
        os._exit(0)


def _collect(
    pid: int, reader: int, tick: Callable[[], Any], outcome: Outcome | None = None, deadline_s: float = DEADLINE_S
) -> Outcome:
    outcome, chunks, end, done = outcome or Outcome(), b"", time.monotonic() + deadline_s, 0
    os.set_blocking(reader, False)
    while not done:
        tick()
        done, outcome.status = os.waitpid(pid, os.WNOHANG)
        chunks += _available(reader)
        if not done and time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0002)
    os.close(reader)
    outcome.report = json.loads(chunks) if chunks else None
    return outcome


def _available(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 20)
    except BlockingIOError:  # a grandchild still holds the other end
        return b""
