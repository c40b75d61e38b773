"""URLs that open one file of one sandbox for one method and a while: HMAC under the sandbox's own secret, dead with it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable

from fumehood.lease import Lease


def make(lease: Lease, method: str, path: str, expires_s: float) -> str:
    claims = json.dumps([lease.id, method, path, int(time.time() + expires_s) + 1], separators=(",", ":")).encode()
    return f"{_text(claims)}.{_text(_mac(lease, claims))}"


def check(token: str, method: str, find: Callable[[str], Lease | None]) -> tuple[Lease, str] | None:
    """The lease and the path that it opens for `method`; None for whatever is wrong with it."""
    try:
        head, _, tail = token.partition(".")
        claims, mac = _bytes(head), _bytes(tail)
        sandbox_id, allowed, path, expires_at = json.loads(claims)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        return None
    lease = find(sandbox_id) if isinstance(sandbox_id, str) else None
    if lease is None or not hmac.compare_digest(mac, _mac(lease, claims)):
        return None
    return (lease, path) if allowed == method and time.time() < expires_at else None


def _mac(lease: Lease, claims: bytes) -> bytes:
    return hmac.new(lease.token.encode(), b"signed-url\0" + claims, hashlib.sha256).digest()


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
