"""PID 1 of a microVM: makes a sandbox of a bare kernel, then serves one host after the other.

A host comes back after each restore of a snapshot, so contexts and programs outlive the connection that started them.
PID 1 is root, for the clock and the limits, and touches files as the user (fsuid): no path that user code made up leads it
anywhere that the user could not go. Words of the kernel's command line: fumehood.preload=MODULE,... and
fumehood.prestart=LANGUAGE,...
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import struct
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import NoReturn

from . import boot, child, python
from .channel import Host, find
from .loop import Refused
from .rules import Rules, apply
from .serve import DEFAULT_PATH, HOME, Agent

UID = 1000
GROUP = f"{boot.CGROUP}/user"
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP, _CAPABILITY_VERSION_3 = 38, 24, 0x20080522
RESERVE_BYTES = 32 << 20  # of the guest's memory: for PID 1 and the kernel, out of reach of user code
PIDS, INODES, OPEN_FILES = 1024, 65_536, 65_536
_RLIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: OPEN_FILES, resource.RLIMIT_MEMLOCK: 8 << 20}
_ENVIRON = {
    "PATH": f"/opt/python/bin:{DEFAULT_PATH}",
    "HOME": HOME,
    "LANG": "C.UTF-8",
    "MPLCONFIGDIR": "/tmp/.mpl",
    **{f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "NUMEXPR")},
}
_READ = ("memory.events", "memory.peak", "pids.events", "pids.current", "pids.peak")
_NEAR_BYTES = 4 << 20  # no allocation that could end in OOM asks for more at once
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """When a step fails the host hears which. A PID 1 that ends is a kernel panic, which ends the machine."""
    host, step = None, ""
    try:
        for name, action in _STEPS.items():
            step = name
            action()
        step = "channel"
        host = find()
        step = "agent"
        agent = prepare(host)
    except BaseException as e:
        traceback.print_exc()
        failed = {"step": step, "errno": getattr(e, "errno", None), "message": f"{type(e).__name__}: {e}"[:2000]}
        (host or find()).confess({"setup_failed": failed})
        os._exit(1)
    agent.run()
    os._exit(1)


def prepare(host: Host) -> Agent:
    options = boot.command_line()
    machine = Machine()
    os.environ.clear()
    os.environ.update(_ENVIRON)
    os.chdir(HOME)
    harden()
    _be_user()
    child.settle_as_init()
    if modules := _list(options, "preload"):
        python.preload(modules)
    agent = Agent(HOME, machine.confine, machine)
    for language in _list(options, "prestart"):
        agent.contexts.awake(agent.contexts.default(language))
    host.attach_to(agent)
    return agent


def _list(options: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(filter(None, options.get(name, "").split(",")))


def make_group() -> None:
    """The control group of user code. Raises OSError where the kernel has no such controllers."""
    Path(boot.CGROUP, "cgroup.subtree_control").write_text("+memory +pids")
    os.mkdir(GROUP)


_STEPS: Mapping[str, Callable[[], object]] = {
    "file-systems": lambda: boot.file_systems(UID),
    "console": boot.console,
    "loopback": boot.loopback,
    "switches": boot.switches,
    "cgroup": make_group,
}


def harden() -> None:
    """What children inherit and PID 1 does not mind, so that no fork pays: a guest's system call can cost 0.2 ms."""
    for number, value in _RLIMITS.items():
        resource.setrlimit(number, (value, value))
    child.prctl(PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        child.prctl(PR_CAPBSET_DROP, capability)
    os.setgroups([])


def _be_user() -> None:
    _libc.setfsgid(UID)
    _libc.setfsuid(UID)
    if _libc.setfsuid(UID) != UID:  # it says what was before, and never that it failed
        raise PermissionError("setfsuid did not take")


@contextlib.contextmanager
def _as_root() -> Generator[None]:
    _libc.setfsuid(0)
    try:
        yield
    finally:
        _be_user()


class Machine:
    """What the agent of a guest can do and that of a mere sandbox can't. Its files are opened while PID 1 is still root."""

    def __init__(self) -> None:
        names = ("cgroup.procs", "memory.max", "pids.max", *_READ)
        self._files = OPEN_FILES
        self._fds = {n: os.open(f"{GROUP}/{n}", os.O_CLOEXEC | (os.O_RDONLY if n in _READ else os.O_WRONLY)) for n in names}
        self._ids = {
            n: os.open(f"{boot.RUN}/{n}", os.O_RDWR | os.O_CREAT, 0o444) for n in ("machine-id", "hostname", "boot-id")
        }
        boot.mount(f"{boot.RUN}/boot-id", "/proc/sys/kernel/random/boot_id", flags=boot.BIND)
        self._fds["pids"] = os.open(f"{GROUP}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
        self._rules: Rules = {}
        self._changed = select.poll()
        for name in ("memory.events", "pids.events"):
            self._changed.register(self._fds[name], select.POLLPRI)
        self._oom_kills = self._pids_refused = self._ooms_before = self._refused_before = 0
        self._limits, self._most_bytes = dict[str, int](), boot.memory_total_bytes() - RESERVE_BYTES
        self.limit({})
        self.renew()

    def limit(self, limits: Mapping[str, int]) -> None:
        """`memory_bytes` and `pids` of all user code together, `disk_bytes` and `inodes` of all that it can write; `open_files`
        of each process. Raises OSError.
        """
        wanted = {"memory_bytes": self._most_bytes, "pids": PIDS, "inodes": INODES, **limits}
        wanted["memory_bytes"] = min(wanted["memory_bytes"], self._most_bytes)
        # Most are what the snapshot has already, and each costs an emulated kernel up to 10 ms.
        new = {name for name, value in wanted.items() if self._limits.get(name) != value}
        if "memory_bytes" in new:
            self._set("memory.max", wanted["memory_bytes"])
        if "pids" in new:
            self._set("pids.max", wanted["pids"])
        if "disk_bytes" in wanted and new & {"disk_bytes", "inodes"}:
            with _as_root():
                boot.resize_disk(wanted["disk_bytes"], wanted["inodes"])
        if "open_files" in new:
            self._files = wanted["open_files"]
            for pid in os.pread(self._fds["pids"], 1 << 20, 0).split():  # sessions that were forked before
                with contextlib.suppress(ProcessLookupError):  # it may have ended
                    resource.prlimit(int(pid), resource.RLIMIT_NOFILE, (self._files, self._files))
        self._limits = wanted

    def restrict(self, rules: Rules) -> None:
        """The file rules of whoever this becomes. Raises Refused, also for others than it has already."""
        if rules == self._rules:
            return
        if self._rules:
            raise Refused("invalid", "this machine has file rules already")
        with _as_root():
            apply(rules)
        self._rules = rules

    def renew(self) -> None:
        """Ids that clones of one snapshot must not share (H20). After the kernel's random numbers were."""
        random, name = os.urandom(32).hex(), os.uname().nodename
        boot_id = f"{random[:8]}-{random[8:12]}-4{random[13:16]}-8{random[17:20]}-{random[20:32]}"  # RFC 9562, version 4
        for file, text in {"boot-id": boot_id, "machine-id": random[32:], "hostname": name}.items():
            os.pwrite(self._ids[file], f"{text}\n".encode(), 0)
        os.ftruncate(self._ids["hostname"], len(name) + 1)
        self._look(self._number("pids.peak"))
        self._ooms_before, self._refused_before = self._oom_kills, self._pids_refused

    def account(self) -> dict[str, int | bool]:
        """What only this kernel knows of user code's fate, since it is this user's: what befell the one whose clone this is
        would be told as the clone's. Its word is good enough for its own guest.
        """
        disk, peak = os.statvfs(boot.RUN), self._number("pids.peak")
        self._look(peak)
        return {
            "oom_kills": self._oom_kills - self._ooms_before,
            "pids_refused": self._pids_refused - self._refused_before,
            "pids": self._number("pids.current"),
            "pids_peak": peak,
            "disk_full": disk.f_bavail == 0 or disk.f_favail == 0,
            "disk_used_bytes": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        }

    def _look(self, pids_peak: int) -> None:
        """What was killed or refused is read only if there is news, or may be: text of several lines is slow to make. That a
        limit was come near to says too little, for the whole machine can be out of memory before; and the kernel tells of news
        at most once a tick.
        """
        changed = {fd for fd, _ in self._changed.poll(0)}
        is_near = self._number("memory.peak") > self._limits["memory_bytes"] - _NEAR_BYTES
        if is_near or self._fds["memory.events"] in changed:
            self._oom_kills = self._count("memory.events", "oom_kill")
        if pids_peak >= self._limits["pids"] or self._fds["pids.events"] in changed:
            self._pids_refused = self._count("pids.events", "max")

    def confine(self) -> None:
        """In every child, last thing before user code. Raises OSError, and then nothing of the user's runs."""
        os.write(self._fds["cgroup.procs"], b"0")
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._files, self._files))
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)  # from 0 to none: takes all capabilities along (capabilities(7))
        header, left = (
            ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), 8),
            ctypes.create_string_buffer(24),
        )
        if _libc.capget(header, left) or any(left.raw):
            raise PermissionError("capabilities are left")

    def _set(self, name: str, value: int) -> None:
        os.pwrite(self._fds[name], str(value).encode(), 0)

    def _number(self, name: str) -> int:
        return int(os.pread(self._fds[name], 32, 0))

    def _count(self, name: str, word: str) -> int:
        lines = os.pread(self._fds[name], 512, 0).decode().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[0] == word), 0)
