"""QEMU's machine protocol: JSON in lines over a socket. The other end is a process that a guest may have taken over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Sequence
from typing import Any, cast

LINE_BYTES = 64 << 10  # the longest answer to what is asked here has 2 KiB
DEADLINE_S = 60.0  # of a command: on a busy host its main loop may wait long for a core
Message = dict[str, Any]
_KINDS = ("QMP", "return", "error", "event")


class QmpFault(Exception):
    """It refused, came too late, has gone, or what it said is no QMP."""


class QmpEnded(QmpFault):
    """The process has ended, or is about to."""


def encode(number: int, command: str, arguments: Message) -> bytes:
    return json.dumps({"execute": command, "arguments": arguments, "id": number}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """One line: an object of exactly one kind, whose parts have the types that they need. Raises QmpFault."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise QmpFault(f"a line that is not JSON: {e!r:.100}") from None
    message = _object(value, "a line")
    kinds = [kind for kind in _KINDS if kind in message]
    if len(kinds) != 1:
        raise QmpFault(f"a message of kinds {kinds}")
    if kinds[0] in ("QMP", "error"):
        _object(message[kinds[0]], kinds[0])
    if kinds[0] == "error" and not isinstance(message["error"].get("desc"), str):
        raise QmpFault("an error without a description")
    if kinds[0] == "event" and not isinstance(message["event"], str):
        raise QmpFault("an event without a name")
    if kinds[0] in ("return", "error") and type(message.get("id")) is not int:
        raise QmpFault("an answer to nothing that was asked")
    return message


def _object(value: object, what: str) -> Message:
    if not isinstance(value, dict):
        raise QmpFault(f"{what} that is no object")
    return cast("Message", value)


class Lines:
    """Bytes in, lines out; holds at most one unfinished line, of LINE_BYTES."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > LINE_BYTES:
            raise QmpFault(f"a line of more than {LINE_BYTES} bytes")
        return [line for line in lines if line.strip()]


class Qmp:
    """The client's end, which it owns. Commands run one after the other. After the first breach of the protocol all fail."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket: socket.socket = connection
        self._fault: QmpFault | None = None
        self._numbers, self._last, self._turn = itertools.count(1), 0, asyncio.Lock()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._events: dict[str, asyncio.Future[Any]] = {"QMP": _future()}
        self._receiving = asyncio.create_task(self._receive())

    async def start(self, deadline_s: float = DEADLINE_S) -> None:
        """The greeting, and its answer. Raises QmpFault."""
        await self.happened("QMP", deadline_s)
        await self.execute("qmp_capabilities", deadline_s=deadline_s)

    async def execute(
        self, command: str, arguments: Message | None = None, *, fds: Sequence[int] = (), deadline_s: float = DEADLINE_S
    ) -> Any:
        """What it returned. `fds` go along as a copy. Raises QmpFault; a late answer is dropped."""
        try:
            async with asyncio.timeout(deadline_s), self._turn:
                return await self._ask(command, arguments or {}, fds)
        except TimeoutError:
            raise QmpFault(f"no answer to {command} within {deadline_s} s") from None

    def expect(self, event: str) -> None:
        """From now on it is remembered, once, for happened(); all other events are dropped."""
        self._events[event] = _future()
        if self._fault:
            self._events[event].set_exception(_copy(self._fault))

    async def happened(self, event: str, deadline_s: float = DEADLINE_S) -> None:
        """An event that expect() named. Raises QmpFault."""
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(self._events[event])
        except TimeoutError:
            raise QmpFault(f"no {event} within {deadline_s} s") from None

    async def aclose(self) -> None:
        self._receiving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._receiving
        self._socket.close()
        self._fail(QmpEnded("it was closed"))

    async def _ask(self, command: str, arguments: Message, fds: Sequence[int]) -> Any:
        if self._fault:
            raise _copy(self._fault)
        self._last = next(self._numbers)
        answer = self._answers[self._last] = _future()
        try:
            # Never more than one command is on its way, so the buffer has room, unless QEMU stopped reading before.
            socket.send_fds(self._socket, [encode(self._last, command, arguments)], fds)
            return await answer
        except OSError as e:
            raise QmpEnded(f"{command} was not sent: {e}") from None
        finally:
            self._answers.pop(self._last, None)

    async def _receive(self) -> None:
        lines, loop = Lines(), asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(self._socket, 1 << 16):
                for line in lines.feed(data):
                    self._accept(decode(line))
            self._fail(QmpEnded("QEMU ended"))
        except OSError as e:
            self._fail(QmpEnded(f"QEMU ended: {e}"))
        except QmpFault as e:
            self._fail(e)

    def _accept(self, message: Message) -> None:
        event = "QMP" if "QMP" in message else message.get("event")
        if event is not None:
            if (waiting := self._events.get(event)) and not waiting.done():
                waiting.set_result(None)
            return
        number = message["id"]
        if not 0 < number <= self._last:
            raise QmpFault("an answer to nothing that was asked")
        answer = self._answers.pop(number, None)
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(QmpFault(message["error"]["desc"][:1000]))
        else:
            answer.set_result(message["return"])

    def _fail(self, fault: QmpFault) -> None:
        self._fault = self._fault or fault
        for future in (*self._answers.values(), *self._events.values()):
            if not future.done():
                future.set_exception(_copy(self._fault))


def _copy(fault: QmpFault) -> QmpFault:
    """For each who waits: a traceback grows with whoever raises it."""
    return type(fault)(*fault.args)


def _future() -> asyncio.Future[Any]:
    """Whose exception need not be looked at: who waited may have left."""
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda f: f.cancelled() or f.exception())
    return future
