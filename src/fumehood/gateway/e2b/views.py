"""A lease as E2B's control API shows it."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from fumehood.lease import Lease
from fumehood.model import SandboxState

from .call import traffic_token

# What the SDK asks of this version is there, but for file metadata: docs/e2b.md says why it is not a lower one.
ENVD_VERSION = "0.6.13"
CLIENT_ID = "fumehood"
_HOST = re.compile(r"[A-Za-z0-9.\-]{1,253}(:[0-9]{1,5})?\Z")


def is_paused(lease: Lease) -> bool:
    return lease.live.state in (SandboxState.PAUSED, SandboxState.QUARANTINED)


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def domain(request: Request) -> str | None:
    """Where `<port>-<id>.<domain>` is looked for: the host that the request itself was sent to, without its `api.`."""
    host = request.headers.get("host", "")
    return host.removeprefix("api.") if _HOST.match(host) else None


def opened(lease: Lease, request: Request) -> dict[str, Any]:
    """With both secrets: only for the answer to create and connect, which the tenant's own key asked for."""
    return {
        "templateID": lease.record.template,
        "sandboxID": lease.id,
        "clientID": CLIENT_ID,
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": lease.token,
        "trafficAccessToken": traffic_token(lease),
        "domain": domain(request),
    }


def listed(lease: Lease) -> dict[str, Any]:
    limits = lease.live.spec.limits
    return {
        "templateID": lease.record.template,
        "sandboxID": lease.id,
        "clientID": CLIENT_ID,
        "startedAt": when(lease.created_at),
        "endAt": when(lease.end_at),
        "envdVersion": ENVD_VERSION,
        "cpuCount": max(1, round(limits.cpus)),
        "memoryMB": limits.memory_bytes >> 20,
        "diskSizeMB": limits.disk_bytes >> 20,
        "state": "paused" if is_paused(lease) else "running",
        "metadata": dict(lease.metadata),
    }


def detail(lease: Lease, request: Request) -> dict[str, Any]:
    return {
        **listed(lease),
        "domain": domain(request),
        "envdAccessToken": lease.token,
        "allowInternetAccess": False,  # of every sandbox here, whatever was asked for
        "lifecycle": {"autoResume": lease.auto_resume, "onTimeout": lease.on_expiry},
    }


def metric(lease: Lease) -> dict[str, Any]:
    """One reading, of now. The CPU's share is the mean since the start: no history is kept for it."""
    stats, limits, now = lease.live.handle.stats(), lease.live.spec.limits, time.time()
    age_s = max(now - lease.created_at, 1e-3)
    return {
        "timestamp": when(now),
        "timestampUnix": int(now),
        "cpuCount": max(1, round(limits.cpus)),
        "cpuUsedPct": round(100 * stats.usage.cpu_s / age_s, 2),
        "memUsed": stats.memory_bytes,
        "memTotal": limits.memory_bytes,
        "memCache": 0,  # the page cache of a sandbox is in memUsed: its group counts both as one
        "diskUsed": lease.live.handle.disk_used_bytes(),
        "diskTotal": limits.disk_bytes,
    }
