"""Control groups, version 2: which file takes what (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fumehood.model import Limits
from fumehood.runtime.host.cgroup_tree import Directory, wait

PERIOD_US = 100_000
DOOR = "cgroup.procs"
SUPERVISOR = "supervisor"  # where the processes of a delegated group go
_ROUNDS = 8

# cpuacct and freezer are part of the core there: every directory has cpu.stat, and since 5.2 cgroup.freeze.
CORE = frozenset({"cpuacct", "freezer"})


def writes(limits: Limits, device: str | None) -> list[tuple[str, str, str]]:
    """(controller, file, value)."""
    pairs = [
        ("pids", "pids.max", limits.pids),
        ("memory", "memory.swap.max", limits.swap_bytes),
        ("memory", "memory.max", limits.memory_bytes),
        ("cpu", "cpu.max", f"{round(limits.cpus * PERIOD_US)} {PERIOD_US}"),
        ("cpu", "cpu.weight", limits.cpu_weight),
    ]
    return [
        *((controller, file, str(value)) for controller, file, value in pairs),
        *(("io", file, rule) for file, rule in _throttle(limits, device).items()),
    ]


def fresh(device: str | None) -> dict[str, str]:
    """What a new group has already, by file: writes that can be saved."""
    return {"cpu.weight": "100", **_throttle(Limits(io_read_bps=0, io_write_bps=0), device)}


def _throttle(limits: Limits, device: str | None) -> dict[str, str]:
    read, write = limits.io_read_bps or "max", limits.io_write_bps or "max"
    return {"io.max": f"{device} rbps={read} wbps={write}"} if device else {}


def make_room(memory: Directory, target: int) -> bool:
    """Reclaim down to `target` bytes. To lower memory.max below what is in use would call the OOM killer instead."""
    over = memory.number("memory.current") - target
    if over > 0:
        try:
            memory.write("memory.reclaim", str(over))
        except (BlockingIOError, FileNotFoundError):  # EAGAIN: not all of it; ENOENT: before Linux 5.19
            return memory.number("memory.current") <= target
    return True


def read(of: Mapping[str, Directory]) -> dict[str, int]:
    found: dict[str, int] = {}
    if core := of.get("cpuacct"):
        found["cpu_ns"] = core.table("cpu.stat").get("usage_usec", 0) * 1000
    if memory := of.get("memory"):
        found["memory"] = memory.number("memory.current")
        found["memory_peak"] = memory.number("memory.peak")
        found["oom_kills"] = memory.table("memory.events").get("oom_kill", 0)
    if pids := of.get("pids"):
        found["pids"] = pids.number("pids.current")
        found["pids_peak"] = pids.number("pids.peak")
        found["pids_refused"] = pids.table("pids.events").get("max", 0)
    if io := of.get("io"):
        # A device without counts may have its number alone, on a line of its own or in front of the next one.
        fields = [field.split("=") for field in io.read("io.stat").split() if "=" in field]
        found["io_read"] = sum(int(n) for key, n in fields if key == "rbytes")
        found["io_write"] = sum(int(n) for key, n in fields if key == "wbytes")
    return found


def enable(path: str, controllers: set[str]) -> None:
    """Hand controllers down to the children of `path`. Raises OSError (EBUSY: processes live in `path` itself)."""
    directory = Directory(path)
    try:
        lacking = controllers - set(directory.read("cgroup.subtree_control").split())
        if lacking:
            directory.write("cgroup.subtree_control", " ".join(f"+{c}" for c in sorted(lacking)))
    finally:
        directory.close()


def vacate(path: str) -> None:
    """Every process of `path` into a group below it. Raises OSError.

    In rounds, for what forks meanwhile. Who is left after the last one shows when controllers are to be handed down.
    """
    below = f"{path}/{SUPERVISOR}"
    with suppress(FileExistsError):
        os.mkdir(below)
    for _ in range(_ROUNDS):
        pids = Path(path, "cgroup.procs").read_text().split()
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended
                Path(below, "cgroup.procs").write_text(pid)
        if not pids:
            return


def freeze(core: Directory, timeout_s: float) -> bool:
    """False when a task did not stop in time."""
    core.write("cgroup.freeze", "1")
    return wait(lambda: core.table("cgroup.events").get("frozen") == 1, timeout_s)


def thaw(core: Directory) -> None:
    core.write("cgroup.freeze", "0")


def kill(core: Directory) -> bool:
    """Everything below dies at once, frozen or forking. False before Linux 5.14, which lacks cgroup.kill."""
    try:
        core.write("cgroup.kill", "1")
    except FileNotFoundError:
        return False
    return True
