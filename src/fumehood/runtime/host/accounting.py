"""What bounds and counts one sandbox: cgroups where we may make them, else a watchdog that reads /proc and reacts."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

from fumehood.config import Config
from fumehood.errors import NotFound, SetupFailed
from fumehood.model import Limits, Protection, Usage
from fumehood.runtime.base import Stats
from fumehood.runtime.host import cgroup, cgroup_layout, watchdog
from fumehood.runtime.host.cgroup_layout import Layout

_SAMPLE_S = 0.05


class Account(Protocol):
    """Bounds, counts, freezes. `close()` only after every process is gone."""

    def doors(self) -> AbstractContextManager[list[int]]: ...
    def door_files(self) -> tuple[str, ...]: ...
    def entered(self, pid: int) -> None: ...
    def reading(self) -> Stats: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def kill_all(self) -> None: ...
    def apply(self, limits: Limits) -> None: ...
    def protections(self) -> tuple[Protection, ...]: ...
    def close(self) -> None: ...


class GroupAccount:
    def __init__(self, group: cgroup.Group) -> None:
        self._group = group
        self.doors, self.door_files = group.doors, group.door_files
        self.reading, self.thaw, self.apply = group.reading, group.thaw, group.apply
        self.protections, self.kill_all = group.protections, group.signal_all

    def entered(self, pid: int) -> None:
        """Raises SetupFailed unless the kernel lists `pid` in every group (H13)."""
        if not self._group.holds(pid):
            raise SetupFailed("the sandbox is not in its cgroups", remediation="run `fumehood doctor`")

    def freeze(self) -> None:
        self._group.freeze()

    def close(self) -> None:
        self._group.remove()
        self._group.close()


class WatchAccount:
    """Degraded: samples, and ends the sandbox after it passed a limit. A fork over the pids limit fails by RLIMIT_NPROC."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._watch: watchdog.Watch | None = None
        self._task: asyncio.Task[None] | None = None
        self._ooms = 0

    def doors(self) -> AbstractContextManager[list[int]]:
        return nullcontext([])

    def door_files(self) -> tuple[str, ...]:
        return ()

    def entered(self, pid: int) -> None:
        """Raises SetupFailed when it has ended."""
        try:
            self._watch = watchdog.Watch(pid, self._limits)
            pidfd = os.pidfd_open(pid)
        except (NotFound, ProcessLookupError) as e:
            raise SetupFailed("the sandbox ended while it was set up", cause=str(e)) from None
        self._task = asyncio.create_task(self._guard(pidfd))

    async def _guard(self, pidfd: int) -> None:
        try:
            while self._watch is not None:
                stats = await asyncio.to_thread(self._watch.sample)
                if watchdog.verdict(stats, self._limits) == "oom":
                    self._ooms = 1
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await asyncio.sleep(_SAMPLE_S)
        except ProcessLookupError:
            return  # it ended
        finally:
            os.close(pidfd)

    def reading(self) -> Stats:
        """oom_kills and pids_refused are 0 or 1: whether the limit was met, which is all that sampling can tell."""
        if self._watch is None:
            return Stats(Usage(), 0, 0, 0, 0)
        stats = self._watch.glance()  # in the supervisor's loop, where nothing may wait for a guest
        full = stats.usage.peak_pids >= self._limits.pids
        return replace(stats, oom_kills=self._ooms, pids_refused=int(full))

    def freeze(self) -> None:
        if self._watch is not None:
            self._watch.signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        if self._watch is not None:
            self._watch.signal_all(signal.SIGCONT)

    def kill_all(self) -> None:
        if self._watch is not None:
            self._watch.signal_all(signal.SIGKILL)

    def apply(self, limits: Limits) -> None:
        self._limits = limits

    def protections(self) -> tuple[Protection, ...]:
        return watchdog.protections()

    def close(self) -> None:
        self._watch = None
        if self._task is not None:
            self._task.cancel()


def layout(config: Config) -> Layout:
    """Raises SetupFailed when a group that was delegated to us can't be left."""
    cgroup_layout.settle()  # first: a group that we are still in is no place
    return cgroup_layout.probe(state_dir=str(config.state_dir))


def has_groups(where: Layout) -> bool:
    """Cgroups replace the watchdog only where they bound what it would watch."""
    return {"memory", "pids", "freezer"} <= where.places.keys()


def open_account(where: Layout, instance: str, sandbox_id: str, limits: Limits) -> Account:
    if has_groups(where):
        return GroupAccount(cgroup.Group.create(where, instance, sandbox_id, limits))
    return WatchAccount(limits)


def remove_instance(where: Layout, instance: str) -> None:
    if has_groups(where):
        cgroup.reconcile(where, instance)
