"""Machines of the real drivers: where they run, what is asked of their agent, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fumehood.runtime.link import Link
from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Manifest
from fumehood.runtime.microvm.firecracker import Firecracker
from fumehood.runtime.microvm.firecracker_api import parse_head
from fumehood.runtime.microvm.firecracker_machine import FirecrackerMachine
from fumehood.runtime.microvm.jailer import API
from fumehood.runtime.microvm.machine import Machine, MachineSpec, Place

PATIENCE_S = 300.0  # a guest kernel that is emulated, on a busy machine
UID = 199_990_000  # and those after it: nobody else's on a machine that tests
MIB = 1 << 20


@contextlib.contextmanager
def place(parent: Path, uid: int | None = None, **more: Any) -> Generator[Place]:
    """Empty afterwards, with no process in it, or the test fails."""
    directory = Path(tempfile.mkdtemp(prefix="m", dir=parent))
    try:
        if uid is not None:
            os.chown(directory, uid, uid)
        yield Place(directory.name, directory, uid, **more)
        assert not list(directory.iterdir())
        assert not processes_of(uid, directory)
    finally:
        shutil.rmtree(directory)


def processes_of(uid: int | None, directory: Path) -> list[str]:
    """By uid: the root of one that is jailed looks like anybody else's from outside."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            theirs = process.stat().st_uid == uid
            if theirs or os.readlink(process / "cwd").startswith(str(directory)):
                found.append((process / "comm").read_text().strip())
    return found


def spec_of(kernel: Manifest, rootfs: Path, args: str = "", memory_bytes: int = 256 * MIB) -> MachineSpec:
    """As golden.py has it boot."""
    clock = f"tsc_early_khz={kvm.tsc_khz()} lpj={kvm.tsc_khz() * 10}"
    words = f"{kernel.facts['boot_args']} fumehood.prestart=python {clock} {args}"
    return MachineSpec(kernel.path("vmlinux"), rootfs, words, memory_bytes)


@contextlib.asynccontextmanager
async def linked(machine: Machine) -> AsyncGenerator[Link]:
    """Its agent, which knows the time and is somebody's."""
    async with asyncio.timeout(PATIENCE_S):
        link = Link(*await machine.connect())
        try:
            await link.start(PATIENCE_S, greeted=True)
            entropy = base64.b64encode(os.urandom(64)).decode()
            await link.call("bind", env={}, clock_s=time.time(), entropy=entropy, hostname="box")
            yield link
        finally:
            await link.aclose()


async def run(link: Link, code: str) -> str:
    """The value of its last expression, as Python shows it."""
    stream, shown = await link.open("context.run", code=code, language="python", env={}), ""
    async for frame in stream:
        if frame.payload.startswith(b"{") and (event := frame.json())["type"] == "result":
            shown = event["data"]["text/plain"]
    assert stream.ok["outcome"] == "ok", (stream.ok, code)
    return shown


async def answered(machine: Machine, code: str) -> str:
    async with linked(machine) as link:
        return await run(link, code)


@contextlib.asynccontextmanager
async def restored(vmm: Firecracker, spec: MachineSpec, snapshot: Path, where: Place) -> AsyncGenerator[FirecrackerMachine]:
    machine = await vmm.restore(spec, snapshot, where)
    try:
        yield machine
    except Exception as e:
        e.add_note(machine.said())
        raise
    finally:
        await machine.aclose()


async def saved(machine: Machine, directory: Path) -> Path:
    """It goes on afterwards."""
    directory.mkdir(mode=0o700)
    await machine.pause()
    await machine.snapshot(directory)
    await machine.resume()
    return directory


def golden(vmm: Firecracker, spec: MachineSpec, parent: Path, uid: int | None) -> Path:
    """A snapshot of one that has just booted. Takes a minute; in a loop of its own, so for fixtures of any scope."""

    async def make() -> Path:
        with place(parent, uid) as where:
            machine = await vmm.boot(spec, where)
            try:
                async with linked(machine) as link:
                    await run(link, "first = 'of all'")
                return await saved(machine, parent / "golden")
            finally:
                await machine.aclose()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, make()).result()


async def shown(machine: FirecrackerMachine, what: str) -> Any:
    """A part of its configuration, as Firecracker tells it."""
    with machine.jail.socket(API) as path:
        reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /vm/config HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    answer = json.loads(await reader.readexactly(parse_head(head)[1]))
    writer.close()
    await writer.wait_closed()
    return answer[what]


@contextlib.contextmanager
def small_disk(directory: Path, size_bytes: int) -> Generator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "disk", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def filled(disk: Path, room_bytes: int) -> Generator[None]:
    """So that only `room_bytes` are left."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - room_bytes)
    try:
        yield
    finally:
        filler.unlink()


def copied(source: Path, directory: Path) -> Path:
    subprocess.run(["cp", "--sparse=always", str(source), str(directory)], check=True)
    return directory / source.name


@contextlib.contextmanager
def open_to_all() -> Generator[Path]:
    """A directory in which every uid may run programs."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)
