"""A machine under QEMU, and how it is copied.

A snapshot is made by a second QEMU, the template: it takes the paused machine's memory into a file, then writes down the rest
with the memory left out. Clones map that file copy on write, so that a restore reads next to nothing. Machines that were
booted and restored ones are copied alike, and at one instant, whatever somebody sends to their agent meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fumehood.agent import wire
from fumehood.errors import CapacityExceeded, SandboxGone, SetupFailed
from fumehood.runtime.microvm import serial, sparse
from fumehood.runtime.microvm.machine import CHANNEL, MEMORY, STATE, MachineSpec, Place
from fumehood.runtime.microvm.process import Monitor
from fumehood.runtime.microvm.qmp import Qmp, QmpEnded, QmpFault
from fumehood.runtime.microvm.removal import remove

_LAST_WORDS_S = 10.0
_ASK_AGAIN_S, _HANG_UP_S = 5.0, 0.05
_MIGRATION_S, _CANCEL_S, _LOOK_AGAIN_S = 300.0, 10.0, 0.003
_UNLIMITED_BPS = 1 << 40  # QEMU's own limit is 128 MiB/s
_FULL_BYTES = 1 << 20  # a disk with less is full
_MIGRATED = ("completed", "failed", "cancelled")

Copier = Callable[[Place, Path, int], Awaitable["QemuMachine"]]  # with the file for the memory, and the socket it comes from


class QemuMachine:
    """Owns its process and what is in its directory, through `undo`."""

    def __init__(
        self, spec: MachineSpec, place: Place, monitor: Monitor, qmp: Qmp, template: Copier, undo: AsyncExitStack
    ) -> None:
        self.pid = monitor.pid
        self._spec, self._place, self._monitor, self._qmp = spec, place, monitor, qmp
        self._template, self._undo = template, undo
        self._left = False  # it was migrated from, and stands since

    @property
    def pidfd(self) -> int:
        return self._monitor.pidfd

    def said(self) -> str:
        return self._monitor.said()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        patience_s = _ASK_AGAIN_S
        while True:
            with contextlib.suppress(OSError):  # TimeoutError, too
                async with asyncio.timeout(patience_s):
                    return await serial.ask(self._place.directory / CHANNEL, self.pid)
            if not self._monitor.alive:
                raise await self._gone()
            # An agent that got half a frame from an earlier host takes the question for the other half, until it sees us leave.
            await asyncio.sleep(_HANG_UP_S)
            patience_s *= 2

    async def pause(self) -> None:
        await self._of_living(self._told("stop"))

    async def resume(self) -> None:
        await self._of_living(self._told("cont"))
        self._left = False

    async def snapshot(self, directory: Path) -> None:
        await self._of_living(self._snapshot(directory))

    def written(self) -> bytes:
        return b""  # where the guest is emulated as a whole, a page costs the same before and after

    async def aclose(self) -> None:
        await self._undo.aclose()

    async def _told(self, command: str, arguments: dict[str, Any] | None = None, *, fds: Sequence[int] = ()) -> dict[str, Any]:
        try:
            return wire.table(await self._qmp.execute(command, arguments, fds=fds))
        except QmpFault as e:
            raise await failed(self._monitor, command, e) from None

    async def load(self, state: int) -> None:
        """A clone becomes what `state` says, and runs. Raises SetupFailed."""
        self._qmp.expect("RESUME")
        await self._leave_memory_out(True)
        await self._told("getfd", {"fdname": "state"}, fds=(state,))
        await self._told("migrate-incoming", {"uri": "fd:state"})
        try:
            await self._qmp.happened("RESUME")
        except QmpFault as e:
            raise await failed(self._monitor, "the snapshot can't be restored", e) from None

    async def loaded(self) -> None:
        """Of a template: the whole stream has arrived."""
        while (await self._told("query-status")).get("status") == "inmigrate":  # noqa: ASYNC110 - another process's
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def migrate(self, to: int, *, with_memory: bool) -> None:
        await self._leave_memory_out(not with_memory)
        await self._told("migrate-set-parameters", {"max-bandwidth": _UNLIMITED_BPS})
        await self._told("getfd", {"fdname": "to"}, fds=(to,))
        await self._told("migrate", {"uri": "fd:to"})
        try:
            status = await self._migrated()
        except BaseException:  # the machine is to go on
            with contextlib.suppress(SetupFailed, TimeoutError):
                async with asyncio.timeout(_CANCEL_S):
                    await self._told("migrate_cancel")
                    await self._migrated()
            raise
        if status.get("status") != "completed":
            reason = status.get("error-desc")
            raise self._monitor.failed(f"migration: {reason[:1000] if isinstance(reason, str) else status['status']}")

    async def _migrated(self) -> dict[str, Any]:
        while (status := await self._told("query-migrate")).get("status") not in _MIGRATED:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_AGAIN_S)
        return status

    async def _leave_memory_out(self, out: bool) -> None:
        given = [{"capability": "x-ignore-shared", "state": out}]
        await self._told("migrate-set-capabilities", {"capabilities": given})

    async def _snapshot(self, directory: Path) -> None:
        with contextlib.ExitStack() as made:
            made.enter_context(_told_when_full(directory))
            memory, state = (made.enter_context(_new(directory / name)) for name in (MEMORY, STATE))
            made.enter_context(_told_when_full(directory))  # before what was written is removed
            os.ftruncate(memory, self._spec.memory_bytes)
            async with asyncio.timeout(_MIGRATION_S):
                await self._copy(directory, state)
            await asyncio.to_thread(_forget_holes, memory)

    async def _copy(self, directory: Path, state: int) -> None:
        async with AsyncExitStack() as undo:
            # Not in the machine's own directory, where a QEMU that was taken over could exchange it for a link.
            work = Path(tempfile.mkdtemp(prefix="copy-", dir=directory))
            undo.callback(remove, work)
            if self._place.uid is not None:
                os.chown(work, self._place.uid, self._place.uid)
            ours, theirs = map(undo.enter_context, socket.socketpair())
            place = replace(self._place, directory=work)
            template = await self._template(place, directory / MEMORY, theirs.fileno())
            undo.push_async_callback(template.aclose)
            theirs.close()
            await self._come_back()
            self._left = True
            try:
                await self.migrate(ours.fileno(), with_memory=True)
            except SetupFailed:
                ours.close()
                await template.loaded()  # raises with its last words, if it was it that ended
                raise
            ours.close()
            await template.loaded()
            await template.migrate(state, with_memory=False)

    async def _come_back(self) -> None:
        """QEMU copies no machine twice unless it ran meanwhile: less than a millisecond will do."""
        if self._left:
            await self._told("cont")
            await self._told("stop")

    async def _of_living(self, doing: Awaitable[object]) -> None:
        """What fails because the machine has ended says so."""
        try:
            await doing
        except SetupFailed:
            if self._monitor.alive:
                raise
            raise await self._gone() from None

    async def _gone(self) -> SandboxGone:
        await self._monitor.ended()
        said = self._monitor.said()[-1000:]
        return SandboxGone("the sandbox ended", cause=said, remediation="create a new sandbox")


async def failed(monitor: Monitor, what: str, fault: QmpFault) -> SetupFailed:
    """With the last words of one that has ended."""
    if isinstance(fault, QmpEnded):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await monitor.ended()
    return monitor.failed(f"{what}: {fault}")


def _forget_holes(memory: int) -> None:
    """The template has looked at them: they fill the page cache at the machine's expense, and nobody will read them again."""
    position = 0
    for start, end in (*sparse.extents(memory), (os.fstat(memory).st_size,) * 2):
        if start > position:
            os.posix_fadvise(memory, position, start - position, os.POSIX_FADV_DONTNEED)
        position = end


@contextlib.contextmanager
def _new(path: Path) -> Generator[int]:
    """A file that is for every uid to read, or is not there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
        os.fchmod(fd, 0o444)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def _told_when_full(directory: Path) -> Generator[None]:
    """QEMU only dies (SIGBUS) when the disk has no block for a page that it writes."""
    try:
        yield
    except (OSError, SetupFailed) as e:
        disk = os.statvfs(directory)
        if getattr(e, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or disk.f_bavail * disk.f_frsize < _FULL_BYTES:
            cause = f"the disk of {directory} is full"
            raise CapacityExceeded("the snapshot was not made", cause=cause, remediation="make room on the disk") from None
        if isinstance(e, SetupFailed):
            raise
        raise SetupFailed("the snapshot was not made", cause=str(e) or "it took too long") from None
