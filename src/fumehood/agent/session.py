"""One context's process: a loop over requests from the agent, in a child that the agent forked.

Requests are OPEN frames on the control socket; each is answered by EVENTs and one END on its stream.
run {"code", "env"}; warm {"fully"?}; settle {}; checkpoint {}: a stopped twin of this process, whose control socket rides on
the END; and, to a twin, wake {}: a live copy of it, whose control socket rides on the END. Both say the new process's {"pid"}.
"reseed": true in a request comes before all else: the machine was cloned since the last one.
A twin and its copies are orphans on purpose, so that they become children of the agent, which is PID 1 or a subreaper: it
reaps them.
Threads, child processes and running asyncio tasks are not in a checkpoint. A closed control socket ends the process.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from . import child, identity, pages, python, shells, wire
from .asked import Refused, code_and_env
from .streams import open_streams


class Executor(Protocol):
    forkable: bool  # has all its state in this process
    emit: python.Emit

    @property
    def execution_count(self) -> int: ...
    def run(self, code: str, env: Mapping[str, str]) -> dict[str, Any]: ...


def languages() -> list[str]:
    """What session_main() can run on this system."""
    return ["python", *(["bash"] if shutil.which("bash") else []), *(["javascript"] if shutil.which("node") else [])]


def session_main(control: socket.socket, language: str, cwd: str) -> NoReturn:
    """Serve `control` until it closes. Exits with 1 and a line on stderr for a bad language, directory or frame."""
    try:
        _settle(cwd)
        Session(control, _executor(language, cwd)).serve()
    except BaseException as e:
        os.write(2, f"session: {''.join(traceback.format_exception_only(e))}".encode(errors="replace"))
    finally:
        os._exit(1)


def _settle(cwd: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until serve(): it may be meant for the first run
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # shells.interrupt_group() means this group
    os.chdir(cwd)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = open_streams(1, 2)
    sys.argv = [""]
    if "" not in sys.path:
        sys.path.insert(0, "")  # as in a notebook: modules beside the user's files
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()  # H20: every fork of the zygote would draw the same numbers; `random` reseeds itself


def _executor(language: str, cwd: str) -> Executor:
    if language not in languages():
        raise ValueError(f"no language {language!r} here: there is {', '.join(languages())}")
    if language == "bash":
        return shells.Bash(cwd)
    return shells.Node(cwd) if language == "javascript" else python.executor()


class Session:
    def __init__(self, control: socket.socket, executor: Executor) -> None:
        self._executor = executor
        self._stream = 0
        self._running = self._interrupted = self._taken = self._sending = self._interrupt_owed = False
        self._twin = False
        self._attach(control)
        executor.emit = self._emit

    def _attach(self, control: socket.socket) -> None:
        self._control, self._pid = control, os.getpid()
        self._decoder, self._held = wire.Decoder(), b""
        self._lock = threading.Lock()  # user threads may display; a fork must not inherit a held lock

    def serve(self) -> NoReturn:
        signal.signal(signal.SIGINT, self._on_sigint)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        while data := self._next_request():
            # One request at a time: the agent queues. After a fork inside, _attach() has made a new decoder.
            for frame in self._decoder.feed(data):
                if frame.kind != wire.OPEN:
                    raise wire.BadFrame(f"a session takes OPEN frames, not kind {frame.kind}")
                self._answer(frame.stream, frame.json())
        os._exit(0)

    def _next_request(self) -> bytes:
        if not self._control.recv(1, socket.MSG_PEEK):
            return b""
        self._taken = True  # while the request is still in the socket, so that _on_sigint() misses no moment
        return self._control.recv(wire.CHUNK_BYTES)

    def _answer(self, stream: int, request: dict[str, Any]) -> None:
        self._stream = stream
        try:
            live = {
                "run": self._run,
                "checkpoint": self._fork,
                "warm": self._warm,
                "settle": self._settle,
            }
            verbs = {"wake": self._fork} if self._twin else live
            verb = verbs.get(str(request.get("verb")))
            if verb is None:
                raise Refused("invalid", f"no verb {request.get('verb')!r} here: there is {', '.join(verbs)}")
            if request.get("reseed"):
                identity.reseed()
            verb(request)
        except Refused as e:
            self._end({"error": {"code": e.code, "message": str(e)}})

    def _run(self, request: dict[str, Any]) -> None:
        code, env = code_and_env(request)
        count = self._executor.execution_count
        self._interrupted = False
        try:
            self._running = True
            self._emit({"type": "count", "execution_count": count})  # and raises an interrupt that is owed
            outcome = self._executor.run(code, env)
            if self._interrupted and outcome["outcome"] == "error":
                outcome["outcome"] = "interrupted"  # libraries turn KeyboardInterrupt into errors of their own
        except KeyboardInterrupt:
            self._running = False  # it came before or after the user's code
            self._emit({"type": "error", "name": "KeyboardInterrupt", "value": "", "traceback": "KeyboardInterrupt"})
            outcome = {"outcome": "interrupted", "execution_count": count}
        finally:
            self._running = self._taken = False
        signal.signal(signal.SIGINT, self._on_sigint)  # user code may have put its own
        _flush()
        if os.getpid() != self._pid:
            os._exit(0)  # user code forked and its child came back here: the run has one answer, the parent's
        self._end({"ok": outcome})

    def _warm(self, request: dict[str, Any]) -> None:
        """Touch what a first cell touches, so that its copied pages are this process's own before somebody waits."""
        fully = bool(request.get("fully"))
        if isinstance(self._executor, python.Python):
            self._executor.warm(fully=fully)
        if fully:
            pages.own()
        self._end({"ok": {}})

    def _settle(self, _request: dict[str, Any]) -> None:
        """A SIGINT sent before this request is handled in here at the latest, and owed to no later run: END forgets it."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # user code may have blocked it; runs the handler
        self._end({"ok": {}})

    def _on_sigint(self, _number: int, _frame: object) -> None:
        """Between runs it means nothing, unless the next run's request has already arrived."""
        if os.getpid() != self._pid or not (self._taken or select.select([self._control], [], [], 0)[0]):
            return
        if self._running and not self._sending:
            self._interrupted = True
            raise KeyboardInterrupt
        self._interrupt_owed = True

    def _emit(self, event: dict[str, Any]) -> None:
        """A run's number and its main result go with what comes next: the END mostly, and each frame by itself costs the agent
        a turn, which in an emulated guest takes 10 ms."""
        frame = wire.encode_json(self._stream, wire.EVENT, event)
        can_wait = event["type"] == "count" or event.get("is_main_result") is True
        self._send(frame, hold=can_wait and len(frame) < wire.CHUNK_BYTES)

    def _end(self, value: dict[str, Any], fds: Sequence[int] = ()) -> None:
        self._taken = self._interrupt_owed = False  # before the agent can know that it has ended, and send the next
        self._send(wire.encode_json(self._stream, wire.END, value), fds)

    def _send(self, frame: bytes, fds: Sequence[int] = (), *, hold: bool = False) -> None:
        if not hold and os.getpid() != self._pid:
            return  # a child that user code forked has no say on our stream
        main = threading.current_thread() is threading.main_thread()
        if main:
            self._sending = True  # a KeyboardInterrupt between two bytes of a frame would break the stream
        try:
            with self._lock:
                frame, self._held = self._held + frame, b""
                if hold:
                    self._held = frame
                else:
                    sent = socket.send_fds(self._control, [frame], fds) if fds else 0
                    self._control.sendall(memoryview(frame)[sent:])
        except OSError:
            os._exit(1)  # the agent is gone, or user code closed the socket: nobody is left to tell
        finally:
            if main:
                self._sending = False
        if main and self._running and self._interrupt_owed:
            self._interrupt_owed, self._interrupted = False, True
            raise KeyboardInterrupt

    def _fork(self, _request: dict[str, Any]) -> None:
        """checkpoint: the copy is a twin. wake: the copy is live."""
        if not self._executor.forkable:
            raise Refused("unsupported", "only python contexts can be checkpointed: this one's state is in its shell")
        ours, theirs = socket.socketpair()
        _flush()
        try:
            pid = child.fork_orphan()
        except BlockingIOError as e:
            raise Refused("internal", str(e.strerror)) from None
        if pid == 0:
            ours.close()
            self._become(theirs)
            return
        theirs.close()
        with ours:
            self._end({"ok": {"pid": pid}}, [ours.fileno()])

    def _become(self, control: socket.socket) -> None:
        os.setsid()  # the agent kills a session by its group
        self._control.close()
        self._attach(control)
        self._interrupt_owed = False  # of the request that made this copy, not of the copy's first run
        self._twin = not self._twin
        if isinstance(self._executor, python.Python):
            self._executor.loop.forget()
        self.serve()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # whatever object user code put there, or a file it closed
            traceback.print_exc(file=sys.__stderr__)
