"""E2B's snapshots and forks: whole sandboxes with their memory, where the tier has that.

A snapshot's name is kept with it; E2B's tags are not, for each snapshot has an id of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fumehood.errors import FumehoodError
from fumehood.gateway.call import until_gone
from fumehood.lease import Lease
from fumehood.records import Caller, SnapshotRecord
from fumehood.service import Service

from . import views
from .answers import Refusal, json_answer
from .asked import TEMPLATES, Fork, NewSnapshot, check_timeout, page_limit, read

_ID = re.compile(r"p[0-9a-f]{16}\Z")
_NAME = "e2b.name"  # of a snapshot's metadata
_LOOKED_AT = 1_000  # of the newest snapshots, when one is asked for by its name


class Copies:
    """`lease` finds a sandbox of the caller. Every method raises what the service raises, and Refusal."""

    def __init__(self, service: Service, lease: Callable[[Caller, str], Lease]) -> None:
        self._service, self._lease = service, lease

    async def create(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        ask = read(NewSnapshot, await request.body())
        lease = self._lease(caller, sandbox_id)
        if not ask.memory:
            raise Refusal(400, "a snapshot without the memory is not supported here")
        made = await self._service.snapshot(caller, lease, {_NAME: ask.name} if ask.name else {})
        return json_answer(_shown(made), 201)

    async def list(self, caller: Caller, request: Request) -> Response:
        query = request.query_params
        name, sandbox_id, limit = query.get("name"), query.get("sandboxID"), page_limit(query.get("limit", "100"))
        found = await self._service.snapshots(caller, sandbox_id=sandbox_id, after=query.get("nextToken"), limit=limit)
        more = {"X-Next-Token": found[-1].id} if len(found) == limit else {}
        return json_answer([_shown(s) for s in found if name is None or _is(s, name)], headers=more)

    async def delete(self, caller: Caller, request: Request, name: str) -> Response:
        """By its id, or all that have this name. Its path is that of templates, of which none is anybody's."""
        found = await self._named(caller, name)
        if not found:
            raise Refusal(404, "no such template or snapshot of yours")
        for snapshot_id in found:
            await self._service.discard(caller, snapshot_id)
        return Response(status_code=204)

    async def fork(self, caller: Caller, request: Request, sandbox_id: str) -> Response:
        """All or none, so that no entry of the answer is an error."""
        ask = read(Fork, await request.body())
        check_timeout(ask.timeout, self._service.config.max_lifetime_s)
        lease = self._lease(caller, sandbox_id)
        work = self._service.fork(caller, lease, ask.count, lease_s=float(ask.timeout))
        forks = await until_gone(request, work)
        return json_answer([{"sandbox": views.opened(fork, request)} for fork in forks], 201)

    async def template(self, caller: Caller, name: str) -> str | None:
        """The snapshot that is asked for where a template may stand, too; None for a template, known or not."""
        if name.partition(":")[0] in TEMPLATES:
            return None
        found = await self._named(caller, name)
        return found[0] if found else None

    async def _named(self, caller: Caller, name: str) -> list[str]:
        """The newest first."""
        if _ID.match(bare := name.partition(":")[0]):
            try:
                return [(await self._service.snapshot_of(caller, bare)).id]
            except FumehoodError as e:
                if e.code != "not_found":
                    raise
                return []
        newest = await self._service.snapshots(caller, limit=_LOOKED_AT)
        return [snapshot.id for snapshot in newest if _is(snapshot, name)]


def _is(snapshot: SnapshotRecord, name: str) -> bool:
    return name in (snapshot.id, snapshot.metadata.get(_NAME))


def _shown(snapshot: SnapshotRecord) -> dict[str, Any]:
    name = snapshot.metadata.get(_NAME)
    return {"snapshotID": snapshot.id, "names": [name] if name else []}
