"""Which procedure a path names, and how its request and answer travel: one message each, or streams of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fumehood.errors import FumehoodError
from fumehood.gateway.pour import BrokenOff, pour

from . import filesystem, process
from .answers import gone, json_answer
from .call import Call, basic_user, check_user
from .connect import (
    MAX_FRAME_BYTES,
    STATUSES,
    STREAM,
    UNARY,
    Decoder,
    Fault,
    encode,
    encode_end,
    fault_of,
    parse,
)
from .watchers import Watchers, watch_dir

Message = dict[str, Any]
Unary = Callable[[Call, Message], Awaitable[Message]]
Served = Callable[[Call, Message], AsyncGenerator[Message, None]]


class Procedures:
    def __init__(self) -> None:
        watchers = Watchers()
        self._unary: Mapping[str, Unary] = {
            "/process.Process/List": process.listing,
            "/process.Process/SendInput": process.send_input,
            "/process.Process/CloseStdin": process.close_stdin,
            "/process.Process/SendSignal": process.send_signal,
            "/process.Process/Update": process.update,
            "/filesystem.Filesystem/Stat": filesystem.stat_entry,
            "/filesystem.Filesystem/ListDir": filesystem.list_dir,
            "/filesystem.Filesystem/MakeDir": filesystem.make_dir,
            "/filesystem.Filesystem/Move": filesystem.move,
            "/filesystem.Filesystem/Remove": filesystem.remove,
            "/filesystem.Filesystem/CreateWatcher": watchers.create,
            "/filesystem.Filesystem/GetWatcherEvents": watchers.events,
            "/filesystem.Filesystem/RemoveWatcher": watchers.remove,
        }
        self._served: Mapping[str, Served] = {
            "/process.Process/Start": process.start,
            "/process.Process/Connect": process.connect,
            "/filesystem.Filesystem/WatchDir": watch_dir,
        }

    async def __call__(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        path, kind = scope["path"], call.request.headers.get("content-type", "").partition(";")[0].strip()
        known = UNARY if path in self._unary else STREAM if path in self._served or path == _STREAM_INPUT else None
        answer: Response | None = None
        if call.request.method != "POST" or known is None:
            answer = failed(Fault("unimplemented", "no such procedure"))
        elif kind != known:
            answer = failed(Fault("invalid_argument", f"the content type must be {known}"), 415)
        elif known == UNARY:
            answer = await self._one(call, self._unary[path])
        elif path == _STREAM_INPUT:
            answer = await _taken(call)
        else:
            await self._many(call, self._served[path], scope, receive, send)
        if answer is not None:
            await answer(scope, receive, send)

    async def _one(self, call: Call, procedure: Unary) -> Response:
        try:
            check_user(basic_user(call.request.headers.get("authorization")))
            return json_answer(await procedure(call, parse(await _whole(call.request) or b"{}")))
        except Fault as e:
            return failed(e)
        except FumehoodError as e:
            return gone(call.lease.id) if call.lease.ended.is_set() else failed(fault_of(e))

    async def _many(self, call: Call, procedure: Served, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            check_user(basic_user(call.request.headers.get("authorization")))
            message = await _only(call.request)
        except Fault as e:
            await failed(e, streamed=True)(scope, receive, send)
            return
        await pour(scope, receive, send, STREAM, _framed(call, procedure(call, message)), call.lease.ended)


_STREAM_INPUT = "/process.Process/StreamInput"
_MAX_PAUSE_S = 120.0  # whoever has nothing to type sends a keepalive every 50 s


def failed(fault: Fault, status: int | None = None, *, streamed: bool = False) -> Response:
    if streamed:
        return Response(encode_end(fault), 200, media_type=STREAM)
    return json_answer(fault.to_dict(), status or STATUSES[fault.code])


async def _whole(request: Request) -> bytes:
    """Counted as it is read, whatever Content-Length says. Raises Fault."""
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > MAX_FRAME_BYTES:
            raise Fault("resource_exhausted", f"a message is at most {MAX_FRAME_BYTES} bytes")
    return bytes(read)


async def messages(request: Request) -> AsyncIterator[Message]:
    """The frames of a request, as they arrive. Raises Fault."""
    decoder = Decoder()
    async for chunk in request.stream():
        for message in decoder.feed(chunk):
            yield message
    decoder.finish()


async def _only(request: Request) -> Message:
    found: list[Message] = []
    async for message in messages(request):
        found.append(message)
        if len(found) > 1:
            break
    if len(found) != 1:
        raise Fault("invalid_argument", "the request must have exactly one message")
    return found[0]


async def _framed(call: Call, events: AsyncGenerator[Message, None]) -> AsyncGenerator[bytes, None]:
    """Each event as a frame, then the end. Raises BrokenOff when the sandbox ended under it."""
    try:
        async for event in events:
            yield encode(event)
        yield encode_end()
    except Fault as e:
        yield encode_end(e)
    except FumehoodError as e:
        if call.lease.ended.is_set() or e.code in ("sandbox_gone", "wire_error"):
            raise BrokenOff from e
        yield encode_end(fault_of(e))
    finally:
        await events.aclose()


async def _taken(call: Call) -> Response:
    """StreamInput: the one answer comes after the last message of the request, or when the sandbox ends under it."""
    call.request.scope["fumehood.pause_s"] = _MAX_PAUSE_S  # see gateway/protocol.py
    try:
        check_user(basic_user(call.request.headers.get("authorization")))
    except Fault as e:
        return failed(e, streamed=True)
    taking = asyncio.create_task(process.stream_input(call, messages(call.request)))
    over = asyncio.create_task(call.lease.ended.wait())
    try:
        await asyncio.wait({taking, over}, return_when=asyncio.FIRST_COMPLETED)
        if not taking.done():
            return gone(call.lease.id)
        return Response(encode(taking.result()) + encode_end(), 200, media_type=STREAM)
    except Fault as e:
        return failed(e, streamed=True)
    except FumehoodError as e:
        return gone(call.lease.id) if call.lease.ended.is_set() else failed(fault_of(e), streamed=True)
    finally:
        taking.cancel()
        over.cancel()
        await asyncio.wait({taking, over})
