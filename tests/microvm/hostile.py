"""What the security tests of the microVM tiers start from: the engine of a tier, and limits that an attack soon meets.

On a host of the kvm_pvm kind a page's first touch can cost a millisecond, a fork half a second: attacks are small, limits too.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import ahead
import proven
import pytest

from fumehood import Sandbox
from fumehood.client.engine import Engine
from fumehood.model import MIB

pytest.register_assert_rewrite("security.attack")
from security.attack import PRELUDE  # noqa: E402

TIERS = ("qemu", "firecracker")
MOST: dict[str, Any] = {
    "memory_bytes": 32 * MIB,
    "disk_bytes": 2 * MIB,
    "inodes": 64,
    "pids": 8,
    "open_files": 64,
    "timeout_s": 120,
}
LIMITS: dict[str, Any] = {"memory_bytes": 64 * MIB, "disk_bytes": 16 * MIB, "timeout_s": 120, "lifetime_s": 3000}


def made(request: pytest.FixtureRequest, tier: str) -> dict[str, str]:
    """The settings that the tier takes beside its directories, once all is there that it needs."""
    # First what this host may lack: then nothing is compiled for it.
    settings = {"FUMEHOOD_FIRECRACKER": str(request.getfixturevalue("firecracker"))} if tier == "firecracker" else {}
    request.getfixturevalue("image")("python")
    request.getfixturevalue("kernel")("pvm" if tier == "firecracker" else "stock")
    return settings


def environment(request: pytest.FixtureRequest, tier: str) -> dict[str, str]:
    """Settings as variables, of directories in which it is proven."""
    return proven.environment(ahead.STATE, tier, **made(request, tier))


def engine(request: pytest.FixtureRequest, tier: str) -> contextlib.AbstractContextManager[Engine]:
    return proven.engine(ahead.STATE, tier, **made(request, tier))


def words(box: Sandbox, code: str, **more: Any) -> list[str]:
    """What the attack printed; a traceback is the test's own mistake."""
    result = box.run(PRELUDE + code, **more)
    assert result.error is None, result.error
    return result.stdout.split()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def groups(pid: int) -> dict[str, Path]:
    """Controller -> the directory of its control group; in version 2 all have one."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    tops = {name: left.split()[4] for left, right in mounts if "cgroup" in right.split()[0] for name in _names(right)}
    found: dict[str, Path] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        found |= {name: Path(tops[name] + path) for name in names.split(",") if name in tops}
    return found


def _names(right: str) -> list[str]:
    kind, _, options = right.split()[:3]
    return [""] if kind == "cgroup2" else options.split(",")
