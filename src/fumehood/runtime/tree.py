"""The processes below one, read from /proc, and signals to exactly those. Stdlib only: the fake tier's keeper uses it too."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    """One line of /proc/<pid>/stat, see proc_pid_stat(5). `started` tells a process from a later one with its pid."""

    pid: int
    parent: int
    state: str
    cpu_s: float  # its own and that of the children it has waited for
    tasks: int
    started: int
    memory_bytes: int


def read(pid: int) -> Process | None:
    """None when there is no such process any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold spaces and parentheses
    ticks = sum(map(int, fields[11:15]))
    return Process(pid, int(fields[1]), fields[0], ticks / _TICKS, int(fields[17]), int(fields[19]), int(fields[21]) * _PAGE)


def below(pid: int) -> list[Process]:
    """Every living descendant, parents first. Zombies are left out: they hold nothing."""
    children: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := read(int(name))) is not None:
            children.setdefault(process.parent, []).append(process)
    found, todo = list[Process](), [pid]
    while todo:
        for process in children.get(todo.pop(), ()):
            todo.append(process.pid)
            if process.state != "Z":
                found.append(process)
    return found


def send(process: Process, number: signal.Signals) -> None:
    """By pidfd, once it is sure that the pid is still that process's: a stranger may have got the number since."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if (now := read(process.pid)) is not None and now.started == process.started:
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass  # it ended between the two calls, which is all that a signal could have wanted
    finally:
        os.close(fd)


def freeze(pid: int) -> list[Process]:
    """SIGSTOP everything below `pid`, pass after pass until one finds nobody new; then nobody is left who could fork."""
    stopped: dict[tuple[int, int], Process] = {}
    while fresh := [p for p in below(pid) if (p.pid, p.started) not in stopped]:
        for process in fresh:
            send(process, signal.SIGSTOP)
            stopped[process.pid, process.started] = process
    return list(stopped.values())
