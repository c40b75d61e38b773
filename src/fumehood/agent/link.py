"""The agent's end of one session process: its control socket, its two pipes, its death.

All that comes from here was written by user code's own process (H16): kinds are a closed set, sizes are capped by wire.Decoder,
and a broken frame costs the session its life, nobody else.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from . import wire
from .loop import Later, Loop, Task
from .pipes import Output
from .process import ending, kill_group, ran_s

RECV_BYTES = 1 << 16
MAX_DESCRIPTORS = 4
_TURNS = 19  # of patience more, on a machine that is too busy to let a session stop
SETTLE_GRACE_S = 2.0  # to answer when nothing runs: only one that stopped itself, or whose threads keep it from it, takes long
REAP_GRACE_S = 1.0  # an orphan becomes our child and is reaped at once; who claimed a stranger's pid is not waited for
DONT_WAIT = socket.MSG_DONTWAIT  # not O_NONBLOCK: who sent us a socket may keep a copy and clear the shared flag
EVENT_TYPES = ("count", "result", "error")  # tuples: `in` a set would hash what user code sent, and lists have no hash
ERROR_CODES = ("invalid", "not_found", "unsupported", "internal")


class Reply(NamedTuple):
    """What became of a request: END's `ok`, END's `error`, or neither: the session died of `death`."""

    ok: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    death: dict[str, Any] | None = None
    control: socket.socket | None = None  # the socket that came with the END, if any


class Follower(NamedTuple):
    """Where a run's output and events go."""

    data: Callable[[int, bytes], None]
    event: Callable[[dict[str, Any]], None]


