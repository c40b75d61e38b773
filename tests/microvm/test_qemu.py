"""Machines under QEMU (H2): they boot, go on from snapshots, know nothing of each other, and leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import vms
from vms import MIB, PATIENCE_S

from fumehood.agent import wire
from fumehood.errors import CapacityExceeded, ProtectionUnavailable, SandboxGone, SetupFailed, WireError
from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Manifest
from fumehood.runtime.microvm.image import ROOTFS
from fumehood.runtime.microvm.machine import MEMORY, STATE, MachineSpec, Place
from fumehood.runtime.microvm.process import CONSOLE_BYTES
from fumehood.runtime.microvm.qemu import Qemu
from fumehood.runtime.microvm.qemu_machine import QemuMachine

pytestmark = [pytest.mark.microvm, pytest.mark.root]
Booted = tuple[MachineSpec, Path]
Find = Callable[[str], Manifest]
UID = vms.UID + 1000


def spec_of(kernel: Manifest, rootfs: Path, args: str = "", memory_bytes: int = 256 * MIB) -> MachineSpec:
    words = f"{kernel.facts['boot_args']} fumehood.prestart=python tsc_early_khz={kvm.tsc_khz()} {args}"
    initrd = kernel.path("initrd") if kernel.facts["acpi"] else None
    return MachineSpec(kernel.path("bzImage"), rootfs, words, memory_bytes, initrd)


@pytest.fixture(scope="module")
def vmm() -> Qemu:
    return Qemu()


@pytest.fixture(scope="module")
def small(kernel: Find, image: Find) -> MachineSpec:
    return spec_of(kernel("small"), image("python").path(ROOTFS))


@pytest.fixture(scope="module")
def golden(vmm: Qemu, small: MachineSpec) -> Iterator[Booted]:
    with _scratch() as directory:
        yield small, vms.golden(vmm, small, directory, UID)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def scratch() -> Iterator[Path]:
    with _scratch() as directory:
        yield directory


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """On the file system of the assets, with a short path."""
    with tempfile.TemporaryDirectory(prefix="q", dir="/var/lib/fumehood-test") as directory:
        os.chmod(directory, 0o711)
        yield Path(directory)


@contextlib.asynccontextmanager
async def booted(vmm: Qemu, spec: MachineSpec, where: Place) -> AsyncIterator[QemuMachine]:
    machine = await vmm.boot(spec, where)
    try:
        yield machine
    finally:
        await machine.aclose()


@contextlib.asynccontextmanager
async def restored(vmm: Qemu, found: Booted, where: Place) -> AsyncIterator[QemuMachine]:
    machine = await vmm.restore(*found, where)
    try:
        yield machine
    finally:
        await machine.aclose()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("uid", [UID, None], ids=["jailed", "plain"])
@pytest.mark.parametrize("name", ["stock", "small"])
async def test_a_machine_boots_and_its_copy_goes_on(
    vmm: Qemu, kernel: Find, image: Find, scratch: Path, name: str, uid: int | None
) -> None:
    spec = spec_of(kernel(name), image("python").path(ROOTFS))
    with vms.place(scratch, uid, read_bps=500 * MIB) as where:
        async with booted(vmm, spec, where) as machine:
            assert await vms.answered(machine, "kept = 6 * 7; kept") == "42"
            saved = await vms.saved(machine, scratch / "saved")
            assert await vms.answered(machine, "kept") == "42"
        async with restored(vmm, (spec, saved), where) as machine:
            assert await vms.answered(machine, "kept") == "42"


async def test_a_snapshot_is_two_files_that_every_uid_can_read_and_nobody_writes(golden: Booted) -> None:
    spec, directory = golden
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()} == {STATE: 0o444, MEMORY: 0o444}
    memory = (directory / MEMORY).stat()
    assert memory.st_size == spec.memory_bytes and memory.st_blocks * 512 < spec.memory_bytes * 3 // 4


async def test_two_copies_see_neither_memory_nor_files_of_each_other(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    before = (golden[1] / MEMORY).read_bytes()
    with vms.place(scratch, UID) as here, vms.place(scratch, UID + 1) as there:
        async with restored(vmm, golden, here) as one, restored(vmm, golden, there) as two:  # noqa: SIM117
            async with vms.linked(one) as to_one, vms.linked(two) as to_two:
                write = "mine = {0!r}\n_ = open('/tmp/mine', 'w').write({0!r})"
                await asyncio.gather(vms.run(to_one, write.format("one")), vms.run(to_two, write.format("two")))
                seen = "(mine, open('/tmp/mine').read(), first)"
                assert await vms.run(to_one, seen) == "('one', 'one', 'of all')"
                assert await vms.run(to_two, seen) == "('two', 'two', 'of all')"
    assert (golden[1] / MEMORY).read_bytes() == before


async def test_a_copy_can_be_copied_and_has_what_was_there_before_and_what_came_since(
    vmm: Qemu, golden: Booted, scratch: Path
) -> None:
    spec = golden[0]
    with vms.place(scratch, UID) as where, vms.place(scratch, UID + 1) as other:
        async with restored(vmm, golden, where) as machine:
            await vms.answered(machine, "since = list(range(500_000)); _ = open('/tmp/since', 'w').write('here')")
            copy = await vms.saved(machine, scratch / "copy")
            assert await vms.answered(machine, "since.append(1); (first, sum(since))") == "('of all', 124999750001)"
            async with restored(vmm, (spec, copy), other) as again:
                shown = await vms.answered(again, "(first, sum(since), open('/tmp/since').read())")
                assert shown == "('of all', 124999750000, 'here')"
        async with restored(vmm, golden, where) as machine:
            assert await vms.answered(machine, "('since' in dir(), first)") == "(False, 'of all')"


async def test_a_paused_machine_can_be_copied_twice(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine:
            await machine.pause()
            for name in ("one", "two"):
                (scratch / name).mkdir(0o700)
                await machine.snapshot(scratch / name)
            await machine.resume()
            assert await vms.answered(machine, "first") == "'of all'"
        for name in ("one", "two"):
            async with restored(vmm, (golden[0], scratch / name), where) as machine:
                assert await vms.answered(machine, "first") == "'of all'"


async def test_what_is_sent_while_a_machine_is_copied_arrives_whole_and_the_copy_answers(
    vmm: Qemu, golden: Booted, scratch: Path
) -> None:
    sent = bytes(range(250)) * 12_000
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine, vms.linked(machine) as link:
            stream = await link.open("exec.start", argv=["md5sum"], env={}, stdin=True)
            sending = asyncio.create_task(stream.send(sent))
            copy = await vms.saved(machine, scratch / "copy")
            await sending
            await stream.close_input()
            said = b"".join([frame.payload async for frame in stream if frame.kind == wire.DATA])
            assert hashlib.md5(sent).hexdigest().encode() in said
        async with restored(vmm, (golden[0], copy), where) as machine:
            assert await vms.answered(machine, "first") == "'of all'"


async def test_a_host_that_comes_back_finds_what_was_there(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine:
            for n in range(3):
                assert await vms.answered(machine, f"n{n} = {n}; (first, [v for v in dir() if v in ('n0', 'n1', 'n2')])") == (
                    f"('of all', {[f'n{m}' for m in range(n + 1)]})"
                )


async def test_a_paused_machine_uses_no_processor_and_goes_on(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine, vms.linked(machine) as link:
            stream = await link.open("exec.start", argv=["sh", "-c", "while :; do :; done"], env={}, stdin=False)
            running = cpu_ticks(machine.pid)
            while cpu_ticks(machine.pid) - running < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            await machine.pause()
            paused = cpu_ticks(machine.pid)
            await asyncio.sleep(1)
            assert cpu_ticks(machine.pid) - paused <= 2
            await machine.resume()
            await stream.cancel()
            assert await vms.run(link, "first") == "'of all'"


async def test_as_root_it_has_its_own_uid_root_directory_and_network_no_capability_and_a_filter(
    vmm: Qemu, golden: Booted, scratch: Path
) -> None:
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine:
            found = status(machine.pid)
            assert found["Uid"].split() == found["Gid"].split() == [str(UID)] * 4
            assert found["Groups"] in ("", str(UID))
            assert {int(found[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
            assert found["NoNewPrivs"] == "1" and found["Seccomp"] == "2"
            assert os.readlink(f"/proc/{machine.pid}/root") == str(where.directory)
            for namespace in ("net", "ipc", "uts"):
                assert os.readlink(f"/proc/{machine.pid}/ns/{namespace}") != os.readlink(f"/proc/self/ns/{namespace}")


async def test_no_descriptor_of_a_copy_leads_to_a_file_of_the_host_but_its_own_disk_and_memory(
    vmm: Qemu, golden: Booted, scratch: Path
) -> None:
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine:
            opened = {os.readlink(link) for link in Path(f"/proc/{machine.pid}/fd").iterdir()}
            own = {str(where.directory / name) for name in ("rootfs", MEMORY)}
            assert {path for path in opened if path.startswith("/") and not path.startswith("/dev/null")} <= own


async def test_a_machine_that_is_killed_is_gone_to_all_who_ask(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine:
            (scratch / "copy").mkdir(0o700)
            signal.pidfd_send_signal(machine.pidfd, signal.SIGKILL)
            for asked in (machine.connect(), machine.pause(), machine.resume(), machine.snapshot(scratch / "copy")):
                with pytest.raises(SandboxGone):
                    async with asyncio.timeout(PATIENCE_S):
                        await asked
            assert not list((scratch / "copy").iterdir())


async def test_a_channel_that_was_exchanged_is_not_taken_for_the_agent_s(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    """H16: a QEMU that was taken over owns its directory."""
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine:
            other = await asyncio.start_unix_server(lambda reader, writer: writer.close(), scratch / "other")
            (where.directory / "channel").unlink()
            (where.directory / "channel").symlink_to(scratch / "other")
            with pytest.raises(WireError, match="another process"):
                async with asyncio.timeout(PATIENCE_S):
                    await machine.connect()
            other.close()
            await other.wait_closed()


async def test_a_machine_that_was_closed_is_gone_to_all_who_ask(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    """As when somebody freezes a sandbox that another is just removing."""
    with vms.place(scratch, UID) as where:
        machine = await vmm.restore(*golden, where)
        await machine.aclose()
        await machine.aclose()
        assert machine.pidfd == -1
        (scratch / "copy").mkdir(0o700)
        for asked in (machine.connect(), machine.pause(), machine.resume(), machine.snapshot(scratch / "copy")):
            with pytest.raises(SandboxGone):
                await asked
        assert not list((scratch / "copy").iterdir())


async def test_a_guest_that_panics_is_gone_with_its_last_words(vmm: Qemu, small: MachineSpec, scratch: Path) -> None:
    nothing = scratch / "nothing"
    nothing.write_bytes(bytes(MIB))
    nothing.chmod(0o644)
    with vms.place(scratch, UID) as where:
        async with booted(vmm, replace(small, rootfs=nothing), where) as machine:
            with pytest.raises(SandboxGone, match="panic"):
                async with asyncio.timeout(PATIENCE_S):
                    await machine.connect()


async def test_who_waits_for_a_guest_that_never_answers_can_stop(vmm: Qemu, small: MachineSpec, scratch: Path) -> None:
    spec = replace(small, boot_args=f"{small.boot_args} init=/bin/cat")
    with vms.place(scratch, UID) as where:
        async with booted(vmm, spec, where) as machine:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(8):
                    await machine.connect()
            assert machine.pid and not await _ended(machine)


async def _ended(machine: QemuMachine) -> bool:
    return status(machine.pid)["State"].startswith("Z")


async def test_a_flood_on_the_console_is_bounded_and_its_author_can_be_ended(
    vmm: Qemu, small: MachineSpec, scratch: Path
) -> None:
    spec = replace(small, boot_args=f"{small.boot_args} init=/usr/bin/yes")
    with vms.place(scratch, UID) as where:
        async with booted(vmm, spec, where) as machine:
            monitor = machine._monitor  # pyright: ignore[reportPrivateUsage]
            async with asyncio.timeout(PATIENCE_S):
                while monitor.said().count("y\r\ny") < 1000:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            for _ in range(20):
                await asyncio.sleep(0.05)
                assert len(monitor.said()) <= CONSOLE_BYTES
            signal.pidfd_send_signal(machine.pidfd, signal.SIGKILL)
            with pytest.raises(SandboxGone) as gone:
                async with asyncio.timeout(PATIENCE_S):
                    await machine.connect()
            assert len(gone.value.cause) <= 1000


async def test_there_is_no_qemu(scratch: Path, small: MachineSpec) -> None:
    missing = Qemu(Path("/nowhere/qemu"))
    with pytest.raises(ProtectionUnavailable) as failed:
        await missing.version()
    assert "install" in failed.value.remediation
    with vms.place(scratch, UID) as where, pytest.raises(ProtectionUnavailable):
        await missing.boot(small, where)


@pytest.mark.parametrize("said", ["QEMU emulator version 7.1.0", "QEMU emulator version 6.2.0", "something else", ""])
async def test_a_qemu_with_known_ways_out_is_refused(scratch: Path, said: str) -> None:
    binary = scratch / "qemu"
    binary.write_text(f"#!/bin/sh\necho '{said}'\n")
    binary.chmod(0o755)
    with pytest.raises(ProtectionUnavailable) as failed:
        await Qemu(binary).version()
    assert "7.2" in failed.value.remediation


async def test_a_qemu_that_was_replaced_is_asked_again(scratch: Path) -> None:
    binary = scratch / "qemu"
    vmm = Qemu(binary)
    for version in ("7.2.1", "8.0.5"):
        binary.unlink(missing_ok=True)
        binary.write_text(f"#!/bin/sh\necho QEMU emulator version {version}\n")
        binary.chmod(0o755)
        assert await vmm.version() == f"QEMU emulator version {version}"


async def test_files_that_are_not_there_are_named(vmm: Qemu, small: MachineSpec, scratch: Path) -> None:
    with vms.place(scratch, UID) as where, pytest.raises(SetupFailed, match="rootfs"):
        await vmm.boot(replace(small, rootfs=scratch / "nothing"), where)


async def test_a_kernel_that_is_none_is_said_by_qemu(vmm: Qemu, small: MachineSpec, scratch: Path) -> None:
    (scratch / "kernel").write_text("none")
    with vms.place(scratch, UID) as where, pytest.raises(SetupFailed) as failed:
        await vmm.boot(replace(small, kernel=scratch / "kernel"), where)
    assert "kernel" in failed.value.cause


def cut(directory: Path) -> None:
    os.truncate(directory / MEMORY, (directory / MEMORY).stat().st_size // 2)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "short memory": cut,
    "no memory": lambda d: os.truncate(d / MEMORY, 0),
    "memory is missing": lambda d: (d / MEMORY).unlink(),
    "state is missing": lambda d: (d / STATE).unlink(),
    "empty state": lambda d: os.truncate(d / STATE, 0),
    "short state": lambda d: os.truncate(d / STATE, (d / STATE).stat().st_size // 2),
    "another state": lambda d: (d / STATE).write_bytes(os.urandom(60_000)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_a_damaged_snapshot_is_refused(
    vmm: Qemu, golden: Booted, scratch: Path, damage: Callable[[Path], object]
) -> None:
    copy = scratch / "copy"
    copy.mkdir()
    for name in (STATE, MEMORY):
        vms.copied(golden[1] / name, copy).chmod(0o644)
    damage(copy)
    with vms.place(scratch, UID) as where, pytest.raises(SetupFailed):
        await vmm.restore(golden[0], copy, where)


async def test_a_snapshot_of_another_machine_is_refused(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    other = replace(golden[0], initrd=golden[0].kernel)  # which gives it ACPI
    with vms.place(scratch, UID) as where, pytest.raises(SetupFailed):
        await vmm.restore(other, golden[1], where)


async def test_a_full_disk_ends_a_copy_and_nothing_else(vmm: Qemu, golden: Booted, scratch: Path) -> None:
    with vms.place(scratch, UID) as where, vms.small_disk(scratch / "disk", 40 * MIB) as disk:
        async with restored(vmm, golden, where) as machine:
            await machine.pause()
            with pytest.raises(CapacityExceeded):
                await machine.snapshot(disk)
            assert not list(disk.iterdir()) and not vms.processes_of(None, disk)
            copy = await vms.saved(machine, scratch / "copy")
            assert await vms.answered(machine, "first") == "'of all'"
        async with restored(vmm, (golden[0], copy), where) as machine:
            assert await vms.answered(machine, "first") == "'of all'"


@pytest.mark.parametrize("after_s", [0, 0.03, 0.1, 0.2, 0.3])
async def test_a_copy_that_is_given_up_leaves_nothing_and_the_machine_goes_on(
    vmm: Qemu, golden: Booted, scratch: Path, after_s: float
) -> None:
    with vms.place(scratch, UID) as where:
        async with restored(vmm, golden, where) as machine:
            await machine.pause()
            (scratch / "copy").mkdir(0o700)
            copying = asyncio.create_task(machine.snapshot(scratch / "copy"))
            await asyncio.sleep(after_s)
            if copying.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await copying
                assert not list((scratch / "copy").iterdir()) and not vms.processes_of(None, scratch / "copy")
            await machine.resume()
            assert await vms.answered(machine, "first") == "'of all'"
            await vms.saved(machine, scratch / "again")


@pytest.mark.parametrize("after_s", [0, 0.01, 0.04, 0.08])
async def test_a_restore_that_is_given_up_leaves_nothing(vmm: Qemu, golden: Booted, scratch: Path, after_s: float) -> None:
    with vms.place(scratch, UID) as where:
        starting = asyncio.create_task(vmm.restore(*golden, where))
        await asyncio.sleep(after_s)
        if starting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await starting
        else:
            await (await starting).aclose()
