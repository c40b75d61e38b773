"""WebSockets: programs and directories followed both ways (*verb sockets*, docs/http.md), and executions as messages."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from pydantic import TypeAdapter
from starlette.websockets import WebSocket, WebSocketDisconnect

from fumehood.agent import wire
from fumehood.errors import FumehoodError, InvalidInput
from fumehood.gateway import problems, schema
from fumehood.gateway.call import Call, Called, leave, path_of, query
from fumehood.gateway.executions import code_of, program_of, work_of
from fumehood.gateway.feed import as_message, follow
from fumehood.lease import Lease
from fumehood.runtime.link import Stream
from fumehood.service import new_id

router = APIRouter(prefix="/v1/sandboxes/{sandbox_id}")
_FIRST_S = 30.0  # for the message that says what is wanted
_BODY = TypeAdapter[schema.Run | schema.Exec](schema.Run | schema.Exec)
Verb = tuple[str, dict[str, Any]]


@router.websocket("/processes")
async def start(socket: WebSocket, call: Called, sandbox_id: str) -> None:
    async def asked() -> Verb:
        given = schema.read(schema.Start, await _first(socket))
        return "exec.start", {"env": {}, "stdin": False, **given.model_dump(exclude_none=True)}

    await _verb_socket(socket, call, sandbox_id, asked)


@router.websocket("/processes/{pid}")
async def attach(socket: WebSocket, call: Called, sandbox_id: str, pid: int) -> None:
    async def asked() -> Verb:
        return "exec.attach", {"pid": pid}

    await _verb_socket(socket, call, sandbox_id, asked)


@router.websocket("/files/watch")
async def watch(socket: WebSocket, call: Called, sandbox_id: str) -> None:
    async def asked() -> Verb:
        return "files.watch", {"path": path_of(socket), "recursive": query(socket).get("recursive") == "true"}

    await _verb_socket(socket, call, sandbox_id, asked)


@router.websocket("/executions/stream")
async def run(socket: WebSocket, call: Called, sandbox_id: str) -> None:
    """First the body of either POST, then its events as messages. {"cancel": true} or closing stops the program."""
    lease = await call.awake(sandbox_id)
    await socket.accept()
    async with _told(socket):
        body = schema.read(_BODY, await _first(socket))
        asked = code_of(body) if isinstance(body, schema.Run) else program_of(body)
        name = new_id()
        events = follow(name, work_of(call, lease, asked, body, name), socket.scope["fumehood.request_id"])

        async def cancelled(message: dict[str, Any]) -> None:
            if message.get("cancel") is True:
                await call.service.cancel(call.caller, name)

        await _both(_send_events(socket, events), _receive(socket, cancelled))


async def _send_events(socket: WebSocket, events: AsyncGenerator[tuple[str, bytes], None]) -> None:
    async with contextlib.aclosing(events):
        async for event in events:
            if event[0]:  # the protocol's own ping keeps it alive
                await socket.send_text(as_message(event))


async def _verb_socket(socket: WebSocket, call: Call, sandbox_id: str, asked: Callable[[], Awaitable[Verb]]) -> None:
    """A stream of the agent, both ways. Closed by the client it is followed no longer; a program goes on."""
    lease = await call.awake(sandbox_id)
    await socket.accept()
    async with _told(socket):
        verb, arguments = await asked()
        stream = await lease.live.link.open(verb, **arguments)

        async def told(message: dict[str, Any] | bytes) -> None:
            if isinstance(message, bytes):
                await stream.send(message[1:], message[0] if message else wire.STDIN)
            elif message.get("close_input") is True:
                await stream.close_input()
            elif message.get("cancel") is True:
                await stream.cancel()

        try:
            await _both(_send_frames(socket, lease, stream), _receive(socket, told))
        finally:
            await leave(stream)


async def _send_frames(socket: WebSocket, lease: Lease, stream: Stream) -> None:
    async for frame in stream:
        if frame.kind == wire.DATA:
            await socket.send_bytes(frame.payload)
        else:
            await socket.send_text(json.dumps({"event": lease.live.link.checked_json(frame)}))
    await socket.send_text(json.dumps({"end": stream.ok}))


async def _receive(socket: WebSocket, take: Callable[[Any], Awaitable[None]]) -> None:
    """Until the client closes. Raises InvalidInput for a message that is none."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        data = message.get("bytes")
        await take(data if data is not None else _object(message.get("text") or ""))


async def _first(socket: WebSocket) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_FIRST_S):
            return _object(await socket.receive_text())
    except TimeoutError:
        raise InvalidInput("nothing was asked", cause=f"no message within {_FIRST_S:g} s") from None
    except KeyError:
        raise InvalidInput("the first message must be text", cause="it came as bytes") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidInput("a message is not JSON", cause=str(e)[:200]) from None
    if not isinstance(value, dict):
        raise InvalidInput("a message is not a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


async def _both(sending: Any, receiving: Any) -> None:
    """Until one of them ends; then the other is of no more use."""
    tasks = {asyncio.create_task(sending), asyncio.create_task(receiving)}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()


@contextlib.asynccontextmanager
async def _told(socket: WebSocket) -> AsyncGenerator[None]:
    """Closes it at the end; an error is the last message before."""
    try:
        yield
    except WebSocketDisconnect:
        return
    except FumehoodError as e:
        problem = problems.form(e, problems.status_of(e), socket.scope["fumehood.request_id"])
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # nobody is there to hear it
            await socket.send_text(json.dumps({"problem": problem, "event": "problem"}))
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await socket.close()