class Link:
    def __init__(
        self, loop: Loop, children: dict[int, Later], pid: int, control: socket.socket, outputs: tuple[int, int]
    ) -> None:
        """Owns `control` and `outputs` (the read ends of stdout and stderr), which nobody reads before listen()."""
        self.pid, self._children, self._loop, self._control = pid, children, loop, control
        self._exited = children.setdefault(pid, Later(loop))  # resolves to a wait status
        self.alive, self._deaf = True, False
        self._signalled = False  # a SIGINT was sent that may still be on its way
        self.follower: Follower | None = None
        self._outputs = [Output(loop, fd, wire.STDOUT + i, self._data) for i, fd in enumerate(outputs)]
        self._decoder, self._pending = wire.Decoder(), b""
        self._number, self._call, self._reason = 0, Later(loop), ""
        self._call.resolve(None)
        self._descriptors: list[int] = []
        loop.reading(control.fileno(), self._readable)
        loop.start(self._mourn())

    # -- requests
    def listen(self) -> None:
        """Not for a twin: its pipes are also those of the session that it is a twin of."""
        for output in self._outputs:
            output.start()

    def call(self, request: Mapping[str, Any], follower: Follower | None = None) -> Later:
        """Resolves to a Reply. One at a time."""
        self._number, self._call, self.follower = self._number + 1, Later(self._loop), follower
        if not self.alive:
            self._died()
            return self._call
        self._pending += wire.encode_json(self._number, wire.OPEN, dict(request))
        self._write()
        return self._call

    def drain(self) -> Task:
        """What is in the pipes goes to the follower, who then leaves."""
        for output in self._outputs:
            yield from output.drain()
        self.follower = None

    @property
    def busy(self) -> bool:
        return not self._call.done

    @property
    def doomed(self) -> bool:
        """No request may be sent to it any more, though its death was not seen yet."""
        return not self.alive or self._deaf or bool(self._reason)

    def interrupt(self, grace_s: float, reason: str) -> None:
        """SIGINT to the session itself; SIGKILL to its group if the request is not answered within grace_s."""
        if self.busy and not self._exited.done:
            with contextlib.suppress(ProcessLookupError):  # a woken twin may be reaped by another than us
                os.kill(self.pid, signal.SIGINT)
                self._signalled = True
            self._wait_on(grace_s, self._call, reason, _TURNS)

    def settle(self) -> Task:
        """A SIGINT can cross the END of its run. Then the session may get to it only when the next request is there, and take
        it for that one's; after the answer to this it has come to it.
        """
        while self._signalled:
            self._signalled = False
            call = self.call({"verb": "settle"})
            self._wait_on(SETTLE_GRACE_S, call, "did not settle", _TURNS)
            yield call

    def _wait_on(self, grace_s: float, call: Later, reason: str, turns: int) -> None:
        at_s = ran_s(self.pid)[0]
        self._loop.later(grace_s, lambda: self._lose_patience(grace_s, call, reason, turns, at_s))

    def _lose_patience(self, grace_s: float, call: Later, reason: str, turns: int, at_s: float) -> None:
        if not (call.done or self._loop.full) and self.alive and not self._deaf and self._readable_now():
            self._readable()  # the timer rang late, because we got no processor, and its END is there
        if call.done or not self.alive:
            return
        now_s, is_waiting = ran_s(self.pid)
        if self._loop.full:  # we, not the session, are the slow one: its END may be waiting in the socket
            self._wait_on(grace_s, call, reason, turns)
        elif turns and is_waiting and now_s - at_s < grace_s / 2:  # it would have stopped, and no processor was free
            self._wait_on(grace_s, call, reason, turns - 1)
        else:
            self.kill(reason)

    def kill(self, reason: str) -> None:
        if self.alive and not self._exited.done:  # reaped means that its pid may be another's
            self._reason = self._reason or reason
            kill_group(self.pid)

    def duplicate_outputs(self) -> tuple[int, int]:
        """The same pipes for a twin of the session, which writes to them too once it is woken."""
        out, err = (os.dup(o.fd) for o in self._outputs)
        return out, err

    # -- what arrives
    def _data(self, channel: int, data: bytes) -> None:
        if self.follower:  # else a thread or orphan of an earlier run: nobody's output
            self.follower.data(channel, data)

    def _readable(self) -> None:
        try:
            data = self._receive()
            for frame in self._decoder.feed(data):
                self._accept(frame)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        except wire.BadFrame as e:
            self._hang_up(f"broke the protocol: {e}")
            return
        if not data:
            self._hang_up("")

    def _receive(self) -> bytes:
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, _, _ = self._control.recvmsg(RECV_BYTES, room, DONT_WAIT | socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._descriptors += fds
        if len(self._descriptors) > MAX_DESCRIPTORS:
            raise wire.BadFrame("sends descriptors that nobody asked for")
        return data

    def _accept(self, frame: wire.Frame) -> None:
        if frame.stream != self._number or self._call.done or frame.kind not in (wire.EVENT, wire.END):
            raise wire.BadFrame(f"kind {frame.kind} on stream {frame.stream} is out of place")
        value = frame.json()
        if frame.kind == wire.EVENT:
            if value.get("type") not in EVENT_TYPES or self.follower is None:
                raise wire.BadFrame("an event of an unknown type")
            self.follower.event(value)
        else:
            self._call.resolve(self._reply(value))

    def _reply(self, value: dict[str, Any]) -> Reply:
        ok: Any = value.get("ok")
        error: Any = value.get("error")
        control = self._socket()
        if isinstance(ok, dict):
            return Reply(ok=ok, control=control)
        if isinstance(error, dict):
            code, message = cast(dict[str, Any], error).get("code"), cast(dict[str, Any], error).get("message")
            if code in ERROR_CODES and isinstance(message, str):
                return Reply(error={"code": code, "message": message})
        raise wire.BadFrame("an END that is neither ok nor error")

    def _socket(self) -> socket.socket | None:
        """What came with the END of a checkpoint or wake; with the END of a run nothing is wanted."""
        received, self._descriptors = self._descriptors, []
        wanted = received[:1] if self.follower is None else []
        for fd in received[len(wanted) :]:
            os.close(fd)
        if not wanted:
            return None
        if not stat.S_ISSOCK(os.fstat(wanted[0]).st_mode):
            os.close(wanted[0])
            raise wire.BadFrame("sent a descriptor that is no socket")
        return socket.socket(fileno=wanted[0])

    def _write(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._control.send(self._pending[: wire.CHUNK_BYTES], DONT_WAIT) :]
        except BlockingIOError:
            self._loop.writing(self._control.fileno(), self._write)
            return
        except (BrokenPipeError, ConnectionResetError):
            self._pending = b""  # its death is noticed by reading
        if self.alive:
            self._loop.writing(self._control.fileno(), None)

    # -- death
    def _hang_up(self, reason: str) -> None:
        self._deaf = True
        self._loop.forget(self._control.fileno())
        self.kill(reason)
        self._loop.later(REAP_GRACE_S, self._died)

    def _mourn(self) -> Task:
        yield self._exited
        while self.alive and not self._deaf and self._readable_now():
            self._readable()  # an END that it sent before it died still counts
        self._died()

    def _readable_now(self) -> bool:
        return bool(select.select([self._control], [], [], 0)[0])

    def _died(self) -> None:
        """The outputs stay open for drain(), until close()."""
        if self.alive:
            self.alive = False
            self._loop.forget(self._control.fileno())
            self._control.close()
            for fd in self._descriptors:
                os.close(fd)
            if self._children.get(self.pid) is self._exited:
                del self._children[self.pid]
        status = ending(self._exited.value) if self._exited.done else {"exit_code": None, "signal": None}
        self._call.resolve(Reply(death={**status, **({"reason": self._reason} if self._reason else {})}))

    def close(self) -> None:
        self.kill("closed")
        self._died()
        for output in self._outputs:
            output.close()
