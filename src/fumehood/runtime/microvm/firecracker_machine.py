"""A machine under a Firecracker that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from fumehood.agent import wire
from fumehood.errors import CapacityExceeded, FumehoodError, SandboxGone, SetupFailed
from fumehood.runtime.host.waiting import readable
from fumehood.runtime.microvm import sparse, written
from fumehood.runtime.microvm.firecracker_api import CALL_S, Api, Fault
from fumehood.runtime.microvm.jailer import Jail, on_disk
from fumehood.runtime.microvm.machine import CHANNEL, MEMORY, STATE
from fumehood.runtime.microvm.process import Monitor

AGENT_PORT = 1024
_SAVE_S = 300.0  # a guest's whole memory to a slow disk, with fsync
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.2  # between two attempts to connect: each costs a guest that boots some work
_FIRST_PATIENCE_S = 0.05  # for HELLO; twice as long each time, for a guest that is slow
_LINE_BYTES = 32
_FULL_DISK = ("No space left on device", "Quota exceeded")  # the second is EDQUOT in musl's words
_T = TypeVar("_T")


class FirecrackerMachine:
    """Owns its parts; `base` is a descriptor of the memory that it went on from, None for one that was booted."""

    def __init__(self, monitor: Monitor, jail: Jail) -> None:
        self.pid, self.pidfd = monitor.pid, monitor.pidfd
        self.jail, self.api = jail, Api(monitor, jail)
        self.base: int | None = None
        self._monitor = monitor
        self._loaded = frozenset[int]()
        self._diff_fits = True  # what Firecracker holds for written since the last snapshot is the difference to `base`

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        pause_s, patience_s = _FIRST_PAUSE_S, _FIRST_PATIENCE_S
        while (channel := await self._greeted(patience_s)) is None:
            if not self._monitor.alive:
                raise await self._gone("its agent spoke")
            await asyncio.sleep(pause_s)
            pause_s, patience_s = min(2 * pause_s, _LONGEST_PAUSE_S), 2 * patience_s
        return await asyncio.open_unix_connection(sock=channel)

    async def _greeted(self, patience_s: float) -> socket.socket | None:
        """A connection with HELLO to be read. OK is no proof: a restored guest forgets what it accepted before it heard of
        that, and does not say so. HELLO is: it answers ours, and over what is forgotten nothing arrives.
        """
        with contextlib.ExitStack() as undo:
            channel = undo.enter_context(socket.socket(socket.AF_UNIX))
            channel.setblocking(False)
            # No monitor, no guest, or no agent is there yet.
            undo.enter_context(contextlib.suppress(ConnectionError, FileNotFoundError))
            with self.jail.socket(CHANNEL) as path:
                await asyncio.get_running_loop().sock_connect(channel, path)
            channel.send(b"CONNECT %d\n" % AGENT_PORT)
            if await _accepted(channel):
                channel.send(wire.GREETING)  # to which the kernel of a guest that has forgotten the connection says so
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await readable(channel.fileno())
                    if channel.recv(1, socket.MSG_PEEK):
                        undo.pop_all()
                        return channel
        return None

    def said(self) -> str:
        return self._monitor.said()

    async def pause(self) -> None:
        await self._ask("PATCH /vm", {"state": "Paused"})

    async def resume(self) -> None:
        await self._ask("PATCH /vm", {"state": "Resumed"})

    async def snapshot(self, directory: Path) -> None:
        """Of memory, what differs is written over a copy of `base`: Firecracker does so with a file of the right size."""
        kind = "Diff" if self._diff_fits else "Full"
        with on_disk("the snapshot was not made"), contextlib.ExitStack() as undo:
            state, memory = self._create(f"{STATE}.new", undo), self._create(f"{MEMORY}.new", undo)
            if kind == "Diff" and (base := self.base) is not None:
                await _undisturbed(lambda: sparse.copy(base, memory))
            self._diff_fits = False  # its record starts anew; where, nobody knows after one that failed
            what = {"snapshot_type": kind, "snapshot_path": f"{STATE}.new", "mem_file_path": f"{MEMORY}.new"}
            await self._ask("PUT /snapshot/create", what, _SAVE_S)
            if kind == "Full":
                await _undisturbed(lambda: sparse.punch(memory))
            _hand_over({STATE: state, MEMORY: memory}, directory)
            self._rebase(os.dup(memory))
            self._diff_fits = True

    def written(self) -> bytes:
        return written.runs(self._written_pages() - self._loaded)

    async def own(self, pages: Path) -> None:
        """Of a machine that did not run yet: copies now what it would write to anyway, where we may (Yama: not everybody)."""
        if self.base is None or not pages.exists():
            # What Firecracker itself writes at a load is each machine's own: a generation ID, say (H20).
            self._loaded = await asyncio.to_thread(self._written_pages)
            return
        base, runs = self.base, pages.read_bytes()
        with contextlib.suppress(PermissionError):
            await _undisturbed(lambda: written.copy(self.pid, MEMORY, base, runs))

    def _written_pages(self) -> frozenset[int]:
        try:
            return written.pages(self.pid, MEMORY)
        except PermissionError:
            return frozenset()

    def _create(self, name: str, undo: contextlib.ExitStack) -> int:
        fd = self.jail.create(name)
        undo.callback(os.close, fd)
        undo.callback(self.jail.remove, name)
        return fd

    def _rebase(self, base: int | None) -> None:
        if self.base is not None:
            os.close(self.base)
        self.base = base

    async def _ask(self, request: str, body: Mapping[str, str], deadline_s: float = CALL_S) -> None:
        try:
            await self.api.ask(request, body, deadline_s)
        except Fault as e:
            raise await self._refused(e) from None

    async def _refused(self, fault: Fault) -> FumehoodError:
        if not self._monitor.alive:
            return await self._gone("it had done that")
        if any(words in str(fault) for words in _FULL_DISK):
            return CapacityExceeded("the snapshot was not made", cause=str(fault), remediation="make room on the disk")
        return SetupFailed("Firecracker refused", cause=str(fault), remediation="run `fumehood doctor`")

    async def _gone(self, before: str) -> SandboxGone:
        await self._monitor.ended()
        cause = self.said()[-2000:]
        return SandboxGone(f"the machine ended before {before}", cause=cause, remediation="create a new sandbox")

    async def aclose(self) -> None:
        if self.pidfd >= 0:
            self.pidfd = -1
            async with contextlib.AsyncExitStack() as undo:
                undo.callback(self._rebase, None)
                undo.push_async_callback(self.jail.aclose)
                undo.push_async_callback(self._monitor.aclose)
                undo.push_async_callback(self.api.aclose)


async def _accepted(channel: socket.socket) -> bool:
    """Whether the answer to CONNECT is OK: that line is read, and no byte more."""
    loop, line = asyncio.get_running_loop(), b""
    while not line.endswith(b"\n") and len(line) < _LINE_BYTES:
        if not (byte := await loop.sock_recv(channel, 1)):
            return False
        line += byte
    return line.startswith(b"OK ")


def _hand_over(files: Mapping[str, int], directory: Path) -> None:
    """By descriptor: what a monitor may have put in the place of a name is not taken. Raises OSError, and leaves nothing."""
    with contextlib.ExitStack() as undo:
        for name, fd in files.items():
            os.fchown(fd, os.geteuid(), os.getegid())
            os.fchmod(fd, 0o444)
            # src_dir_fd means nothing to an absolute path, but has Python follow it.
            os.link(f"/proc/self/fd/{fd}", directory / name, src_dir_fd=fd)
            undo.callback(os.unlink, directory / name)
        undo.pop_all()


async def _undisturbed(work: Callable[[], _T]) -> _T:
    """In a thread; a caller who is cancelled meanwhile waits for its end, since he will close its descriptors."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as e:
            cancelled = e
    if cancelled is not None:
        task.exception()
        raise cancelled
    return task.result()
