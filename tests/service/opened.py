"""A Service of a test's own, and what can be seen of its sandboxes from the host."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fumehood.config import Config
from fumehood.lease import Lease
from fumehood.records import Caller
from fumehood.service import Service
from http_server import clean_env

PATIENCE_S = 10.0
USER = frozenset({"sandboxes"})
ME, OTHER, ADMIN = Caller("one", "key1", USER), Caller("two", "key2", USER), Caller("one", "key3")


def config(home: Path, tier: str, **settings: Any) -> Config:
    for name in ("state", "run"):
        (home / name).mkdir(mode=0o700, exist_ok=True)
    chosen: dict[str, Any] = {"tier": tier, "pool_policies": "", **settings}
    return replace(Config.load(clean_env()), state_dir=home / "state", run_dir=home / "run", **chosen)


@asynccontextmanager
async def opened(home: Path, tier: str, **settings: Any) -> AsyncIterator[Service]:
    async with await Service.open(config(home, tier, **settings)) as service:
        yield service


async def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


def held(service: Service) -> dict[str, Any]:
    """What the admission has given out and not got back, and who waits."""
    found = service.status()["scheduler"]
    return {name: (row["held"], row["waiting"]) for name, row in found.items() if row["held"] or row["waiting"]}


def init_of(lease: Lease) -> int:
    """The host's pid of a native sandbox's first process: when it is gone, so is all of its pid namespace."""
    text = Path(f"/proc/self/fdinfo/{lease.live.handle._pidfd}").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pid:")))


def cgroups(name: str) -> list[str]:
    """Every cgroup directory, in any hierarchy, that has `name` in its own."""
    found = subprocess.run(["find", "/sys/fs/cgroup", "-type", "d", "-name", f"*{name}*"], capture_output=True, text=True)
    return found.stdout.split()


def traces(lease: Lease, init: int) -> list[str]:
    alive = Path(f"/proc/{init}/status")
    return [*cgroups(lease.id), *([alive.read_text()] if alive.exists() else [])]
