"""The native tier: the supervisor's side of each sandbox. It holds root's powers, so it never follows a guest's path."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from fumehood.config import Config
from fumehood.errors import AgentUnresponsive, SetupFailed
from fumehood.events import Event, ZygoteLost
from fumehood.model import Limits, Protection, SandboxSpec, Template
from fumehood.runtime.base import Capabilities, Stats, check_required
from fumehood.runtime.host import accounting, journal
from fumehood.runtime.host.pidfd import kill
from fumehood.runtime.host.uids import UidBlock
from fumehood.runtime.host.waiting import readable
from fumehood.runtime.link import setup_failure
from fumehood.runtime.native import landlock, protections, seccomp
from fumehood.runtime.native.handover import last_words, rlimits, send_plan, step, write_maps
from fumehood.runtime.native.listeners import Listeners
from fumehood.runtime.native.mounts import OWN_DIRECTORIES
from fumehood.runtime.native.zygotes import Zygote, shown_in

_BY_GROUPS = frozenset({"cpus", "cpu_weight", "memory_bytes", "swap_bytes", "pids", "io_read_bps", "io_write_bps"})


class NativeHandle:
    """One live native sandbox. `_undo` gives back, in reverse, whatever start() took."""

    patience, grace, greeted = 1.0, 1.0, False

    def __init__(self, sandbox_id: str, pidfd: int, channel: socket.socket, disk_fd: int, account: accounting.Account) -> None:
        self.sandbox_id = sandbox_id
        self.protections: tuple[Protection, ...] = ()
        self._pidfd, self._channel, self._disk_fd, self._account = pidfd, channel, disk_fd, account
        self._undo = AsyncExitStack()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(sock=self._channel)

    async def pause(self) -> None:
        await asyncio.to_thread(self._account.freeze)

    async def resume(self) -> None:
        await asyncio.to_thread(self._account.thaw)

    def stats(self) -> Stats:
        return self._account.reading()

    def disk_is_full(self) -> bool:
        """Whether the one tmpfs has no block or no inode left; asked of the file system, not of the guest."""
        room = os.fstatvfs(self._disk_fd)
        return room.f_bavail == 0 or room.f_favail == 0

    def disk_used_bytes(self) -> int:
        room = os.fstatvfs(self._disk_fd)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    async def limit(self, limits: Limits) -> None:
        self._account.apply(limits)

    def identity(self, spec: SandboxSpec) -> dict[str, Any]:
        return {}

    def told(self, account: Mapping[str, Any]) -> None:
        """It has no word here: the host's kernel counts."""

    async def kill(self) -> None:
        await _end(self._pidfd, self._account)

    async def wait_dead(self) -> None:
        """The pidfd of a pid namespace's init is readable only when every process in it is gone (pid_namespaces(7))."""
        await readable(self._pidfd)

    async def aclose(self) -> None:
        await self._undo.aclose()


