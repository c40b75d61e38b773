"""Reads /proc of the host. A process that ended meanwhile counts for nothing."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

_GONE = (FileNotFoundError, ProcessLookupError)


def family(root: int) -> list[int]:
    """Every descendant of `root`, without itself; of all pid namespaces, as the host sees them."""
    children: dict[int, list[int]] = defaultdict(list)
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(*_GONE):
            # The command's name may hold spaces and brackets: fields count from its last bracket (proc(5)).
            children[int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])].append(int(name))
    found, waiting = list[int](), [root]
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += below
    return found


def is_zombie(pid: int) -> bool:
    with suppress(*_GONE):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _field(path: str, name: str) -> int:
    with suppress(*_GONE):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def status_kib(pid: int | str, name: str) -> int:
    return _field(f"/proc/{pid}/status", name)


def pss_kib(pid: int) -> int:
    """This process's memory, shared pages divided by how many share them. Root only for other uids' processes."""
    return _field(f"/proc/{pid}/smaps_rollup", "Pss")


def available_kib() -> int:
    return _field("/proc/meminfo", "MemAvailable")


def lines(path: str) -> int:
    with suppress(*_GONE, OSError):  # a zombie's mountinfo is EINVAL
        return len(Path(path).read_text().splitlines())
    return 0


def entries(path: str) -> int:
    with suppress(*_GONE):
        return len(os.listdir(path))
    return 0


def cgroups() -> list[Path]:
    """Every cgroup of this host that is mounted somewhere, of all hierarchies."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if " cgroup" in line]
    # os.walk and not rglob: groups of other processes go while we look, which it takes as it comes.
    return [Path(top, name) for mount in mounts for top, names, _ in os.walk(mount) for name in names]


class Peak:
    """How far this process's resident memory rose above its start, in MiB."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS (proc(5))
        self._start_kib = status_kib("self", "VmRSS")
        self.mib = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = round((status_kib("self", "VmHWM") - self._start_kib) / 1024, 2)
