"""E2B's control API, both versions: a table of paths, each a few lines over the service."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fumehood.errors import FumehoodError
from fumehood.gateway.auth import check_scope
from fumehood.gateway.call import Call, until_gone
from fumehood.gateway.once import Done, once
from fumehood.lease import Lease
from fumehood.records import Caller
from fumehood.service import Service

from . import views
from .answers import Refusal, json_answer, refusal_of, refused
from .asked import (
    TEMPLATES,
    Connect,
    ListAsk,
    Network,
    NewSandbox,
    Pause,
    Timeout,
    check_timeout,
    read,
    refuse_open_network,
)
from .snapshots import Copies

Authenticate = Callable[[Request], Awaitable[Caller]]
PREFIXES = ("/sandboxes", "/v2/", "/v3/", "/templates", "/snapshots", "/volumes", "/secrets")
_NO_CONTENT = 204


class Control:
    """`authenticate` reads the key of a request. Raises what it raises: Unauthenticated, RateLimited."""

    def __init__(self, service: Service, authenticate: Authenticate) -> None:
        self._service, self._authenticate, self._config = service, authenticate, service.config
        copies = self._copies = Copies(service, self._lease)
        one = r"(?:/v2)?/sandboxes/([^/]+)"
        rows: tuple[tuple[str, str, Callable[..., Awaitable[Response]]], ...] = (
            ("POST", r"(?:/v2)?/sandboxes", self._create),
            ("GET", r"(?:/v2)?/sandboxes", self._list),
            ("GET", one, self._get),
            ("DELETE", one, self._kill),
            ("POST", one + "/connect", self._connect),
            ("POST", one + "/resume", self._connect),
            ("POST", one + "/timeout", self._timeout),
            ("POST", one + "/pause", self._pause),
            ("GET", one + "/metrics", self._metrics),
            ("PUT", one + "/network", self._network),
            ("POST", one + "/snapshots", copies.create),
            ("POST", one + "/fork", copies.fork),
            ("GET", r"/snapshots", copies.list),
            ("GET", r"/templates/aliases/(.+)", self._alias),
            ("DELETE", r"/templates/(.+)", copies.delete),
        )
        self._rows = [(method, re.compile(pattern), handler) for method, pattern, handler in rows]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except Refusal as e:
            answer = refused(e)
        except FumehoodError as e:
            answer = refused(refusal_of(e))
        except ClientDisconnect:
            return
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        caller = await self._authenticate(request)  # before the path: who has no key learns nothing of it
        check_scope(caller, "sandboxes")
        methods: list[str] = []
        for method, pattern, handler in self._rows:
            if match := pattern.fullmatch(request.url.path):
                if method == request.method:
                    return await handler(caller, request, *match.groups())
                methods.append(method)
        if methods:
            raise Refusal(405, f"method not allowed; here: {', '.join(methods)}")
        raise Refusal(404, "no such path; building templates, volumes and secrets are not supported here (docs/e2b.md)")

    async def _create(self, caller: Caller, request: Request) -> Response:
        body = read(NewSandbox, await request.body())
        snapshot = await self._copies.template(caller, body.template_id)
        ask = body.ask(caller, self._config.max_lifetime_s, snapshot)

        async def made() -> Done:
            lease = await until_gone(request, self._service.create(caller, ask))
            return Done(201, lease.id.encode())  # not the answer: that holds secrets, and what is kept rests on the disk

        done = await once(Call(self._service, caller), request, made)
        return json_answer(views.opened(self._lease(caller, done.body.decode()), request), done.status)

    async def _list(self, caller: Caller, request: Request) -> Response:
        ask = ListAsk(request)
        rows = [lease for lease in self._service.leases(caller) if _matches(lease, ask)]
        rows.sort(key=lambda lease: (lease.created_at, lease.id), reverse=ask.newest_first)
        if ask.after:
            rows = rows[_place(rows, ask.after) :]
        more = {"X-Next-Token": rows[ask.limit - 1].id} if len(rows) > ask.limit else {}
        return json_answer([views.listed(lease) for lease in rows[: ask.limit]], headers=more)

    async def _get(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        return json_answer(views.detail(self._lease(caller, sandbox_id), request))

    async def _kill(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        await self._service.kill(caller, self._lease(caller, sandbox_id))
        return Response(status_code=_NO_CONTENT)

    async def _connect(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        """Of a running one the lease never gets shorter; a paused one is resumed with a new lease."""
        ask = read(Connect, await request.body())
        check_timeout(ask.timeout, self._config.max_lifetime_s)
        lease = self._lease(caller, sandbox_id)
        if not ask.memory:
            raise Refusal(400, "a resume without the memory is not supported here")
        paused = views.is_paused(lease)
        if paused:
            await self._service.resume(caller, lease)
        if paused or lease.end_at < time.time() + ask.timeout:
            await self._service.extend(caller, lease, float(ask.timeout))
        return json_answer(views.opened(lease, request), 201 if paused else 200)

    async def _timeout(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        ask = read(Timeout, await request.body())
        lease = self._lease(caller, sandbox_id)
        if views.is_paused(lease):
            raise _unknown(sandbox_id)
        if ask.timeout > 0:
            check_timeout(ask.timeout, self._config.max_lifetime_s)
        await self._service.extend(caller, lease, float(max(0, ask.timeout)))
        return Response(status_code=_NO_CONTENT)

    async def _pause(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        ask = read(Pause, await request.body())
        lease = self._lease(caller, sandbox_id)
        if not ask.memory:
            raise Refusal(400, "a pause that drops the memory is not supported here: processes stay as they are")
        if views.is_paused(lease):
            raise Refusal(409, f"sandbox {sandbox_id} is already paused")
        await self._service.pause(caller, lease)
        return Response(status_code=_NO_CONTENT)

    async def _metrics(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        return json_answer([views.metric(self._lease(caller, sandbox_id))])

    async def _network(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        """Everything is denied already, so what denies more changes nothing and is true."""
        ask = read(Network, await request.body())
        self._lease(caller, sandbox_id)
        refuse_open_network(ask, None, caller)
        return Response(status_code=_NO_CONTENT)

    async def _alias(self, caller: Caller, request: Request, alias: str) -> Response:
        if alias not in TEMPLATES:
            raise Refusal(404, f"template '{alias[:64]}' not found")
        return json_answer({"templateID": alias, "public": True})

    def _lease(self, caller: Caller, sandbox_id: str) -> Lease:
        try:
            return self._service.lease(caller, sandbox_id)
        except FumehoodError as e:
            if e.code in ("not_found", "invalid_input", "sandbox_gone"):
                raise _unknown(sandbox_id) from None
            raise


def _unknown(sandbox_id: str) -> Refusal:
    return Refusal(404, f"sandbox '{sandbox_id[:64]}' not found")


def _matches(lease: Lease, ask: ListAsk) -> bool:
    state = "paused" if views.is_paused(lease) else "running"
    metadata = all(lease.metadata.get(name) == value for name, value in ask.metadata.items())
    return (
        state in ask.states
        and lease.created_at >= ask.started_after
        and metadata
        and ask.template in (None, lease.record.template)
    )


def _place(rows: list[Lease], after: str) -> int:
    """Behind the row with that id. Raises Refusal when it has ended meanwhile: a page must not be skipped in silence."""
    for place, lease in enumerate(rows):
        if lease.id == after:
            return place + 1
    raise Refusal(400, "that page is gone: list again from the start")
