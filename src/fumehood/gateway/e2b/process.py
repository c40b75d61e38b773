"""process.Process: programs, as E2B's clients see them. A process outlives the streams that follow it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, cast

from fumehood.agent import wire
from fumehood.errors import FumehoodError, InvalidInput
from fumehood.gateway.call import leave
from fumehood.runtime.link import Stream

from .call import Call
from .connect import Fault, deadline_s, flag, number, tables, text

Message = dict[str, Any]
_CHANNELS = {wire.STDOUT: "stdout", wire.STDERR: "stderr", wire.TERMINAL: "pty"}
_SIGNALS = {"SIGNAL_SIGKILL": signal.SIGKILL, "SIGNAL_SIGTERM": signal.SIGTERM}
_PING_S, _PING_RANGE_S = 90.0, (1, 600)
_MAX_ARGUMENTS = 4_096


async def start(call: Call, message: Message) -> AsyncGenerator[Message, None]:
    """The deadline of the request is the process's too: it is killed then, and no `end` event comes before the error."""
    arguments = _start_arguments(message)
    until = _until(call)
    try:
        stream = await call.link.open("exec.start", **arguments)
        async with contextlib.aclosing(_follow(call, stream, until, kill=True)) as events:
            async for event in events:
                yield event
    except InvalidInput as e:
        if e.message.startswith("cwd "):  # E2B's words for it
            raise Fault("invalid_argument", f"cwd '{arguments['cwd']}' does not exist") from None
        raise


async def connect(call: Call, message: Message) -> AsyncGenerator[Message, None]:
    until = _until(call)
    stream = await call.link.open("exec.attach", pid=await _pid(call, message))
    async with contextlib.aclosing(_follow(call, stream, until, kill=False)) as events:
        async for event in events:
            yield event


async def listing(call: Call, message: Message) -> Message:
    return {"processes": [_described(row) for row in await _rows(call)]}


async def send_input(call: Call, message: Message) -> Message:
    data = _input(wire.table(message.get("input")))
    async with _writing(call, await _pid(call, message)) as stream:
        await stream.send(data)
    return {}


async def stream_input(call: Call, messages: AsyncIterator[Message]) -> Message:
    async with contextlib.AsyncExitStack() as stack:
        stream: Stream | None = None
        async for message in messages:
            if "start" in message and stream is None:
                stream = await stack.enter_async_context(_writing(call, await _pid(call, wire.table(message["start"]))))
            elif "data" in message:
                if stream is None:
                    raise Fault("invalid_argument", "data came before start")
                await stream.send(_input(wire.table(wire.table(message["data"]).get("input"))))
            elif "keepalive" not in message:
                raise Fault("invalid_argument", "a message must be start, data or keepalive")
        if stream is None:
            raise Fault("invalid_argument", "the stream had no start")
    return {}


async def close_stdin(call: Call, message: Message) -> Message:
    await call.link.call("exec.eof", pid=await _pid(call, message))
    return {}


async def send_signal(call: Call, message: Message) -> Message:
    """To the process's whole group: children that were left behind would go on for the sandbox's life."""
    name = text(message, "signal")
    if name not in _SIGNALS:
        raise Fault("invalid_argument", f"the signal must be one of {', '.join(_SIGNALS)}")
    await call.link.call("exec.signal", pid=await _pid(call, message), signal=int(_SIGNALS[name]), group=True)
    return {}


async def update(call: Call, message: Message) -> Message:
    if size := _size(message):
        await call.link.call("exec.resize", pid=await _pid(call, message), **size)
    return {}


def _start_arguments(message: Message) -> dict[str, Any]:
    config = wire.table(message.get("process"))
    args = _words(config.get("args") or [])
    command = text(config, "cmd")
    if not command:
        raise Fault("invalid_argument", "'cmd' must not be empty")
    size = _size(message)
    return {
        "argv": [command, *args],
        "env": wire.table(config.get("envs")),
        "cwd": text(config, "cwd", ""),
        "stdin": flag(message, "stdin", True),  # before there was this member, every process had one
        **({"pty": size} if size else {}),
        **({"tag": text(message, "tag")} if message.get("tag") else {}),
    }


def _words(value: object) -> list[str]:
    words = cast("list[object]", value) if isinstance(value, list) else [None]
    texts = [word for word in words if isinstance(word, str)]
    if len(texts) != len(words) or len(texts) > _MAX_ARGUMENTS:
        raise Fault("invalid_argument", f"'args' must be at most {_MAX_ARGUMENTS} texts")
    return texts


