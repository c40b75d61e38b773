"""A machine of Firecracker's is copied and goes on, in any number, each with what it alone did; what fails is told and leaves
nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import vms
from vms import MIB, PATIENCE_S, UID

from fumehood.errors import CapacityExceeded, SandboxGone, SetupFailed
from fumehood.runtime.microvm import sparse, written
from fumehood.runtime.microvm.firecracker import Firecracker
from fumehood.runtime.microvm.machine import MEMORY, STATE, WRITTEN, MachineSpec
from fumehood.runtime.microvm.process import CONSOLE_BYTES

pytestmark = [pytest.mark.microvm, pytest.mark.root]
Booted = tuple[MachineSpec, Path]
KEPT = sum(range(300_000))
CHANGED = KEPT - sum(range(0, 300_000, 1000))


@pytest.fixture
def vmm(firecracker: Path) -> Firecracker:
    return Firecracker(firecracker)


@pytest.fixture
def scratch(machines_dir: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=machines_dir) as directory:
        yield Path(directory)


@pytest.mark.parametrize("uid", [UID, None], ids=["jailed", "plain"])
async def test_a_restored_machine_answers_and_has_the_state_of_the_one_that_was_copied(
    vmm: Firecracker, booted: Booted, scratch: Path, uid: int | None
) -> None:
    with vms.place(scratch, uid) as where:
        async with vms.restored(vmm, *booted, where) as machine:
            assert await vms.answered(machine, "(6 * 7, first)") == "(42, 'of all')"


async def test_machines_of_one_snapshot_run_at_once_and_see_nothing_of_each_other(
    vmm: Firecracker, booted: Booted, scratch: Path
) -> None:
    with vms.place(scratch, UID) as one, vms.place(scratch, UID + 1) as two:
        async with (
            vms.restored(vmm, *booted, one) as a,
            vms.restored(vmm, *booted, two) as b,
            vms.linked(a) as to_a,
            vms.linked(b) as to_b,
        ):
            write = "mine = {0!r}\nopen('mine', 'w').write({0!r})"
            await asyncio.gather(vms.run(to_a, write.format("a")), vms.run(to_b, write.format("b")))
            read = "(mine, open('mine').read())"
            assert await asyncio.gather(vms.run(to_a, read), vms.run(to_b, read)) == ["('a', 'a')", "('b', 'b')"]
    with vms.place(scratch, UID) as where:
        async with vms.restored(vmm, *booted, where) as machine:
            assert await vms.answered(machine, "import os; (os.path.exists('mine'), 'mine' in dir())") == "(False, False)"


async def test_a_copy_has_what_was_there_before_and_what_changed_since_and_the_first_snapshot_is_as_it_was(
    vmm: Firecracker, booted: Booted, scratch: Path
) -> None:
    """Of the memory, only what differs was written."""
    spec, golden = booted
    before = (golden / MEMORY).read_bytes()
    with vms.place(scratch, UID) as where:
        async with vms.restored(vmm, spec, golden, where) as machine:
            await vms.answered(machine, "old = list(range(300_000)); kept = sum(old)")
            await vms.saved(machine, scratch / "one")
            await vms.answered(machine, "old[::1000] = [0] * 300; later = 'too'")
            await vms.saved(machine, scratch / "two")
            assert await vms.answered(machine, "(kept, sum(old), later)") == f"({KEPT}, {CHANGED}, 'too')"
        async with vms.restored(vmm, spec, scratch / "one", where) as machine:
            shown = await vms.answered(machine, "(first, kept, sum(old), 'later' in dir())")
            assert shown == f"('of all', {KEPT}, {KEPT}, False)"
        async with vms.restored(vmm, spec, scratch / "two", where) as machine:
            shown = await vms.answered(machine, "(first, kept, sum(old), later)")
            assert shown == f"('of all', {KEPT}, {CHANGED}, 'too')"
    assert (golden / MEMORY).read_bytes() == before


async def test_the_files_of_a_snapshot_are_roots_and_nobody_writes_to_them_and_untouched_memory_takes_no_room(
    booted: Booted,
) -> None:
    spec, golden = booted
    assert sorted(p.name for p in golden.iterdir()) == [MEMORY, STATE]
    for name in (STATE, MEMORY):
        status = (golden / name).stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o444)
    status = (golden / MEMORY).stat()
    assert status.st_size == spec.memory_bytes > 1.3 * 512 * status.st_blocks


async def test_a_disk_that_is_full_is_told_leaves_nothing_and_the_machine_goes_on(
    vmm: Firecracker, booted: Booted, scratch: Path
) -> None:
    """First there is no room for a copy of the base, then none for what differs; then there is."""
    spec, golden = booted
    with vms.small_disk(scratch / "disk", 600 * MIB) as disk:
        spec = replace(spec, rootfs=vms.copied(spec.rootfs, disk))
        base = disk / "base"
        base.mkdir()
        for name in (STATE, MEMORY):
            vms.copied(golden / name, base)
        used = (base / MEMORY).stat().st_blocks * 512
        with vms.place(disk, UID) as where:
            async with vms.restored(vmm, spec, base, where) as machine:
                await vms.answered(machine, "data = bytes(range(256)) * 40_000")
                for room in (used // 2, used + 2 * MIB):
                    with vms.filled(disk, room), pytest.raises(CapacityExceeded):
                        await vms.saved(machine, disk / "full")
                    assert not list((disk / "full").iterdir())
                    (disk / "full").rmdir()
                    await machine.resume()
                await vms.saved(machine, disk / "made")
                assert await vms.answered(machine, "len(data)") == "10240000"
            async with vms.restored(vmm, spec, disk / "made", where) as machine:
                assert await vms.answered(machine, "(first, data == bytes(range(256)) * 40_000)") == "('of all', True)"
        assert (disk / "made" / MEMORY).stat().st_blocks * 512 < 0.9 * spec.memory_bytes


async def test_the_limit_of_a_place_is_the_disks_whatever_the_snapshots_was(
    vmm: Firecracker, booted: Booted, scratch: Path
) -> None:
    with vms.place(scratch, UID, read_bps=3 * MIB) as where:
        async with vms.restored(vmm, *booted, where) as machine:
            (drive,) = await vms.shown(machine, "drives")
            assert drive["rate_limiter"]["bandwidth"] == {"size": 3 * MIB, "one_time_burst": None, "refill_time": 1000}
            await vms.saved(machine, scratch / "limited")
    with vms.place(scratch, UID) as where:
        async with vms.restored(vmm, booted[0], scratch / "limited", where) as machine:
            (drive,) = await vms.shown(machine, "drives")
            assert not (drive["rate_limiter"] or {}).get("bandwidth")


@pytest.mark.parametrize("uid", [UID, None], ids=["jailed", "plain"])
@pytest.mark.parametrize(
    ("broken", "word"),
    [
        *(("short", "bytes of"), ("no state", "state"), ("no memory", "memory"), ("no disk", "rootfs")),
        *(("other state", "snapshot"), ("other pages", "zip")),
    ],
)
async def test_a_snapshot_that_is_damaged_is_refused(
    vmm: Firecracker, booted: Booted, scratch: Path, broken: str, word: str, uid: int | None
) -> None:
    spec, golden = booted
    for name in (STATE, MEMORY):
        os.link(golden / name, scratch / name)
    if broken == "short":
        (scratch / MEMORY).unlink()
        (scratch / MEMORY).write_bytes(bytes(MIB))
    elif broken == "other state":
        (scratch / STATE).unlink()
        (scratch / STATE).write_bytes(b"something" * 1000)
    elif broken == "other pages":
        (scratch / WRITTEN).write_bytes(b"something" * 1000)
    elif broken == "no disk":
        spec = replace(spec, rootfs=scratch / "rootfs")
    else:
        (scratch / broken.removeprefix("no ")).unlink()
    with vms.place(scratch, uid) as where:
        with pytest.raises(SetupFailed) as failed:
            await vmm.restore(spec, scratch, where)
        assert word in failed.value.cause and failed.value.remediation


async def test_pages_that_a_snapshot_names_are_the_machines_own_before_its_guest_writes_to_them(
    vmm: Firecracker, booted: Booted, scratch: Path
) -> None:
    spec, golden = booted
    for name in (STATE, MEMORY):
        os.link(golden / name, scratch / name)
    with (golden / MEMORY).open("rb") as memory:
        ends = [(0, 0), *sparse.extents(memory.fileno())]
    gap, hole = max((start - end, end) for (_, end), (start, _) in pairwise(ends))
    assert gap >= MIB, "what the guest has not touched, nor will for a sum"
    named = array("Q", [hole, 64 * written.PAGE_BYTES])
    (scratch / WRITTEN).write_bytes(named.tobytes())
    with vms.place(scratch, UID) as where:
        async with vms.restored(vmm, spec, scratch, where) as machine:
            own = array("Q", machine.written())
            assert any(at <= hole and at + length >= sum(named) for at, length in zip(own[::2], own[1::2], strict=True))
            assert await vms.answered(machine, "6 * 7") == "42"


async def test_a_kernel_that_is_none_is_refused_with_firecrackers_words(
    vmm: Firecracker, booted: Booted, scratch: Path
) -> None:
    (scratch / "vmlinux").write_bytes(b"no kernel" * 1000)
    with vms.place(scratch, UID) as where, pytest.raises(SetupFailed, match=r"(?i)PUT /actions.*kernel"):
        await vmm.boot(replace(booted[0], kernel=scratch / "vmlinux"), where)


async def test_a_start_that_is_cancelled_leaves_nothing(vmm: Firecracker, booted: Booted, scratch: Path) -> None:
    await vmm.version()
    for steps in (1, 3, 10, 30, 100):
        with vms.place(scratch, UID) as where:
            starting = asyncio.create_task(vmm.restore(*booted, where))
            for _ in range(steps):
                await asyncio.sleep(0)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting


async def test_a_machine_that_is_killed_from_outside_is_gone(vmm: Firecracker, booted: Booted, scratch: Path) -> None:
    with vms.place(scratch, UID) as where:
        async with vms.restored(vmm, *booted, where) as machine:
            waiting = asyncio.create_task(vms.answered(machine, "import time; time.sleep(600)"))
            await asyncio.sleep(0.2)
            os.kill(machine.pid, signal.SIGKILL)
            for attempt in (waiting, machine.connect(), machine.pause(), machine.snapshot(scratch)):
                with pytest.raises(SandboxGone):
                    await attempt
            assert sorted(p.name for p in scratch.iterdir()) == [where.id]


async def test_a_guest_that_panics_is_gone_with_its_last_words(vmm: Firecracker, booted: Booted, scratch: Path) -> None:
    spec = booted[0]
    with vms.place(scratch, UID) as where:
        machine = await vmm.boot(replace(spec, boot_args=f"{spec.boot_args} init=/nope"), where)
        try:
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(SandboxGone, match=r"Kernel panic.*init /nope failed"):
                    await machine.connect()
        finally:
            await machine.aclose()


async def test_of_a_console_that_is_flooded_the_end_is_kept(vmm: Firecracker, booted: Booted, scratch: Path) -> None:
    """By root of the guest: user code has no console."""
    flood = 'init=/bin/sh -- -c "mount -t devtmpfs dev /dev; yes flood | head -c 40000 > /dev/console"'
    spec = booted[0]
    with vms.place(scratch, UID) as where:
        machine = await vmm.boot(replace(spec, boot_args=f"{spec.boot_args} {flood}"), where)
        try:
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises(SandboxGone) as gone:
                    await machine.connect()
            assert "flood\r\nflood" in gone.value.cause
            assert len(machine.said()) <= CONSOLE_BYTES
        finally:
            await machine.aclose()
