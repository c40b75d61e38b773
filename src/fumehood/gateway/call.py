"""One request of our own API: whose, to which service; and the answers that all of its routes give."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Depends
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response

from fumehood.errors import Detached, InvalidInput, SandboxGone
from fumehood.gateway.auth import check_scope
from fumehood.gateway.pour import client_left
from fumehood.lease import Lease
from fumehood.records import Caller, ExecutionRecord
from fumehood.runtime.link import Stream
from fumehood.service import Service

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    service: Service
    caller: Caller

    def lease(self, sandbox_id: str) -> Lease:
        return self.service.lease(self.caller, sandbox_id)

    async def awake(self, sandbox_id: str) -> Lease:
        """For traffic: one that is paused with auto_resume goes on."""
        return await self.service.awake(self.caller, sandbox_id)

    async def verb(self, sandbox_id: str, verb: str, **arguments: Any) -> dict[str, Any]:
        """What its agent answers."""
        lease = await self.awake(sandbox_id)
        return await lease.live.link.call(verb, **arguments)


async def _call(connection: HTTPConnection) -> Call:
    caller = connection.scope["fumehood.caller"]
    check_scope(caller, "sandboxes")
    return Call(connection.app.state.service, caller)


async def _admin(connection: HTTPConnection) -> Call:
    caller = connection.scope["fumehood.caller"]
    check_scope(caller, "admin")
    return Call(connection.app.state.service, caller)


Called = Annotated[Call, Depends(_call)]
AdminCalled = Annotated[Call, Depends(_admin)]


def answer(value: Any, status: int = 200) -> Response:
    """JSON in ASCII: names of files may hold what UTF-8 can't say."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(text, status, {"cache-control": "no-store"}, "application/json")


def empty() -> Response:
    return Response(status_code=204)


def shown(lease: Lease) -> dict[str, Any]:
    record = lease.record
    return {
        **asdict(record),
        "metadata": dict(record.metadata),
        "limits": asdict(lease.live.spec.limits),
        "protections": [asdict(protection) for protection in lease.live.handle.protections],
    }


def execution(record: ExecutionRecord, *, with_result: bool = False) -> dict[str, Any]:
    shown = asdict(record)
    text = shown.pop("result")
    return {**shown, "result": json.loads(text) if text else None} if with_result else shown


def page(items: list[Any], limit: int) -> str | None:
    """What to go on after; None for the last page."""
    return items[-1].id if len(items) == limit else None


def query(request: HTTPConnection) -> dict[str, str]:
    """Its query with names that are not UTF-8 kept as they are. The last of two equal names counts."""
    raw = request.scope.get("query_string", b"").decode("latin-1")
    try:
        return dict(parse_qsl(raw, keep_blank_values=True, errors="surrogateescape", max_num_fields=64))
    except ValueError as e:
        raise InvalidInput("the query can't be read", cause=str(e), remediation="send fewer fields") from None


def path_of(request: HTTPConnection) -> str:
    """Raises InvalidInput: `path` of the query names a file inside, and nothing on this host is looked up by it."""
    path = query(request).get("path", "")
    if not path or "\0" in path:
        raise InvalidInput("bad path", cause="it is empty or holds a NUL byte", remediation="give ?path=")
    return path


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to, unless its caller goes away first: then it is cancelled, and with it the program that it runs.

    Raises ClientDisconnect for that.
    """
    doing, left = asyncio.create_task(work), asyncio.create_task(client_left(request.receive))
    try:
        await asyncio.wait({doing, left}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        left.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.wait({doing})


async def leave(stream: Stream) -> None:
    """Follow it no longer."""
    with contextlib.suppress(SandboxGone, Detached):  # there is nothing left to leave
        await stream.cancel()
    stream.abandon()
