"""Idempotency keys: the same request twice under one key is done once, and answered twice."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from fumehood.errors import Conflict, FumehoodError, InvalidInput
from fumehood.gateway import problems
from fumehood.gateway.call import Call
from fumehood.store import Store

_log = logging.getLogger("fumehood.gateway")
_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")
_KEPT_BYTES = 64 << 10
REPLAYED = "idempotent-replayed"


@dataclass(frozen=True, slots=True)
class Done:
    """An answer that can be kept: JSON text. `replayed`: it is of an earlier request."""

    status: int
    body: bytes
    replayed: bool = False

    def response(self) -> Response:
        media = None if not self.body else "application/json" if self.status < 400 else problems.MEDIA_TYPE
        headers = {"cache-control": "no-store", **({REPLAYED: "true"} if self.replayed else {})}
        return Response(self.body, self.status, headers, media)


class Claim:
    """An idempotency key that this request holds until it is kept or dropped. `replay` is the answer that it had before."""

    def __init__(self, store: Store, tenant: str, key: str | None) -> None:
        self._store, self._tenant, self._key = store, tenant, key
        self.replay: Done | None = None

    @classmethod
    async def of(cls, call: Call, request: Request) -> Claim:
        """Without the header it is one of nothing. Raises InvalidInput; Conflict when the key was used for another request, or
        its first request is not answered yet (retryable).
        """
        text = request.headers.get("idempotency-key")
        if text is None:
            return cls(call.service.store, "", None)
        if not _KEY.match(text):
            raise InvalidInput("bad Idempotency-Key", cause="it must have 1 to 255 visible ASCII characters")
        # A tenant's API keys never meet here: one must not get the answers of another.
        claim = cls(call.service.store, call.caller.tenant, key := f"{call.caller.key_id}:{text}")
        kept = await claim._store.claim_reply(claim._tenant, key, _digest(request, await request.body()))
        if kept is not None and not kept.status:
            conflict = Conflict("a request with this key is still under way", remediation="wait for its answer, then repeat")
            conflict.retryable = True
            raise conflict
        claim.replay = None if kept is None else Done(kept.status, kept.body.encode(), replayed=True)
        return claim

    def keep(self, done: Done) -> None:
        if self._key is not None:
            try:
                self._store.keep_reply(self._tenant, self._key, *_to_keep(done))
            except FumehoodError as e:  # the answer is the caller's in any case
                _log.error("an answer was not kept for its idempotency key: %s", e)

    async def drop(self) -> None:
        """It has done nothing: the key is free again."""
        if self._key is not None:
            try:
                await self._store.drop_reply(self._tenant, self._key)
            except FumehoodError as e:  # what failed before is what the caller must hear of
                _log.error("an idempotency key was not let go: %s", e)


async def once(call: Call, request: Request, work: Callable[[], Awaitable[Done]]) -> Done:
    """What `work` comes to, done at most once for each Idempotency-Key."""
    claim = await Claim.of(call, request)
    if claim.replay is not None:
        return claim.replay
    try:
        done = await work()
    except BaseException:
        await claim.drop()
        raise
    claim.keep(done)
    return done


def _digest(request: Request, body: bytes) -> str:
    return hashlib.sha256(f"{request.method} {request.url.path}\n".encode() + body).hexdigest()


def _to_keep(done: Done) -> tuple[int, str]:
    if len(done.body) <= _KEPT_BYTES:
        return done.status, done.body.decode()
    e = Conflict(
        "this request was done, and its answer was too large to be kept",
        cause=f"it has {len(done.body)} bytes",
        remediation="see the execution's record, or repeat it with a new key",
    )
    return 409, json.dumps(problems.form(e, 409, ""))
