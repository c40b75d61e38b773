"""Tier "fake", for tests of code that uses fumehood: the real agent, in a plain process, WITHOUT ANY ISOLATION.

What runs in it runs as you, on your files and your network; every protection is stated as off. It is never chosen by
"auto", only by its name, and a policy that requires any protection (such as "strict") is refused.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import fumehood
from fumehood.config import Config
from fumehood.errors import CapacityExceeded, InvalidTransition, ProtectionUnavailable
from fumehood.events import Event
from fumehood.model import Enforcement, Limits, Protection, SandboxSpec, Usage
from fumehood.runtime import tree
from fumehood.runtime.base import Capabilities, Stats, missing

_NAMES = (
    *("pid-namespace", "mount-namespace", "network-namespace", "uts-namespace", "ipc-namespace", "user-namespace"),
    *("cgroup-namespace", "distinct-uid", "read-only-root", "masked-proc", "no-new-privs", "capabilities", "landlock"),
    *("seccomp", "syscall-count", "cpu", "memory", "swap", "pids", "disk", "freezer", "block-io"),
)
_OFF = tuple(Protection(name, Enforcement.OFF, "the fake tier isolates nothing", "use the native tier") for name in _NAMES)
# -I keeps the caller's PYTHON* variables and directory out; the path is put back because a checkout may come from there.
_START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from fumehood.runtime.keeper import main; main()"
_PACKAGE_PARENT = str(Path(fumehood.__file__).parents[1])


class FakeHandle:
    """One agent and what it started. Times and sizes are those of the processes alive at the reading."""

    protections = _OFF
    patience, grace, greeted = 1.0, 1.0, False

    def __init__(self, sandbox_id: str, keeper: subprocess.Popen[bytes], channel: socket.socket, home: str) -> None:
        self.sandbox_id = sandbox_id
        self.home = home
        self._keeper, self._channel = keeper, channel
        self._connected = False
        self._peak_memory = self._peak_pids = 0
        self._cpu_s = 0.0
        self._dead = asyncio.Event()
        self._pidfd = os.pidfd_open(keeper.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_end)

    @property
    def alive(self) -> bool:
        return not self._dead.is_set()

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._keeper.wait()  # a zombie by now, so this only reaps it
        self._dead.set()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._connected:
            raise InvalidTransition("this sandbox is connected already", cause="connect() can be called once")
        self._connected = True
        return await asyncio.open_unix_connection(sock=self._channel)

    async def pause(self) -> None:
        await asyncio.to_thread(tree.freeze, self._keeper.pid)

    async def resume(self) -> None:
        for process in tree.below(self._keeper.pid) if self.alive else []:
            tree.send(process, signal.SIGCONT)

    def stats(self) -> Stats:
        alive = tree.below(self._keeper.pid) if self.alive else []
        memory, pids = sum(p.memory_bytes for p in alive), sum(p.tasks for p in alive)
        self._peak_memory, self._peak_pids = max(self._peak_memory, memory), max(self._peak_pids, pids)
        self._cpu_s = max(self._cpu_s, sum(p.cpu_s for p in alive))
        usage = Usage(cpu_s=self._cpu_s, peak_memory_bytes=self._peak_memory, peak_pids=self._peak_pids)
        return Stats(usage, memory, pids, oom_kills=0, pids_refused=0)

    def disk_is_full(self) -> bool:
        try:
            return os.statvfs(self.home).f_bavail == 0
        except FileNotFoundError:
            return False  # the keeper has removed it: the sandbox has ended

    def disk_used_bytes(self) -> int:
        return sum(file.lstat().st_size for file in Path(self.home).rglob("*"))

    async def limit(self, limits: Limits) -> None:
        """No limit is enforced here, and `protections` says so."""

    def identity(self, spec: SandboxSpec) -> dict[str, Any]:
        return {}

    def told(self, account: Mapping[str, Any]) -> None:
        """Nothing is counted here but what the processes show."""

    async def kill(self) -> None:
        if self.alive:
            await asyncio.to_thread(self._end_all)
        await self.wait_dead()

    def _end_all(self) -> None:
        # Stopped first: then nobody forks on while we kill. The keeper itself stays, to adopt, reap and tidy up.
        for process in tree.freeze(self._keeper.pid):
            tree.send(process, signal.SIGKILL)

    async def wait_dead(self) -> None:
        await self._dead.wait()

    async def aclose(self) -> None:
        await self.kill()
        if not self._connected:  # else the stream owns it
            self._channel.close()


class FakeRuntime:
    """Raises ProtectionUnavailable for a spec that requires anything."""

    tier = "fake"
    late_limits = frozenset(f.name for f in fields(Limits))

    def __init__(self, config: Config) -> None:
        self._config = config
        self._handles: list[FakeHandle] = []

    def capabilities(self) -> Capabilities:
        return Capabilities(self.tier, available=True, protections=_OFF, reason="no isolation; for tests only")

    async def start(self, spec: SandboxSpec, sandbox_id: str, on_event: Callable[[Event], None]) -> FakeHandle:
        """The policy's limits, files and seccomp have no effect; its `require` is kept. Raises CapacityExceeded too."""
        if lacking := missing(spec.require, _OFF):
            raise ProtectionUnavailable(
                "the fake tier can't enforce: " + ", ".join(p.name for p in lacking),
                cause="the fake tier isolates nothing; the policy requires protections",
                remediation="use the native tier, or a policy without `require`",
            )
        home = tempfile.mkdtemp(prefix=f"fake-{sandbox_id}-", dir=self._config.run_dir)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                keeper = _start_keeper(theirs.fileno(), home)
            except OSError as e:
                ours.close()
                Path(home).rmdir()
                raise CapacityExceeded(f"can't start an agent: {e}", cause=str(e), remediation="end other processes") from e
        ours.setblocking(False)
        handle = FakeHandle(sandbox_id, keeper, ours, home)
        self._handles = [h for h in self._handles if h.alive] + [handle]
        return handle

    async def aclose(self) -> None:
        for handle in self._handles:
            await handle.aclose()
        self._handles.clear()


def _start_keeper(channel_fd: int, home: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _START, _PACKAGE_PARENT, str(channel_fd), home],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=home,
        env={"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": home, "LANG": "C.UTF-8"},
        pass_fds=(channel_fd,),
        start_new_session=True,  # Ctrl-C at the caller's terminal is the caller's
    )
