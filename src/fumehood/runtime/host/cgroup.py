"""The cgroups of one sandbox: made, entered, bounded, read, frozen, killed, removed as one thing (M2-M4, H15, H19).

Blocking calls, most of them well under a millisecond; freeze, kill and remove may wait up to their timeout, so an
event loop runs those in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from fumehood.errors import CapacityExceeded, InvalidTransition, ProtectionUnavailable, SetupFailed
from fumehood.model import Limits, Protection, Usage, check_id
from fumehood.runtime.base import Stats
from fumehood.runtime.host import cgroup_v1, cgroup_v2
from fumehood.runtime.host.cgroup_layout import Layout, make, probe
from fumehood.runtime.host.cgroup_protections import FIX, protections
from fumehood.runtime.host.cgroup_tree import Directory, signal_all, step, wait

__all__ = ["Group", "Layout", "probe", "reconcile"]

# Files that kernels or boot options leave out, and the protection that goes with each. All others must be there (H13).
_OPTIONAL = {cgroup_v1.MEMSW: "swap", "memory.swap.max": "swap", "memory.kmem.tcp.limit_in_bytes": ""}


class Group:
    """Made by `create`. As a context manager it kills what is inside and removes itself at the end."""

    def __init__(self, layout: Layout, limits: Limits) -> None:
        self.layout = layout
        self.limits = limits
        self._of: dict[int, dict[str, Directory]] = {1: {}, 2: {}}  # version -> controller -> directory
        self._directories: list[Directory] = []
        self._written: dict[str, str] = {}
        self._absent: set[str] = set()
        self._peak_pids = self._peak_memory = 0
        self._refused: int | None = None

    @classmethod
    def create(cls, layout: Layout, instance: str, sandbox_id: str, limits: Limits) -> Group:
        """Every directory made and every limit written, or nothing left behind.

        Raises InvalidInput (bad or taken name), ProtectionUnavailable (no controller may be used here),
        CapacityExceeded (the kernel has no group left), SetupFailed (a step failed; names it).
        """
        check_id(instance, "instance")
        check_id(sandbox_id, "sandbox id")
        if not layout.places:
            why = "; ".join(f"{name}: {reason}" for name, reason in layout.missing.items())
            raise ProtectionUnavailable("no cgroup can be made here", cause=why, remediation=FIX)
        group = cls(layout, limits)
        with ExitStack() as undo:
            undo.callback(group.close)
            for place, controllers in layout.by_place().items():
                path = make(place, controllers, instance, sandbox_id)
                undo.callback(os.rmdir, path)
                group._hold(path, place.version, controllers)
            group._written = cgroup_v1.fresh(layout.device) | cgroup_v2.fresh(layout.device)
            group._write(limits)
            undo.pop_all()
        return group

    def _hold(self, path: str, version: int, controllers: list[str]) -> None:
        with step(f"open {path}"):
            directory = Directory(path)
        self._directories.append(directory)
        self._of[version].update(dict.fromkeys(controllers, directory))

    def _writes(self, limits: Limits) -> Iterator[tuple[Directory, str, str]]:
        v1, v2 = self._of[1], self._of[2]
        memsw = int(self._written.get(cgroup_v1.MEMSW, 0))
        for controller, file, value in cgroup_v1.writes(limits, self.layout.device, memsw):
            if controller in v1:
                yield v1[controller], file, value
        for controller, file, value in cgroup_v2.writes(limits, self.layout.device):
            if controller in v2:
                yield v2[controller], file, value

    def _write(self, limits: Limits) -> None:
        """Only what differs from what the kernel has already: binding late is mostly one or two writes."""
        for directory, file, value in self._writes(limits):
            if self._written.get(file) == value:
                continue
            try:
                with step(f"write {value} to {directory.path}/{file}"):
                    directory.write(file, value)
                self._written[file] = value
            except SetupFailed as e:
                if file not in _OPTIONAL or e.details["errno"] != "ENOENT":
                    raise
                self._absent.add(_OPTIONAL[file])

    def attach(self, pid: int) -> None:
        """Move a process, all its threads, into every controller. Raises SandboxGone when it has ended, SetupFailed.

        Costs about 6 ms: moving another process waits for an RCU grace period. `doors` costs 0.1 ms.
        """
        for directory in self._directories:
            with step(f"attach {pid} to {directory.path}"):
                directory.write("cgroup.procs", str(pid))

    @contextmanager
    def doors(self) -> Generator[list[int]]:
        """Descriptors into each of which a single-threaded child of ours writes b"0" to enter this group by itself.

        In v1 a thread that moves itself through `tasks` takes no lock on the thread group, hence no RCU wait; the
        kernel checks the opener's rights, so the child may be unprivileged already. Pass them by SCM_RIGHTS or fork;
        the child closes them before anything untrusted runs. Then ask `holds`: the child's word is not proof.
        """
        with ExitStack() as stack:
            fds: list[int] = []
            for version, of in self._of.items():
                door = cgroup_v1.DOOR if version == 1 else cgroup_v2.DOOR
                for directory in dict.fromkeys(of.values()):
                    fds.append(os.open(door, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory.fd))
                    stack.callback(os.close, fds[-1])
            yield fds

    def door_files(self) -> tuple[str, ...]:
        """The same by name, for a child that is root still, or that the groups were delegated to."""
        doors = ((cgroup_v1.DOOR if version == 1 else cgroup_v2.DOOR, of) for version, of in self._of.items())
        return tuple(f"{directory.path}/{door}" for door, of in doors for directory in dict.fromkeys(of.values()))

    def holds(self, pid: int) -> bool:
        """Is the process in every directory of this group? The kernel's word."""
        return all(pid in directory.pids() for directory in self._directories)

    def apply(self, limits: Limits) -> None:
        """Other limits for a live group; only what differs is written. On failure the old ones are put back.

        Raises CapacityExceeded when more memory is in use than the new limit and can't be reclaimed, SetupFailed.
        """
        v2 = self._of[2].get("memory")
        if v2 and limits.memory_bytes < self.limits.memory_bytes and not cgroup_v2.make_room(v2, limits.memory_bytes):
            raise self._no_room(limits)
        try:
            self._write(limits)
        except SetupFailed as e:
            self._write(self.limits)
            if e.details["errno"] == "EBUSY":
                raise self._no_room(limits) from e
            raise
        self.limits = limits

    def _no_room(self, limits: Limits) -> CapacityExceeded:
        return CapacityExceeded(
            "the sandbox uses more memory than its new limit",
            cause=f"{self.reading().memory_bytes} bytes are in use, {limits.memory_bytes} were asked for",
            remediation="end some of its processes, or choose a higher limit",
        )

    def reading(self) -> Stats:
        """What the kernel has counted. Zero for a missing controller; `usage.wall_s` is the supervisor's to know."""
        found = cgroup_v1.read(self._of[1]) | cgroup_v2.read(self._of[2])
        pids = found.get("pids", 0)
        self._peak_pids = max(self._peak_pids, pids, found.get("pids_peak", 0))
        memory = found.get("memory", 0)
        self._peak_memory = max(self._peak_memory, memory, found.get("memory_peak", 0))  # v2 has no such file before 5.19
        return Stats(
            usage=Usage(
                cpu_s=found.get("cpu_ns", 0) / 1e9,
                peak_memory_bytes=self._peak_memory,
                peak_pids=self._peak_pids,
                io_read_bytes=found.get("io_read", 0),
                io_write_bytes=found.get("io_write", 0),
            ),
            memory_bytes=memory,
            pids=pids,
            oom_kills=found.get("oom_kills", 0),
            pids_refused=found.get("pids_refused", 0) if self._refused is None else self._refused,
        )

    def freeze(self, timeout_s: float = 2.0) -> None:
        """Returns when no task runs. Raises InvalidTransition, thawed again, when one can't be stopped in time."""
        version, freezer = self._freezer()
        if not (cgroup_v1.freeze if version == 1 else cgroup_v2.freeze)(freezer, timeout_s):
            self.thaw()
            raise InvalidTransition(
                f"the sandbox did not freeze within {timeout_s} s",
                cause="one of its tasks is in an uninterruptible wait, such as for a slow disk",
                remediation="try again, or kill the sandbox",
            )

    def thaw(self) -> None:
        version, freezer = self._freezer()
        (cgroup_v1.thaw if version == 1 else cgroup_v2.thaw)(freezer)

    def _freezer(self) -> tuple[int, Directory]:
        for version, of in self._of.items():
            if "freezer" in of:
                return version, of["freezer"]
        raise ProtectionUnavailable("there is no freezer", cause=self.layout.missing.get("freezer", ""), remediation=FIX)

    def kill(self, timeout_s: float = 5.0) -> None:
        """SIGKILL until no process is left. Raises InvalidTransition when one outlives the timeout.

        No new forks meanwhile: with pids.max at 0 a fork bomb can't outrun the loop (H15). Its refusals are not the
        sandbox's own, so the count is taken before.
        """
        if self._refused is None:
            self._refused = self.reading().pids_refused
        if not self._killed_at_once():
            self._stop_forks()
        if not wait(self._killed, timeout_s):
            raise InvalidTransition(
                "the sandbox has processes that SIGKILL has not ended yet",
                cause="they are in an uninterruptible wait, or an outer freezer holds them",
                remediation="kill it again later",
                pids=self._listed()[:20],
            )

    def signal_all(self) -> None:
        """SIGKILL to whoever is in the group now: one round, no promise; `kill` makes one."""
        if self._directories and not self._killed_at_once():
            signal_all(self._directories[0])

    def _killed_at_once(self) -> bool:
        """By cgroup.kill, which misses nobody; False where the kernel has none."""
        return "freezer" in self._of[2] and cgroup_v2.kill(self._of[2]["freezer"])

    def _listed(self) -> list[int]:
        return sorted({pid for directory in self._directories for pid in directory.pids()})

    def _stop_forks(self) -> None:
        for of in self._of.values():
            if "pids" in of:
                of["pids"].write("pids.max", "0")
        self._written.pop("pids.max", None)

    def _killed(self) -> bool:
        """One round. Thawing comes after the signals: a v1-frozen task dies only once thawed, and runs nothing first."""
        signalled = any(signal_all(directory) for directory in self._directories)
        if any("freezer" in of for of in self._of.values()):
            self.thaw()
        return not signalled

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the directories, last made first, and the counts with them: take a reading before. Idempotent.

        Raises InvalidTransition while a process lives inside.
        """
        while self._directories:
            self._directories[-1].remove(timeout_s)
            self._directories.pop()
        self._of = {1: {}, 2: {}}

    def close(self) -> None:
        """Give the descriptors back; the group stays."""
        for directory in self._directories:
            directory.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._directories:
            self.kill()
            self.remove()

    def protections(self) -> tuple[Protection, ...]:
        return protections(self.layout, self.limits, frozenset(self._absent))


def reconcile(layout: Layout, instance: str) -> tuple[str, ...]:
    """Kill and remove all that a dead supervisor's instance left, however far it had come (H19). The sandboxes' ids.

    Raises InvalidTransition when a process can't be ended. Calling it again goes on where it stopped.
    """
    check_id(instance, "instance")
    by_place = layout.by_place()
    roots = [Path(place.of(instance)) for place in by_place if Path(place.of(instance)).is_dir()]
    left = sorted({child.name for root in roots for child in root.iterdir() if child.is_dir()})
    for sandbox_id in left:
        group = Group(layout, Limits())
        for place, controllers in by_place.items():
            if Path(path := place.of(instance, sandbox_id)).is_dir():
                group._hold(path, place.version, controllers)  # pyright: ignore[reportPrivateUsage]
        group.kill()
        group.remove()
    for root in roots:
        root.rmdir()
    return tuple(left)
