"""API keys as they are made and shown. The text of one is in its maker's hands and nowhere else."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import asdict
from typing import Any

from fumehood.records import ApiKey, KeyLimits


def mint(
    tenant: str, scopes: frozenset[str], name: str, limits: KeyLimits, compat: frozenset[str], prefix: str = "fh"
) -> tuple[str, ApiKey]:
    """(the text to show its owner, what to keep). 192 bits: too many to guess, so a plain digest is enough."""
    key_id, secret = secrets.token_hex(8), secrets.token_hex(24)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return f"{prefix}_{key_id}{secret}", ApiKey(key_id, tenant, digest, scopes, name, limits, compat, time.time())


def public(key: ApiKey) -> dict[str, Any]:
    """All but the digest: nobody needs to see it."""
    shown = {**asdict(key), "scopes": sorted(key.scopes), "compat": sorted(key.compat)}
    del shown["digest"]
    return shown
