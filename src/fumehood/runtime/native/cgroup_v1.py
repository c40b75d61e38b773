"""Control groups, version 1: which file of which controller takes what (Documentation/admin-guide/cgroup-v1)."""

from __future__ import annotations

from collections.abc import Mapping

from fumehood.model import Limits
from fumehood.runtime.native.cgroup_tree import Directory, wait

PERIOD_US = 100_000
DOOR = "tasks"  # see Group.doors


def writes(limits: Limits, device: str | None, memory: Directory | None) -> list[tuple[str, str, str]]:
    """(controller, file, value) in the order in which the kernel takes them."""
    pairs = [
        ("pids", "pids.max", limits.pids),
        *_memory(limits, memory),
        ("cpu", "cpu.cfs_period_us", PERIOD_US),
        ("cpu", "cpu.cfs_quota_us", round(limits.cpus * PERIOD_US)),
        ("cpu", "cpu.shares", max(2, limits.cpu_weight * 1024 // 100)),
    ]
    return [(controller, file, str(value)) for controller, file, value in pairs] + [
        ("io", file, value) for file, value in _throttle(limits, device).items()
    ]


def unthrottled(device: str | None) -> dict[str, str]:
    """What a new group has, by file."""
    return _throttle(Limits(io_read_bps=0, io_write_bps=0), device)


def _throttle(limits: Limits, device: str | None) -> dict[str, str]:
    bps = {"read": limits.io_read_bps, "write": limits.io_write_bps}  # 0 lifts the rule
    return {f"blkio.throttle.{way}_bps_device": f"{device} {n}" for way, n in bps.items() if device}


def _memory(limits: Limits, memory: Directory | None) -> list[tuple[str, str, int | str]]:
    """The kernel refuses any moment at which limit > memsw: to grow, move memsw first; to shrink, the limit."""
    total = limits.memory_bytes + limits.swap_bytes
    first: tuple[str, str, int | str] = ("memory", "memory.limit_in_bytes", limits.memory_bytes)
    second: tuple[str, str, int | str] = ("memory", "memory.memsw.limit_in_bytes", total)
    growing = memory is not None and total >= memory.number(second[1]) > 0
    # Buffers of TCP sockets are charged to a counter of their own, which counts only once it has a limit (H15).
    sockets: tuple[str, str, int | str] = ("memory", "memory.kmem.tcp.limit_in_bytes", limits.memory_bytes // 4)
    return [*((second, first) if growing else (first, second)), sockets]


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
