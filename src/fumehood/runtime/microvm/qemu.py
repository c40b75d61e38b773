"""QEMU as a monitor: where KVM runs no guests it translates their code, a tenth as fast, but with quick system calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path

from fumehood.errors import ProtectionUnavailable, SetupFailed
from fumehood.runtime.microvm import qemu_command
from fumehood.runtime.microvm.machine import CHANNEL, MEMORY, STATE, MachineSpec, Place
from fumehood.runtime.microvm.process import Monitor
from fumehood.runtime.microvm.qemu_command import INITRD, KERNEL, ROOTFS, Boot, Clone, Role, Template, Version
from fumehood.runtime.microvm.qemu_machine import QemuMachine, failed
from fumehood.runtime.microvm.qmp import Qmp, QmpFault

_BINARY = "qemu-system-x86_64"
_INSTALL = "install QEMU 7.2 or newer for x86-64 (Debian, Ubuntu: qemu-system-x86; Fedora: qemu-system-x86-core)"
_VERSION_S = 30.0


class Qemu:
    """`accel` is one that QEMU knows: tcg or kvm."""

    name = "qemu"

    def __init__(self, binary: Path | None = None, accel: str = "tcg") -> None:
        self._binary, self._accel = binary, accel
        self._seen: tuple[object, Version, str] | None = None

    async def version(self) -> str:
        return (await self._found())[2]

    async def boot(self, spec: MachineSpec, place: Place) -> QemuMachine:
        files = {KERNEL: spec.kernel, ROOTFS: spec.rootfs, **({INITRD: spec.initrd} if spec.initrd else {})}
        return await self._launch(spec, place, Boot(), files)

    async def restore(self, spec: MachineSpec, snapshot: Path, place: Place) -> QemuMachine:
        with _state_of(snapshot, spec) as state:
            machine = await self._launch(spec, place, Clone(), {ROOTFS: spec.rootfs, MEMORY: snapshot / MEMORY})
            async with AsyncExitStack() as undo:
                undo.push_async_callback(machine.aclose)
                await machine.load(state)
                undo.pop_all()
        return machine

    async def _template(self, spec: MachineSpec, place: Place, memory: Path, stream: int) -> QemuMachine:
        return await self._launch(spec, place, Template(stream), {MEMORY: memory}, (stream,))

    async def _launch(
        self, spec: MachineSpec, place: Place, role: Role, files: Mapping[str, Path], pass_fds: Sequence[int] = ()
    ) -> QemuMachine:
        """A process that takes commands. `files` are linked into its directory. Raises SetupFailed, and leaves nothing."""
        binary, version, _ = await self._found()
        async with AsyncExitStack() as undo:
            undo.callback(_remove, place.directory, (*files, CHANNEL))
            _link(files, place.directory)
            ours, theirs = socket.socketpair()
            qmp = Qmp(ours)
            undo.push_async_callback(qmp.aclose)
            with theirs:
                told = qemu_command.command(binary, version, self._accel, spec, place, role, theirs.fileno())
                fds = (theirs.fileno(), *pass_fds)
                monitor = Monitor.start(told, place, file_bytes=spec.memory_bytes, pass_fds=fds)
            undo.push_async_callback(monitor.aclose)
            try:
                await qmp.start()
            except QmpFault as e:
                raise await failed(monitor, "it does not start", e) from None
            return QemuMachine(spec, place, monitor, qmp, partial(self._template, spec), undo.pop_all())

    async def _found(self) -> tuple[Path, Version, str]:
        """Asked once for each binary: starting it takes as long as all of a restore."""
        try:
            binary = Path(self._binary or shutil.which(_BINARY) or _BINARY).resolve(strict=True)
            status = binary.stat()
            key = (binary, status.st_ino, status.st_mtime_ns)
            if self._seen is None or self._seen[0] != key:
                self._seen = (key, *_checked(await _says_version(binary)))
        except OSError as e:  # TimeoutError, too
            raise ProtectionUnavailable("QEMU can't be used", cause=str(e), remediation=_INSTALL) from None
        return binary, self._seen[1], self._seen[2]


def _checked(said: str) -> tuple[Version, str]:
    version = qemu_command.parse_version(said)
    if version is None or version < qemu_command.FLOOR:
        cause = f"it says {said.strip()[:200]!r}"
        raise ProtectionUnavailable("this QEMU is too old, or none", cause=cause, remediation=_INSTALL)
    return version, said.splitlines()[0]


async def _says_version(binary: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        binary, "--version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(_VERSION_S):
            return (await process.communicate())[0].decode("utf-8", "replace")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _link(files: Mapping[str, Path], directory: Path) -> None:
    for name, path in files.items():
        try:
            os.link(path, directory / name)
        except OSError as e:
            raise SetupFailed(
                f"the machine's {name} can't be used", cause=str(e), remediation="run `fumehood doctor`"
            ) from None


def _remove(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        # A QEMU that was taken over may have put a directory there: it goes with the place.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(directory / name)


@contextlib.contextmanager
def _state_of(snapshot: Path, spec: MachineSpec) -> Generator[int]:
    """A descriptor, if the snapshot is one of such a machine: QEMU would take a short MEMORY and die of it later."""
    with ExitStack() as undo:
        try:
            found = (snapshot / MEMORY).stat().st_size
            state = os.open(snapshot / STATE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise _no_snapshot(str(e)) from None
        undo.callback(os.close, state)
        if found != spec.memory_bytes:
            raise _no_snapshot(f"{MEMORY} has {found} bytes, the machine {spec.memory_bytes}")
        yield state


def _no_snapshot(cause: str) -> SetupFailed:
    return SetupFailed("the snapshot can't be restored", cause=cause, remediation="make it again")