def _size(message: Message) -> dict[str, int] | None:
    if "pty" not in message:
        return None
    size = wire.table(wire.table(message["pty"]).get("size"))
    return {"rows": number(size, "rows") or 24, "cols": number(size, "cols") or 80}


def _until(call: Call) -> float | None:
    seconds = deadline_s(call.request.headers.get("connect-timeout-ms"))
    return None if seconds is None else asyncio.get_running_loop().time() + seconds


async def _pid(call: Call, message: Message) -> int:
    """Of the selector: a pid, or the tag that a process was started with."""
    selector = wire.table(message.get("process"))
    if "tag" not in selector:
        return number(selector, "pid")
    tag = text(selector, "tag")
    for row in await _rows(call):
        if row.get("tag") == tag:
            return number(row, "pid")
    raise Fault("not_found", f"no process has the tag {tag[:64]!r}")


async def _rows(call: Call) -> list[Message]:
    return tables((await call.link.call("exec.list")).get("processes"))


def _described(row: Mapping[str, Any]) -> Message:
    argv: Any = row.get("argv")
    words = [str(word) for word in cast("list[Any]", argv)] if isinstance(argv, list) and argv else [""]
    config: Message = {"cmd": words[0], "args": words[1:], "envs": {}, "cwd": row.get("cwd")}
    tag = {"tag": row["tag"]} if row.get("tag") else {}
    return {"config": config, "pid": row.get("pid"), **tag}


def _input(message: Message) -> bytes:
    encoded = message.get("stdin", message.get("pty"))
    try:
        return base64.b64decode(encoded if isinstance(encoded, str) else "", validate=True)
    except (binascii.Error, ValueError):
        raise Fault("invalid_argument", "input must be base64") from None


@contextlib.asynccontextmanager
async def _writing(call: Call, pid: int) -> AsyncGenerator[Stream, None]:
    stream = await call.link.open("exec.write", pid=pid)
    try:
        yield stream
        await stream.close_input()
        await stream.result()
    finally:
        stream.abandon()


async def _follow(call: Call, stream: Stream, until: float | None, *, kill: bool) -> AsyncGenerator[Message, None]:
    """Events until the end. The client's going away stops the following and nothing else."""
    pid, ping_s, now = None, _ping_s(call), asyncio.get_running_loop().time
    try:
        while True:
            try:
                async with asyncio.timeout_at(min(now() + ping_s, until or float("inf"))):
                    frame = await anext(stream)
            except StopAsyncIteration:
                yield {"event": {"end": ending(stream.ok)}}
                return
            except TimeoutError:
                if until is None or now() < until:
                    yield {"event": {"keepalive": {}}}
                    continue
                if kill and pid is not None:
                    await _kill(call, pid)
                raise Fault("deadline_exceeded", "the deadline of the command is over") from None
            if frame.kind == wire.EVENT:
                pid = call.link.checked_json(frame).get("pid", pid)
                yield {"event": {"start": {"pid": pid}}}
            elif frame.payload[0] in _CHANNELS:
                encoded = base64.b64encode(frame.payload[1:]).decode()
                yield {"event": {"data": {_CHANNELS[frame.payload[0]]: encoded}}}
    finally:
        await leave(stream)


async def _kill(call: Call, pid: int) -> None:
    try:
        await call.link.call("exec.signal", pid=pid, signal=int(signal.SIGKILL), group=True)
    except FumehoodError as e:
        if e.code != "not_found":  # it ended by itself in that moment
            raise


def _ping_s(call: Call) -> float:
    asked, (low, high) = call.request.headers.get("keepalive-ping-interval", ""), _PING_RANGE_S
    return min(max(int(asked), low), high) if asked.isascii() and asked.isdigit() and len(asked) < 6 else _PING_S


def ending(end: Mapping[str, Any]) -> Message:
    """The `end` event, in the words of Go's os/exec, which E2B's clients show to people."""
    number_, code = end.get("signal"), end.get("exit_code")
    if isinstance(number_, int) and number_ in signal.valid_signals():
        status = f"signal: {(signal.strsignal(number_) or str(number_)).lower()}"
        return {"exitCode": -1, "exited": False, "status": status, "error": status}
    code = code if isinstance(code, int) else -1
    status = f"exit status {code}"
    return {"exitCode": code, "exited": True, "status": status, **({"error": status} if code else {})}
