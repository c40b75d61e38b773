"""bash and node contexts: one child process each, which keeps the state between runs.

Code and answers travel on a private socket or pipe; the child's descriptors 1 and 2 are the session's own. A child that
ended (`exit 3`, process.exit()) gave its run an exit code; the next run starts a fresh one, with fresh state.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .node import DRIVER
from .rich import result_event

Emit = Callable[[dict[str, Any]], None]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_LOOK_S = 0.05  # how often a run looks for a pending SIGINT
_GRACE_S = 0.5  # for what SIGINT interrupts to answer, before SIGKILL
_PR_SET_PDEATHSIG = 1
_STARTUP_VARIABLES = ("BASH_ENV", "ENV", "PROMPT_COMMAND", "SHELLOPTS", "BASHOPTS", "NODE_OPTIONS")
_libc = ctypes.CDLL(None)


def interrupt_group() -> None:
    """SIGINT to the session's process group, as a terminal's ^C does it, without the session itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.killpg(os.getpgrp(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interrupt_pending() -> Generator[None]:
    """SIGINT only becomes pending, to be looked for where it can be acted on: raised elsewhere it would leave the run to
    go on alone, or half a request on the channel."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if signal.SIGINT in signal.sigpending():
            signal.sigwait({signal.SIGINT})  # the run has ended: it came too late
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _die_with_session() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ticks() -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _descendants(pid: int, since: int) -> set[int]:
    """Those of `pid` that started at clock tick `since` or later (proc(5), stat fields 4 and 22)."""
    born: dict[int, tuple[int, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            born[int(stat.parent.name)] = int(fields[1]), int(fields[19])
    family = {pid}
    while more := {p for p, (parent, _) in born.items() if parent in family} - family:
        family |= more
    return {p for p in family - {pid} if born[p][1] >= since}


def kill_all(pid: int, since: int, spare: bool = False) -> None:
    """What the interrupted run started and SIGINT did not end, and `pid` unless spared. Jobs of earlier runs stay."""
    if not spare:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)  # it forks no more
    for one in _descendants(pid, since) | (set[int]() if spare else {pid}):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


class _Shell:
    """The part that bash and node share: a lazy child, one run at a time, interrupts, a death in mid-run."""

    forkable = False
    survives = False  # an interrupt

    def __init__(self, cwd: str) -> None:
        self.emit: Emit = lambda _event: None
        self.execution_count = 1
        self._cwd = cwd
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, code: str, env: Mapping[str, str]) -> dict[str, Any]:
        count = self.execution_count
        self.execution_count += 1
        child = self._living_child()
        since = ticks()
        with _interrupt_pending():
            with contextlib.suppress(BrokenPipeError):  # dead this moment: _hear() finds that
                self._channel.sendall(self.request(count, code, env))
            answer, interrupted = self._follow(count, child, since)
        return {"execution_count": count, **self._conclude(answer, interrupted)}

    def _follow(self, count: int, child: subprocess.Popen[bytes], since: int) -> tuple[bytes | None, bool]:
        """The answer (None = the child died) and whether the run was interrupted."""
        try:
            return self._hear(count, child, None), False
        except KeyboardInterrupt:
            interrupt_group()
        try:
            answer = self._hear(count, child, _GRACE_S)
        except TimeoutError:
            answer = None
        kill_all(child.pid, since, spare=self.survives and answer is not None)
        return answer if self.survives else None, True

    def _living_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._channel, theirs = socket.socketpair()
            with theirs:
                self._child = self.start(theirs.fileno())
            self._rest = b""
        return self._child

    def _hear(self, count: int, child: subprocess.Popen[bytes], timeout_s: float | None) -> bytes | None:
        """This run's line, or None when the child died: whatever a grandchild still holds open doesn't matter.

        Raises KeyboardInterrupt for a SIGINT, and TimeoutError after `timeout_s`, which makes it deaf to SIGINT.
        """
        limit = None if timeout_s is None else time.monotonic() + timeout_s
        pidfd = os.pidfd_open(child.pid)
        watched: list[Any] = [self._channel, pidfd]
        try:
            while True:
                line, newline, rest = self._rest.partition(b"\n")
                if newline:
                    self._rest = rest
                    if self.number(line) == count:
                        return line
                    continue  # the late answer of a run that was interrupted
                ready, _, _ = select.select(watched, [], [], _LOOK_S)
                data = b""
                if self._channel in ready:
                    with contextlib.suppress(ConnectionResetError):  # it died with lines unread
                        data = self._channel.recv(1 << 16)
                    if not data:
                        watched = [pidfd]
                if pidfd in ready and not data:
                    return None
                self._rest += data
                if limit is None and signal.SIGINT in signal.sigpending():
                    signal.sigwait({signal.SIGINT})
                    raise KeyboardInterrupt
                if limit is not None and time.monotonic() > limit:
                    raise TimeoutError
        finally:
            os.close(pidfd)

    def _conclude(self, answer: bytes | None, interrupted: bool) -> dict[str, Any]:
        """For a child that died of a signal exit_code is 128 + its number, as shells have it."""
        if answer is not None:
            return self.conclude(answer, interrupted)
        assert self._child is not None
        status = self._child.wait()
        self._child = None
        self._channel.close()
        code = status if status >= 0 else 128 - status
        return self.interrupted() | {"exit_code": code} if interrupted else self.exited(code)

    def exited(self, code: int) -> dict[str, Any]:
        if code:
            self.fail("ExitStatus", str(code), f"exit status {code}")
        return {"outcome": "error" if code else "ok", "exit_code": code}

    def interrupted(self) -> dict[str, Any]:
        self.fail("KeyboardInterrupt", "", "KeyboardInterrupt")
        return {"outcome": "interrupted"}

    def fail(self, name: str, value: str, text: str) -> None:
        self.emit({"type": "error", "name": name, "value": value, "traceback": text})

    def start(self, fd: int) -> subprocess.Popen[bytes]:
        """The child, with `fd` as its end of the channel. Raises OSError."""
        raise NotImplementedError

    def request(self, count: int, code: str, env: Mapping[str, str]) -> bytes:
        raise NotImplementedError

    def number(self, line: bytes) -> int:
        raise NotImplementedError

    def conclude(self, answer: bytes, interrupted: bool) -> dict[str, Any]:
        raise NotImplementedError


class Bash(_Shell):
    """A run's exit_code is the last command's; not 0 is outcome error. An interrupt ends bash and its variables.

    (An interactive bash would survive it, but a SIGINT near a fork can leave one that hangs in the next run.)
    It reads the channel as stdin; the user's code has /dev/null there.
    """

    def start(self, fd: int) -> subprocess.Popen[bytes]:
        return _spawn(("bash", "--norc", "--noprofile"), self._cwd, fd, ())

    def request(self, count: int, code: str, env: Mapping[str, str]) -> bytes:
        names = [n for n in env if _NAME.match(n)]
        keep = [f'[ -n "${{{n}+x}}" ] && __fumehood_{n}="${n}" || unset __fumehood_{n}' for n in names]
        put = [f"export {n}={shlex.quote(env[n])}" for n in names]
        back = [f'[ -n "${{__fumehood_{n}+x}}" ] && export {n}="$__fumehood_{n}" || unset {n}' for n in names]
        run = f"eval -- {shlex.quote(code)} </dev/null"
        lines = [*keep, *put, run, "__fumehood_status=$?", *back, f"echo {count} $__fumehood_status >&0", ""]
        return "\n".join(lines).encode(errors="surrogateescape")

    def number(self, line: bytes) -> int:
        return int(line.split()[0])

    def conclude(self, answer: bytes, interrupted: bool) -> dict[str, Any]:
        code = int(answer.split()[1])
        return self.interrupted() | {"exit_code": code} if interrupted else self.exited(code)


class Node(_Shell):
    survives = True

    def start(self, fd: int) -> subprocess.Popen[bytes]:
        return _spawn(("node", "-e", DRIVER, str(fd)), self._cwd, subprocess.DEVNULL, (fd,))

    def request(self, count: int, code: str, env: Mapping[str, str]) -> bytes:
        return json.dumps({"run": count, "code": code, "env": dict(env)}).encode() + b"\n"

    def number(self, line: bytes) -> int:
        return json.loads(line)["run"]

    def conclude(self, answer: bytes, interrupted: bool) -> dict[str, Any]:
        said = json.loads(answer)
        if interrupted or "interrupted" in said:
            return self.interrupted()
        if "error" in said:
            self.fail(**said["error"])
            return {"outcome": "error"}
        if "data" in said:
            self.emit(result_event(said["data"], main=True))
        return {"outcome": "ok"}


def _spawn(argv: Sequence[str], cwd: str, stdin: int, keep: Sequence[int]) -> subprocess.Popen[bytes]:
    # H8: none of the files and variables that a shell or node runs at its start.
    env = {k: v for k, v in os.environ.items() if k not in _STARTUP_VARIABLES and not k.startswith("BASH_FUNC_")}
    return subprocess.Popen(argv, stdin=stdin, pass_fds=keep, cwd=cwd, env=env, preexec_fn=_die_with_session)
