"""Control groups, version 1: which file of which controller takes what (Documentation/admin-guide/cgroup-v1)."""

from __future__ import annotations

from collections.abc import Mapping

from fumehood.model import Limits
from fumehood.runtime.host.cgroup_tree import Directory, wait

PERIOD_US = 100_000  # every group's default, never written
MEMSW = "memory.memsw.limit_in_bytes"  # memory and swap together
DOOR = "tasks"  # see Group.doors


def writes(limits: Limits, device: str | None, memsw: int) -> list[tuple[str, str, str]]:
    """(controller, file, value) in the order in which the kernel takes them. `memsw` is its present value, 0 = none."""
    return [
        ("pids", "pids.max", str(limits.pids)),
        *(("memory", file, str(size)) for file, size in _memory(limits, memsw)),
        ("cpu", "cpu.cfs_quota_us", str(round(limits.cpus * PERIOD_US))),
        ("cpu", "cpu.shares", _shares(limits)),
        *(("io", file, rule) for file, rule in _throttle(limits, device).items()),
    ]


def _memory(limits: Limits, memsw: int) -> list[tuple[str, int]]:
    """The kernel refuses any moment at which limit > memsw: to grow, move memsw first; to shrink, the limit."""
    total = limits.memory_bytes + limits.swap_bytes
    both = [("memory.limit_in_bytes", limits.memory_bytes), (MEMSW, total)]
    if total >= memsw > 0:
        both.reverse()
    # Buffers of TCP sockets are charged to a counter of their own, which counts only once it has a limit (H15).
    return [*both, ("memory.kmem.tcp.limit_in_bytes", limits.memory_bytes // 4)]


def _shares(limits: Limits) -> str:
    return str(max(2, limits.cpu_weight * 1024 // 100))


def fresh(device: str | None) -> dict[str, str]:
    """What a new group has already, by file: writes that can be saved."""
    return {"cpu.shares": _shares(Limits(cpu_weight=100)), **_throttle(Limits(io_read_bps=0, io_write_bps=0), device)}


def _throttle(limits: Limits, device: str | None) -> dict[str, str]:
    bps = {"read": limits.io_read_bps, "write": limits.io_write_bps}  # 0 lifts the rule
    return {f"blkio.throttle.{way}_bps_device": f"{device} {n}" for way, n in bps.items() if device}


def read(of: Mapping[str, Directory]) -> dict[str, int]:
    found: dict[str, int] = {}
    if cpuacct := of.get("cpuacct"):
        found["cpu_ns"] = cpuacct.number("cpuacct.usage")
    if memory := of.get("memory"):
        found["memory"] = memory.number("memory.usage_in_bytes")
        found["memory_peak"] = memory.number("memory.max_usage_in_bytes")
        found["oom_kills"] = memory.table("memory.oom_control").get("oom_kill", 0)
    if pids := of.get("pids"):
        found["pids"] = pids.number("pids.current")
        found["pids_peak"] = pids.number("pids.peak")
        found["pids_refused"] = pids.table("pids.events").get("max", 0)
    if io := of.get("io"):
        rows = [line.split() for line in io.read("blkio.throttle.io_service_bytes").splitlines()]
        found["io_read"] = sum(int(row[2]) for row in rows if row[1:2] == ["Read"])
        found["io_write"] = sum(int(row[2]) for row in rows if row[1:2] == ["Write"])
    return found


def freeze(freezer: Directory, timeout_s: float) -> bool:
    """False when a task did not stop in time (one in uninterruptible sleep stays FREEZING)."""
    freezer.write("freezer.state", "FROZEN")
    return wait(lambda: freezer.read("freezer.state").strip() == "FROZEN", timeout_s)


def thaw(freezer: Directory) -> None:
    freezer.write("freezer.state", "THAWED")
