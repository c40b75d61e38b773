"""One request to a sandbox's data plane: which lease, whose, and as which user inside."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass

from starlette.requests import Request

from fumehood.lease import Lease
from fumehood.records import Caller
from fumehood.runtime.link import Link
from fumehood.service import Service

from .connect import Fault

USER = "user"


@dataclass(frozen=True)
class Call:
    service: Service
    lease: Lease
    request: Request

    @property
    def link(self) -> Link:
        return self.lease.live.link

    @property
    def caller(self) -> Caller:
        """The key that made the sandbox: the data plane knows nobody else."""
        return self.lease.owner


def traffic_token(lease: Lease) -> str:
    """What /execute and /contexts are opened with: /contexts is called without the access token, and this one, which any
    user of a port may be given, must not open the files."""
    return hmac.new(lease.token.encode(), b"traffic", hashlib.sha256).hexdigest()


def same(shown: str, secret: str) -> bool:
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), secret.encode())


def check_user(name: str) -> None:
    """There is one user inside, with no way to become another. Raises Fault for root too: pretending to be root would
    surprise later, at the first chown."""
    if name not in ("", USER):
        raise Fault(
            "unauthenticated",
            f"no user {name[:32]!r} in this sandbox: everything runs as {USER!r}, there is no root (docs/e2b.md)",
        )


def basic_user(header: str | None) -> str:
    """The user of `Authorization: Basic`, "" when there is none. Raises Fault."""
    scheme, _, value = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[0]
    except (binascii.Error, UnicodeDecodeError):
        raise Fault("unauthenticated", "the Authorization header is not Basic credentials") from None
