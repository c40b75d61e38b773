"""Drives session_main in real forked children of a real zygote. Run as a program, it is that zygote."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fumehood.agent import wire

DEADLINE_S = 15  # bounds a hang; no test measures time


def zygote_main(channel_fd: int, modules: list[str]) -> None:
    """For each message {"language", "cwd"} with fds (control, stdout, stderr): fork a session, answer with its pid."""
    if modules == ["no-ipython"]:
        sys.modules["IPython"] = None  # type: ignore[assignment]
    from fumehood.agent import python, session

    if modules and modules != ["no-ipython"]:
        python.preload(modules)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, as the agent has it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    channel = socket.socket(fileno=channel_fd)
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 4096, 3)
        if not data:
            os._exit(0)
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            channel.close()
            os.dup2(fds[1], 1)
            os.dup2(fds[2], 2)
            os.closerange(fds[0] + 1, 64)
            session.session_main(socket.socket(fileno=fds[0]), request["language"], request["cwd"])
        for fd in fds:
            os.close(fd)
        channel.sendall(pid.to_bytes(4, "big"))


class Zygote:
    def __init__(self, modules: list[str], env: dict[str, str] | None = None, cwd: str = "/") -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env={**_environment(), **(env or {})},
            )

    def session(self, cwd: Path, language: str = "python") -> Client:
        control, theirs = socket.socketpair()
        out, out_w = os.pipe()
        err, err_w = os.pipe()
        message = json.dumps({"language": language, "cwd": str(cwd)}).encode()
        socket.send_fds(self.channel, [message], [theirs.fileno(), out_w, err_w])
        pid = int.from_bytes(self.channel.recv(4), "big")
        theirs.close()
        os.close(out_w)
        os.close(err_w)
        return Client(pid, control, out, err)

    def close(self) -> None:
        self.channel.close()
        self.process.wait(DEADLINE_S)


def _environment() -> dict[str, str]:
    """With the package that these tests have imported, not the one that is installed."""
    package = str(Path(wire.__file__).parents[2])
    return {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": package, "MPLCONFIGDIR": _font_cache()}


def _font_cache() -> str:
    path = Path("/tmp/fumehood-tests-mpl")
    path.mkdir(exist_ok=True)
    return str(path)


@dataclass
class Answer:
    stdout: str = ""
    stderr: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        return self.end["ok"]["outcome"]

    @property
    def results(self) -> list[dict[str, Any]]:
        return [e["data"] for e in self.events if e["type"] == "result"]

    @property
    def main(self) -> dict[str, Any]:
        (found,) = [e["data"] for e in self.events if e["type"] == "result" and e["is_main_result"]]
        return found

    @property
    def error(self) -> dict[str, Any]:
        (found,) = [e for e in self.events if e["type"] == "error"]
        return found


class Client:
    """The agent's part of one session."""

    def __init__(self, pid: int, control: socket.socket, out: int, err: int) -> None:
        self.pid, self.control, self.out, self.err = pid, control, out, err
        self.stream = 0
        self.decoder = wire.Decoder()

    def run(self, code: str, env: dict[str, str] | None = None, interrupt_at: str | None = None) -> Answer:
        """`interrupt_at`: send SIGINT once this text has arrived on stdout."""
        return self.request({"verb": "run", "code": code, "env": env or {}}, interrupt_at)

    def request(self, value: dict[str, Any], interrupt_at: str | None = None) -> Answer:
        self.stream += 1
        self.control.sendall(wire.encode_json(self.stream, wire.OPEN, value))
        return self.answer(interrupt_at)

    def answer(self, interrupt_at: str | None = None) -> Answer:
        """To the request that was sent last."""
        answer = Answer()
        interrupted = False
        limit = time.monotonic() + DEADLINE_S
        while not answer.end:
            ready, _, _ = select.select([self.control, self.out, self.err], [], [], 0.5)
            assert time.monotonic() < limit, f"no END within {DEADLINE_S} s: {answer}"
            if interrupted and not ready:
                os.kill(self.pid, signal.SIGINT)  # CPython may have entered time.sleep() with the first one noted only
            self._read(ready, answer)
            if interrupt_at is not None and interrupt_at in answer.stdout:
                os.kill(self.pid, signal.SIGINT)
                interrupt_at, interrupted = None, True
        while ready := select.select([self.out, self.err], [], [], 0)[0]:  # flushed before END
            if not self._read(ready, answer):
                break
        return answer

    def _read(self, ready: list[Any], answer: Answer) -> int:
        total = 0
        if self.out in ready:
            total += len(data := os.read(self.out, 1 << 16))
            answer.stdout += data.decode()
        if self.err in ready:
            total += len(data := os.read(self.err, 1 << 16))
            answer.stderr += data.decode()
        if self.control in ready:
            data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 4)
            assert data, f"the session died: {answer}"
            total += len(data)
            answer.fds += fds
            for frame in self.decoder.feed(data):
                assert frame.stream == self.stream
                value = frame.json()
                if frame.kind == wire.END:
                    answer.end = value
                else:
                    answer.events.append(value)
        return total

    def fork(self, verb: str) -> Client:
        """checkpoint or wake: the new process, which shares our pipes."""
        return self.adopted(self.request({"verb": verb}))

    def adopted(self, answer: Answer) -> Client:
        (fd,) = answer.fds
        return Client(answer.end["ok"]["pid"], socket.socket(fileno=fd), os.dup(self.out), os.dup(self.err))

    def close(self) -> None:
        self.control.close()
        os.close(self.out)
        os.close(self.err)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


if __name__ == "__main__":
    zygote_main(int(sys.argv[1]), sys.argv[2:])
