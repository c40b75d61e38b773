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
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from .node import DRIVER
from .rich import result_event

Emit = Callable[[dict[str, Any]], None]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_AGAIN_S = 0.5  # between one SIGINT and the next: a signal that falls into a fork can be lost
_MAX_INTERRUPTS = 6
_SETTLE_S = 0.1
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
def _no_interrupt() -> Generator[None]:
    """Half a request must not stay on the channel."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _die_with_session() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Shell:
    """The part that bash and node share: a lazy child, one run at a time, interrupts, a death in mid-run."""

    forkable = False

    def __init__(self, cwd: str) -> None:
        self.emit: Emit = lambda _event: None
        self.execution_count = 1
        self._cwd = cwd
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, code: str, env: Mapping[str, str]) -> dict[str, Any]:
        count = self.execution_count
        self.execution_count += 1
        interrupts = 0
        child = self._living_child()
        try:
            with _no_interrupt():
                self._channel.sendall(self.request(count, code, env))
        except BrokenPipeError:
            pass  # it died this moment: _hear() finds that
        while True:
            try:
                answer = self._hear(count, child, _AGAIN_S if interrupts else None)
                break
            except (KeyboardInterrupt, TimeoutError):
                interrupts += 1
                if interrupts > _MAX_INTERRUPTS:
                    self._give_up(child)
                self.interrupt(count)
        if interrupts and answer is not None:
            self.settle(child)
        return {"execution_count": count, **self._conclude(answer, interrupts > 0)}

    def _give_up(self, child: subprocess.Popen[bytes]) -> None:
        child.kill()
        print("the shell did not survive the interrupt: the next run has a new one, without its variables", file=sys.stderr)

    def settle(self, child: subprocess.Popen[bytes]) -> None:
        """After an interrupt: make sure that the child is ready for the next run, or gone."""

    def _living_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._channel, theirs = socket.socketpair()
            with theirs:
                self._child = self.start(theirs.fileno())
            self._rest = b""
        return self._child

    def _hear(self, count: int, child: subprocess.Popen[bytes], timeout_s: float | None = None) -> bytes | None:
        """This run's line, or None when the child died: whatever a grandchild still holds open doesn't matter.

        Raises TimeoutError when nothing came for `timeout_s`.
        """
        pidfd = os.pidfd_open(child.pid)
        try:
            while True:
                line, newline, rest = self._rest.partition(b"\n")
                if newline:
                    self._rest = rest
                    if self.number(line) == count:
                        return line
                    continue  # the answer of a run that was interrupted twice
                ready, _, _ = select.select([self._channel, pidfd], [], [], timeout_s)
                if not ready:
                    raise TimeoutError
                data = self._channel.recv(1 << 16) if self._channel in ready else b""
                if not data and pidfd in ready:
                    return None
                self._rest += data
        finally:
            os.close(pidfd)

    def interrupt(self, count: int) -> None:
        with _no_interrupt():
            interrupt_group()
            with contextlib.suppress(BrokenPipeError):
                self._channel.sendall(self.nudge(count))

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

    def nudge(self, count: int) -> bytes:
        """What makes the child answer run `count` though the interrupt fell on the very line that would have."""
        return b""

    def conclude(self, answer: bytes, interrupted: bool) -> dict[str, Any]:
        raise NotImplementedError


class Bash(_Shell):
    """A run's exit_code is the last command's; not 0 is outcome error.

    -i, because only an interactive bash gives up the whole run on SIGINT and lives on. Its prompts are empty. It reads the
    channel as stdin; the user's code has /dev/null there.
    """

    _ARGV = ("bash", "--norc", "--noprofile", "--noediting", "+o", "history", "+o", "histexpand", "-i")
    # SIGINT may meet a child that bash has forked and that has not called exec yet: it still has bash's handler, goes to
    # bash's top level and reads our next line. That child dies of SIGINT here, as bash expects of it.
    _GUARD = "[ $BASHPID = $$ ] || exec sh -c 'kill -INT $$'"
    _terminal = -1
    _pings = 0

    def start(self, fd: int) -> subprocess.Popen[bytes]:
        stderr, terminal = os.dup(2), self._some_terminal()
        try:
            child = _spawn(self._ARGV, self._cwd, {"PS1": "", "PS2": ""}, fd, (stderr,), terminal)
        finally:
            os.close(stderr)
            os.close(terminal)
        self._channel.sendall(f"exec 2>&{stderr} {stderr}>&-\n".encode())
        return child

    def _some_terminal(self) -> int:
        """At its start -i takes stderr for its terminal: it says there that job control can't work, and restores its
        settings when a program was killed, loudly if it can't. So stderr is an idle terminal then, the real one later."""
        if self._terminal >= 0:
            os.close(self._terminal)
        try:
            self._terminal, slave = os.openpty()
        except OSError:  # no /dev/pts in this sandbox: noisier, no worse
            self._terminal, slave = -1, os.open(os.devnull, os.O_WRONLY)
        return slave

    def request(self, count: int, code: str, env: Mapping[str, str]) -> bytes:
        names = [n for n in env if _NAME.match(n)]
        keep = [f'[ -n "${{{n}+x}}" ] && __fumehood_{n}="${n}" || unset __fumehood_{n}' for n in names]
        put = [f"export {n}={shlex.quote(env[n])}" for n in names]
        self._back = "".join(f'[ -n "${{__fumehood_{n}+x}}" ] && export {n}="$__fumehood_{n}" || unset {n}; ' for n in names)
        # The answer is a line of its own: SIGINT throws away the line that runs.
        run = f"eval -- {shlex.quote(code)} </dev/null"
        lines = [*keep, *put, run, f"__fumehood_status=$?; {self._answer(count, '$__fumehood_status')}"]
        return "\n".join([*lines, ""]).encode(errors="surrogateescape")

    def _answer(self, count: int, status: str) -> str:
        return f"{self._GUARD}; {self._back}echo {count} {status} >&0"

    def settle(self, child: subprocess.Popen[bytes]) -> None:
        """SIGINT near a fork can leave a program running, or bash believing in a child that it has already reaped: it then
        spins in wait(2) at its next fork. So: SIGINT again, until bash forks, waits and answers. One that can't is killed."""
        with _no_interrupt():
            for _ in range(10):
                self._pings -= 1
                self.interrupt(self._pings)
                with contextlib.suppress(TimeoutError):
                    self._hear(self._pings, child, _SETTLE_S)
                    return
        self._give_up(child)

    def number(self, line: bytes) -> int:
        return int(line.split()[0])

    def nudge(self, count: int) -> bytes:
        return f"(:); {self._answer(count, '130')}\n".encode()

    def conclude(self, answer: bytes, interrupted: bool) -> dict[str, Any]:
        code = int(answer.split()[1])
        return self.interrupted() | {"exit_code": code} if interrupted else self.exited(code)


class Node(_Shell):
    def start(self, fd: int) -> subprocess.Popen[bytes]:
        return _spawn(("node", "-e", DRIVER, str(fd)), self._cwd, {}, subprocess.DEVNULL, (fd,), None)

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


def _spawn(
    argv: Sequence[str], cwd: str, extra: Mapping[str, str], stdin: int, keep: Sequence[int], stderr: int | None
) -> subprocess.Popen[bytes]:
    # H8: none of the files and variables that a shell or node runs at its start.
    env = {k: v for k, v in os.environ.items() if k not in _STARTUP_VARIABLES and not k.startswith("BASH_FUNC_")}
    return subprocess.Popen(
        argv, stdin=stdin, stderr=stderr, pass_fds=keep, cwd=cwd, env={**env, **extra}, preexec_fn=_die_with_session
    )
