"""Who calls: API keys by their digests, the operator's own key, or nobody but this machine. Then how fast (limits.py)."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping

from starlette.requests import HTTPConnection

from fumehood.errors import Forbidden, InvalidInput, Unauthenticated
from fumehood.gateway.limits import Limits
from fumehood.records import ApiKey, Caller, KeyLimits
from fumehood.service import Service

_KEY = re.compile(r"fh_([0-9a-f]{16})([0-9a-f]{48})\Z")
_FRESH_S = 1.0  # a key is looked up again after this: revoking one takes effect within two seconds
_REMEMBERED = 10_000
_LOOPBACK_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?\Z")
# Whoever has the operator's key could as well change the limits.
LOCAL = Caller("local", "operator", limits=KeyLimits(requests_per_s=1e6, burst=1_000_000, concurrent_requests=100_000))
_MIN_KEY_CHARS, _MIN_KEY_LETTERS = 32, 10


def local_key() -> str:
    """A key for one run of the server, in the form of any other."""
    return f"fh_{secrets.token_hex(8)}{secrets.token_hex(24)}"


def check_strength(key: str) -> str:
    """Raises InvalidInput for an operator's key that could be guessed (H14)."""
    if len(key) < _MIN_KEY_CHARS or len(set(key)) < _MIN_KEY_LETTERS or not (key.isascii() and key.isprintable()):
        raise InvalidInput(
            "server_key is too weak",
            cause=f"it needs {_MIN_KEY_CHARS} printable ASCII characters, at least {_MIN_KEY_LETTERS} of them different",
            remediation="make one with: openssl rand -hex 32",
        )
    return key


class Authenticator:
    """`keys`: texts that are kept nowhere, each an admin of the tenant `local`. `open_here`: no key is asked for at all, which
    only a server on loopback or a Unix socket may do.
    """

    def __init__(self, service: Service, keys: tuple[str, ...] = (), *, open_here: bool = False) -> None:
        self._service, self._open_here, self.limits = service, open_here, Limits()
        self._operators = [_digest(_ours(key)) for key in keys]
        self._known: dict[str, tuple[ApiKey, float]] = {}

    async def __call__(self, connection: HTTPConnection) -> Caller:
        """Also counts the request against the key's limits, until its end. Raises Unauthenticated, Forbidden, RateLimited."""
        caller = await self._caller(connection.headers)
        tickets = connection.scope["fumehood.tickets"]
        self.limits.take(caller, tickets)
        return caller

    async def until_revoked(self, caller: Caller) -> None:
        """For what goes on as long as its client likes. Never returns for keys that are kept nowhere."""
        while caller is LOCAL or await self._is_valid(caller.key_id):  # noqa: ASYNC110
            await asyncio.sleep(_FRESH_S)  # another process may revoke it, and tells nobody

    async def _is_valid(self, key_id: str) -> bool:
        key = await self._look_up(key_id)
        return key is not None and key.revoked_at is None

    async def _caller(self, headers: Mapping[str, str]) -> Caller:
        if self._open_here:
            _refuse_browsers(headers)
            return LOCAL
        text = _ours(shown(headers))
        digest = _digest(text)
        if any([hmac.compare_digest(digest, operator) for operator in self._operators]):
            return LOCAL
        match = _KEY.match(text)
        key = await self._look_up(match[1]) if match else None
        if match is None or key is None or not hmac.compare_digest(_digest(match[2]), key.digest) or key.revoked_at is not None:
            raise _unknown(bool(text))
        return Caller(key.tenant, key.id, key.scopes, key.limits, key.compat)

    async def _look_up(self, key_id: str) -> ApiKey | None:
        key, at = self._known.get(key_id, (None, 0.0))
        if key is None or time.monotonic() - at > _FRESH_S:
            key = await self._service.store.key(key_id)
            if key is None:
                self._known.pop(key_id, None)
            else:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key_id] = key, time.monotonic()
        return key


def check_scope(caller: Caller, scope: str) -> None:
    """Raises Forbidden. An admin may do all."""
    if scope not in caller.scopes and "admin" not in caller.scopes:
        raise Forbidden(
            f"this key lacks the scope {scope}",
            cause=f"it has: {', '.join(sorted(caller.scopes)) or 'none'}",
            remediation="use another key, or make one with fumehood keys create --scope",
        )


def shown(headers: Mapping[str, str]) -> str:
    """The key of a request; "" for none."""
    if (key := headers.get("x-api-key")) is not None:
        return key
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _ours(key: str) -> str:
    """Old SDKs of E2B take only keys that begin with e2b_: any key may be shown so."""
    return "fh_" + key.removeprefix("e2b_") if key.startswith("e2b_") else key


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _unknown(shown: bool) -> Unauthenticated:
    """One answer for malformed, unknown, wrong and revoked: nobody learns which key ids there are."""
    return Unauthenticated(
        "no such API key" if shown else "an API key is needed",
        cause="it is unknown or revoked" if shown else "the request has no Authorization: Bearer and no X-API-Key header",
        remediation="make one with fumehood keys create, as the server's user; set FUMEHOOD_API_KEY or E2B_API_KEY",
    )


def _refuse_browsers(headers: Mapping[str, str]) -> None:
    """Without keys, any web page that the user opens could reach this port: directly, or by rebinding its own name to it."""
    if not _LOOPBACK_HOST.match(headers.get("host", "")):
        raise Forbidden("this Host is not served without keys", cause="it is no loopback name", remediation="use 127.0.0.1")
    if "origin" in headers or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Forbidden("requests of web pages need a key", cause="the server runs without keys", remediation="serve with keys")
