"""What the figures depend on: the machine, and how busy it was with other work."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BUSY_SHARE = 0.15  # of all processors, while this benchmark sleeps: more than that and the figures are others' as well
_VERSIONS = {"bwrap": "--version", "crun": "--version", "runc": "--version", "runsc": "--version"}


def facts() -> dict[str, Any]:
    """Everything that a reader needs to judge the figures. `load_1m` is the load average when the run began."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "python": platform.python_version(),
        "uid": os.geteuid(),
        "cgroup": "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1 or hybrid",
        "load_1m": round(os.getloadavg()[0], 2),
        "versions": {name: _version(name, flag) for name, flag in _VERSIONS.items() if shutil.which(name)},
    }


def _cpu() -> str:
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.machine())


def _version(name: str, flag: str) -> str:
    done = subprocess.run([name, flag], capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout + done.stderr).strip().partition("\n")[0]


def _ticks() -> tuple[int, int]:
    """(busy, all) since boot, over all processors; time stolen by other guests of the same metal counts as busy."""
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal, user + nice + system + irq + softirq + steal + idle + iowait


def busy_share(seconds: float = 1.0) -> float:
    """The share (0-1) of all processors that others use: this process only sleeps meanwhile."""
    busy, total = _ticks()
    time.sleep(seconds)
    busy_after, total_after = _ticks()
    return round((busy_after - busy) / max(1, total_after - total), 3)


def too_busy(load_1m: float, busy: float, cpus: int) -> str:
    """Why figures taken now would not be this program's own; empty when they would."""
    if load_1m > cpus / 2:
        return f"the load average is {load_1m:.2f} on {cpus} processors"
    return f"other work uses {busy:.0%} of the processors" if busy > BUSY_SHARE else ""
