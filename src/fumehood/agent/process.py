"""exec.*: programs. A process belongs to the sandbox, not to the stream that started it: streams come and go."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import termios
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from . import changes, child, wire
from .loop import Later, Loop, Refused, Stream, Task
from .pipes import Ends, Input, Output

HANGUP_S = 0.25  # after the leader's death the kernel hangs its terminal up; this is how long we wait to see it
CTRL_D = b"\x04"


class Process:
    def __init__(self, argv: Sequence[str], cwd: str, tag: str | None, pty: bool) -> None:
        self.argv, self.cwd, self.tag, self.pty = argv, cwd, tag, pty
        self.pid = 0
        self.followers: list[Stream] = []
        self.outputs: list[Output] = []
        self.input: Input | None = None

    def tell(self, channel: int, data: bytes) -> None:
        for stream in self.followers:
            stream.data(channel, data)

    def write(self, data: bytes) -> None:
        if self.input is None:
            raise Refused("invalid", f"process {self.pid} was started without stdin")
        try:
            self.input.write(data)
        except OSError:  # no room for what waits: better no more input than input with a hole
            self.input.abandon()
            raise

    def eof(self) -> None:
        if self.input is None:
            return
        if self.pty:
            self.input.write(CTRL_D)  # a terminal has no end: this is how a person says it
        else:
            self.input.close()

    def close(self) -> None:
        for output in self.outputs:
            output.close()
        if self.input:
            self.input.abandon()


class Processes:
    def __init__(self, loop: Loop, home: str, confine: Callable[[], None], children: dict[int, Later]) -> None:
        self._loop, self._home, self._confine, self._children = loop, home, confine, children
        self._live: dict[int, Process] = {}

    def start(
        self,
        stream: Stream,
        argv: list[str],
        env: Mapping[str, str],
        cwd: str,
        stdin: bool,
        pty: tuple[int, int] | None,
        tag: str | None,
    ) -> None:
        """Raises Refused and OSError when nothing was started; a failing execve is answered on the stream."""
        process = Process(argv, cwd, tag, pty is not None)
        before = changes.scan(self._home)
        with Ends() as ends:
            inner, mine = _terminal(ends, pty) if pty else _pipes(ends, stdin)
            failure, failure_inner = ends.from_child()
            process.pid = child.fork(lambda: _become(argv, env, cwd, pty is not None, self._confine, failure_inner), inner)
        exited = self._children[process.pid] = Later(self._loop)
        self._connect(process, mine)
        self._follow(process, stream)
        self._loop.start(self._live_and_die(process, failure, exited, before))

    def _connect(self, process: Process, mine: dict[int, int]) -> None:
        if wire.STDIN in mine:
            process.input = Input(self._loop, mine.pop(wire.STDIN))
        process.outputs = [Output(self._loop, fd, channel, process.tell) for channel, fd in mine.items()]

    def _follow(self, process: Process, stream: Stream) -> None:
        process.followers.append(stream)
        stream.on_data = lambda channel, data: process.write(data)
        stream.on_close = process.eof

        def leave() -> None:
            process.followers.remove(stream)
            stream.end({"exit_code": None, "signal": None, "changed": []})

        stream.on_cancel = leave

    def _live_and_die(self, process: Process, failure: int, exited: Later, before: changes.Scan) -> Task:
        """One ordered recipe: execve done -> started -> output -> exit -> the rest of the output -> END."""
        os.set_blocking(failure, False)
        executed = Later(self._loop)
        self._loop.reading(failure, lambda: executed.resolve(True))
        yield executed
        self._loop.forget(failure)
        report = os.read(failure, 200)
        os.close(failure)
        if report:
            self._finish(process, _explain(report.decode(errors="replace"), process))
            return
        self._live[process.pid] = process
        for stream in process.followers:
            stream.event({"type": "started", "pid": process.pid})
        for output in process.outputs:
            output.start()
        status: int = yield exited
        if process.pty:
            self._loop.later(HANGUP_S, lambda: process.outputs[0].close())
            yield process.outputs[0].ended
        for output in process.outputs:
            yield from output.drain()
        if self._live.get(process.pid) is process:  # its pid may already be another's
            del self._live[process.pid]
        self._finish(process, {**ending(status), **changes.difference(before, changes.scan(self._home))})

    def _finish(self, process: Process, outcome: dict[str, Any] | Refused) -> None:
        process.close()
        for stream in process.followers:
            with stream.answering():  # what was changed may be too much for a frame
                if isinstance(outcome, Refused):
                    raise outcome
                stream.end(outcome)

    def attach(self, stream: Stream, pid: int) -> None:
        process = self._find(pid)
        self._follow(process, stream)
        stream.event({"type": "started", "pid": pid})

    def write(self, stream: Stream, pid: int) -> None:
        process = self._find(pid)
        stream.on_data = lambda channel, data: process.write(data)
        stream.on_close = lambda: stream.end({})

    def eof(self, pid: int) -> None:
        self._find(pid).eof()

    def signal(self, pid: int, number: int, group: bool) -> None:
        self._find(pid)  # only what exec started, so never PID 1 and never a group of the caller's choice
        if number not in signal.valid_signals():
            raise Refused("invalid", f"no signal {number}")
        (os.killpg if group else os.kill)(pid, number)

    def resize(self, pid: int, rows: int, cols: int) -> None:
        process = self._find(pid)
        if not process.pty:
            raise Refused("invalid", f"process {pid} has no terminal")
        _set_size(process.outputs[0].fd, (rows, cols))  # the kernel sends SIGWINCH to the foreground group

    def list(self) -> list[dict[str, Any]]:
        return [{"pid": p.pid, "argv": p.argv, "cwd": p.cwd, "tag": p.tag, "pty": p.pty} for p in self._live.values()]

    def kill_all(self) -> None:
        for pid in self._live.keys() & self._children.keys():
            os.killpg(pid, signal.SIGKILL)

    def _find(self, pid: int) -> Process:
        if pid not in self._live or pid not in self._children:  # not a child any more = reaped, the pid is free again
            raise Refused("not_found", f"no process {pid}: it has ended, or exec.start did not start it")
        return self._live[pid]


def ending(status: int) -> dict[str, Any]:
    """A wait status as the keys of an END."""
    code = os.waitstatus_to_exitcode(status)
    return {"exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None}


def _pipes(ends: Ends, stdin: bool) -> tuple[list[int], dict[int, int]]:
    """(the child's 0-2, the agent's ends by channel)."""
    ours: dict[int, int] = {}
    if stdin:
        ours[wire.STDIN], zero = ends.to_child()
    else:
        zero = ends.null()
    ours[wire.STDOUT], one = ends.from_child()
    ours[wire.STDERR], two = ends.from_child()
    return [zero, one, two], ours


def _terminal(ends: Ends, size: tuple[int, int]) -> tuple[list[int], dict[int, int]]:
    reader, writer, slave = ends.terminal()
    _set_size(reader, size)
    return [slave] * 3, {wire.STDIN: writer, wire.TERMINAL: reader}


def _set_size(fd: int, size: tuple[int, int]) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


def _become(
    argv: list[str], env: Mapping[str, str], cwd: str, tty: bool, confine: Callable[[], None], failure: int
) -> NoReturn:
    """In the child. `failure` closes by itself at execve; until then it tells the agent what went wrong."""
    stage = "start"
    try:
        if tty:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        stage = "cwd"
        os.chdir(cwd)
        stage = "confine"
        child.confined(confine, keep=failure)  # H8: from here on the caller's words count, before here none does
        stage = "execve"
        os.execvpe(argv[0], argv, env)
    except BaseException as e:
        os.write(failure, f"{stage}:{getattr(e, 'errno', None) or 0}:{e}".encode(errors="replace")[:200])
    os._exit(127)


def _explain(report: str, process: Process) -> Refused:
    stage, number, text = report.split(":", 2)
    reason = os.strerror(int(number)) if int(number) else text
    name = errno.errorcode.get(int(number), "")
    if stage == "cwd":
        return Refused("invalid", f"cwd {process.cwd!r}: {reason}", name)
    if stage == "execve":
        return Refused("not_found" if name == "ENOENT" else "invalid", f"{process.argv[0]!r}: {reason}", name)
    return Refused("internal", f"nothing was run, the child failed at {stage}: {reason}", name)


def kill_group(pid: int) -> None:
    """setsid() made the session the leader of its group; a twin leads its own."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def ran_s(pid: int) -> tuple[float, bool]:
    """How long its main thread had a processor, and whether it wants one now, or waits for the kernel (proc(5), stat).

    Not what schedstat says of its waiting: that has a wait only once it is over, and the first may be longer than any grace.
    """
    with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/task/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] in "RD"
    return 0.0, False
