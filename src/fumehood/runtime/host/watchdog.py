"""What a sandbox uses, from the host's /proc, where no cgroup may be made (rootless without delegation; M2-M4, H15).

Degraded by nature: a sample sees only its moment, a limit is noticed after it was passed, and memory that no process
maps (files on tmpfs, memfds, pipe and socket buffers) is not seen; tmpfs size limits and rlimits bound those.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass

from fumehood.errors import NotFound
from fumehood.model import Enforcement, Limits, Protection, Status, Usage
from fumehood.runtime.base import Stats
from fumehood.runtime.host.cgroup_protections import FIX

_TICKS = os.sysconf("SC_CLK_TCK")
_VANISHED = (FileNotFoundError, ProcessLookupError)  # gone before the open; between open and read (ESRCH)


@dataclass(frozen=True, slots=True)
class _Process:
    """From /proc/<pid>/stat. `ticks` has the CPU time of its waited-for children in it; `started` tells reused pids."""

    parent: int
    ticks: int
    threads: int
    started: int
    rss_bytes: int


class Watch:
    """Watches one sandbox by the host pid of its pid namespace's init. Raises NotFound when that has ended already."""

    def __init__(self, pidns_init_pid: int, limits: Limits) -> None:
        self.pid = pidns_init_pid
        self.limits = limits
        init, self._namespace = _process(self.pid), _namespace(self.pid)
        if init is None:
            raise NotFound(f"no process {self.pid}", cause="the sandbox has ended", remediation="make a new sandbox")
        self._started = init.started
        self._usage, self._memory_bytes = Usage(), 0

    def sample(self) -> Stats:
        """One look at every process. What only grows never shrinks between samples. Zero live figures once it ended.

        Blocking, and a hostile process can make it wait (reading PSS takes the lock on its memory map): in a thread.
        """
        members = self._members()
        self._memory_bytes = sum(_memory(pid, process) for pid, process in members.items())
        return self._note(members, *map(sum, zip((0, 0), *map(_io, members), strict=True)))

    def glance(self) -> Stats:
        """The same without what can block: memory and block I/O are those of the last sample."""
        return self._note(self._members(), 0, 0)

    def _note(self, members: dict[int, _Process], read: int, write: int) -> Stats:
        memory = self._memory_bytes if members else 0
        threads = sum(process.threads for process in members.values())
        past = self._usage
        self._usage = Usage(
            cpu_s=max(past.cpu_s, sum(process.ticks for process in members.values()) / _TICKS),
            peak_memory_bytes=max(past.peak_memory_bytes, memory),
            peak_pids=max(past.peak_pids, threads),
            io_read_bytes=max(past.io_read_bytes, read),
            io_write_bytes=max(past.io_write_bytes, write),
        )
        return Stats(self._usage, memory, threads, oom_kills=0, pids_refused=0)

    def signal_all(self, number: int) -> None:
        """To every process, again until a look finds no new one: a fork may slip between looking and stopping."""
        seen: set[int] = set()
        while new := {pid: process for pid, process in self._members().items() if pid not in seen}:
            seen |= new.keys()
            for pid, process in new.items():
                _signal(pid, process, number)

    def _members(self) -> dict[int, _Process]:
        """By pid namespace or by descent, since either alone has a hole.

        A namespace's link is unreadable for a process that another security module guards, and differs in a nested
        one; a parent read before its child was orphaned no longer leads to init.
        """
        # Parents first: a child that is reaped meanwhile is missed once, not counted twice, for its figures move up.
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
        everyone = {pid: process for pid in pids if (process := _process(pid)) is not None}
        init = everyone.get(self.pid)
        if init is None or init.started != self._started:
            return {}
        inside = {pid for pid in everyone if self._namespace and _namespace(pid) == self._namespace} | {self.pid}
        children: dict[int, list[int]] = {}
        for pid, process in everyone.items():
            children.setdefault(process.parent, []).append(pid)
        unseen = list(inside)
        while unseen:
            found = set(children.get(unseen.pop(), ())) - inside
            inside |= found
            unseen += found
        return {pid: everyone[pid] for pid in sorted(inside)}


def verdict(stats: Stats, limits: Limits) -> Status | None:
    """The status of a sandbox that has passed a limit, which ends it; None while it keeps them. Pure."""
    if stats.memory_bytes > limits.memory_bytes + limits.swap_bytes:
        return "oom"
    return "pids_limit" if stats.pids > limits.pids else None


def protections() -> tuple[Protection, ...]:
    """What watching is worth. Same names as the cgroups'."""
    noticed = "no cgroup; a watchdog samples and ends the sandbox after it passed the limit"
    states = {
        "cpu": (Enforcement.OFF, "no cgroup; only the deadline bounds CPU time"),
        "memory": (Enforcement.DEGRADED, noticed),
        "swap": (Enforcement.DEGRADED, noticed),
        "pids": (Enforcement.DEGRADED, noticed),
        "block-io": (Enforcement.OFF, "no cgroup; I/O is counted only"),
        "freezer": (Enforcement.DEGRADED, "no cgroup; SIGSTOP to each process, one after the other"),
    }
    return tuple(Protection(name, state, detail, FIX) for name, (state, detail) in states.items())


def _process(pid: int) -> _Process | None:
    """None once it has gone."""
    stat = _read(pid, "stat")
    if not stat:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses of its own
    numbers = [int(x) for x in fields[1:22]]  # proc_pid_stat(5), field 4 onwards
    return _Process(
        parent=numbers[0],
        ticks=sum(numbers[10:14]),  # utime, stime, cutime, cstime: a reaped child lives on in its parent's
        threads=numbers[16],
        started=numbers[18],
        rss_bytes=max(0, numbers[20]) * os.sysconf("SC_PAGE_SIZE"),
    )


def _signal(pid: int, process: _Process, number: int) -> None:
    """Only to the process that was seen: pinned first, then known by its start, so that no reused pid is hit."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            now = _process(pid)
            if now is not None and now.started == process.started:
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _memory(pid: int, process: _Process) -> int:
    """PSS with swap: a sandbox shares over 100 MiB with its zygote, which RSS would charge anew to each process.

    Where PSS can't be read, RSS errs on the safe side. Page tables besides: 256 GiB of the zero page are half a GiB of them.
    """
    rollup = _read(pid, "smaps_rollup")
    kib = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith(("Pss:", "SwapPss:"))]
    tables = [int(line.split()[1]) for line in _read(pid, "status").splitlines() if line.startswith("VmPTE:")]
    return (sum(kib) * 1024 if kib else process.rss_bytes) + sum(tables) * 1024


def _io(pid: int) -> tuple[int, int]:
    """Bytes that reached a disk; children that were waited for are in their parent's."""
    fields = dict(line.split(": ") for line in _read(pid, "io").splitlines())
    return int(fields.get("read_bytes", 0)), int(fields.get("write_bytes", 0))


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except (*_VANISHED, PermissionError):
        return ""


def _read(pid: int, file: str) -> str:
    """Empty when the process has gone or may not be looked into."""
    try:
        with open(f"/proc/{pid}/{file}", encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except (*_VANISHED, PermissionError):
        return ""