class NativeRuntime:
    """Owns the zygotes, the uid block and this supervisor's journal entry."""

    tier = "native"

    def __init__(self, config: Config) -> None:
        self._config = config
        self._rootless = os.geteuid() != 0
        self._layout = accounting.layout(config)
        journal.reconcile(config.run_dir, lambda name: accounting.remove_instance(self._layout, name))
        self._instance = journal.Instance(config.run_dir)
        self._uids = None if self._rootless else _uid_block(config)
        self._zygotes: dict[Template, Zygote] = {}
        self._starting: dict[Template, asyncio.Lock] = {}
        self._filters: dict[str, tuple[str, Callable[[bytes], int]]] = {}
        self._floor = b64encode(seccomp.compile_floor()).decode()
        # For tests alone. `without`: steps of the recipe to leave out; `fail_at`, `pause_at`: a step to fail or stand at;
        # `keep`: namespaces (CLONE_NEW* bits) that a zygote built from now on shares with the host and its sandboxes.
        self.switches: dict[str, Any] = {}
        self.protections = protections.probe(self._layout, rootless=self._rootless)
        # Without cgroups the number of processes is an rlimit, which a live process keeps.
        self.late_limits = _BY_GROUPS if accounting.has_groups(self._layout) else _BY_GROUPS - {"pids"}

    def capabilities(self) -> Capabilities:
        return Capabilities(self.tier, available=True, protections=self.protections)

    async def warm(self, template: Template) -> Zygote:
        """The live zygote of `template`; built, or rebuilt when it was lost. Raises SetupFailed."""
        lock = self._starting.setdefault(template, asyncio.Lock())
        async with lock:
            zygote = self._zygotes.get(template)
            if zygote is not None and zygote.ended():
                await zygote.aclose()
                zygote = None
            if zygote is None:
                uid = self._uids.zygote_uid if self._uids else None
                zygote = await Zygote.start(
                    template, uid, self._instance.scratch, self._config.zygote_start_timeout_s, self.switches.get("keep", 0)
                )
                self._zygotes[template] = zygote
            return zygote

    async def start(self, spec: SandboxSpec, sandbox_id: str, on_event: Callable[[Event], None]) -> NativeHandle:
        """The host's half of the recipe (recipe.py has the other).

        Raises ProtectionUnavailable, CapacityExceeded, SetupFailed, SandboxGone; whatever was taken is given back.
        """
        check_required(spec.require, self.protections)
        zygote = await self.warm(spec.template)
        async with AsyncExitStack() as undo:
            uid = self._uids.take() if self._uids else None
            if self._uids and uid is not None:
                undo.callback(self._uids.give, uid)
            account = accounting.open_account(self._layout, self._instance.name, sandbox_id, spec.limits)
            undo.callback(account.close)
            try:
                clone = await zygote.take()
            except Exception:
                if zygote.lost:
                    on_event(ZygoteLost(sandbox_id, spec.template.name))
                raise
            channel, pid = clone.channel, clone.pid
            undo.callback(channel.close)
            listeners = Listeners(clone.announcements, sandbox_id, self._filter(spec)[1], on_event)
            undo.callback(listeners.close)
            with step("open a pidfd of the sandbox"):
                pidfd = os.pidfd_open(pid)
            undo.callback(os.close, pidfd)
            undo.push_async_callback(_end, pidfd, account)
            if uid is not None:
                write_maps(pid, uid)
            with step("send the plan"), account.doors() as doors:
                send_plan(channel, self._plan(spec) | self.switches, doors, self._config.agent_timeout_s)
            disk_fd = await self._receive_disk(channel)
            undo.callback(os.close, disk_fd)
            try:
                account.entered(pid)  # before the first byte of a caller's: the child's word that it did is no proof
            except SetupFailed:
                raise last_words(channel) from None  # it may have failed at a later step and be gone by now
            handle = NativeHandle(sandbox_id, pidfd, channel, disk_fd, account)
            handle.protections = protections.of_sandbox(self.protections, account.protections())
            handle._undo = undo.pop_all()  # pyright: ignore[reportPrivateUsage]
            return handle

    async def _receive_disk(self, channel: socket.socket) -> int:
        """The sandbox's file system as a descriptor, for its free space only; or the failure of an earlier step."""
        try:
            async with asyncio.timeout(self._config.agent_timeout_s):
                await readable(channel.fileno())
                mark, fds, _flags, _address = socket.recv_fds(channel, 1, 1)
                if mark == b"d" and fds:
                    return fds[0]
                raise setup_failure(mark + await asyncio.get_running_loop().sock_recv(channel, 8192))
        except TimeoutError:
            raise AgentUnresponsive("the sandbox's set-up did not end in time") from None

    def _plan(self, spec: SandboxSpec) -> dict[str, Any]:
        return {
            "hostname": spec.hostname,
            "disk_bytes": spec.limits.disk_bytes,
            "inodes": spec.limits.inodes,
            "shown": shown_in(spec.template, OWN_DIRECTORIES),
            "memory_bytes": spec.limits.memory_bytes,
            "writable": spec.files.writable,
            "read_only": spec.files.read_only,
            "hidden": spec.files.hidden,
            "rlimits": rlimits(spec.limits, grouped=accounting.has_groups(self._layout)),
            "floor": self._floor,
            "policy": self._filter(spec)[0],
            "prestart": [],  # a session forked before its first run would cost every idle sandbox 3 MiB
            # A kernel without Landlock is stated as "off" and may be enough for a spec that does not require it.
            "without": [] if landlock.abi() else ["landlock"],
        }

    def _filter(self, spec: SandboxSpec) -> tuple[str, Callable[[bytes], int]]:
        """The policy program as the plan carries it, and what its refusals are answered with; compiled once for each."""
        key = json.dumps(spec.seccomp, sort_keys=True)
        if key not in self._filters:
            profile = spec.seccomp
            if not accounting.has_groups(self._layout):  # nobody would count the memory behind these
                profile = seccomp.refusing(profile, ("memfd_create", "memfd_secret", "shmget"))
            program = b64encode(seccomp.compile_policy(profile)).decode()
            self._filters[key] = program, seccomp.refused_errno(profile)
        return self._filters[key]

    async def aclose(self) -> None:
        for zygote in self._zygotes.values():
            await zygote.aclose()
        self._zygotes.clear()
        accounting.remove_instance(self._layout, self._instance.name)
        if self._uids:
            self._uids.close()
        self._instance.close()


def _uid_block(config: Config) -> UidBlock:
    return UidBlock(config.run_dir / "uids", config.uid_base, config.uid_count_per_supervisor)


async def _end(pidfd: int, account: accounting.Account) -> None:
    """The end of init is the end of all. The others are told at once too: left to init they would be torn down after it."""
    kill(pidfd)
    account.kill_all()
    account.thaw()  # a frozen task of cgroup v1 takes no signal
    await readable(pidfd)
