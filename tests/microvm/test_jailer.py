"""Which Firecracker is started, and how little one that its guest has taken over could do on this host (H3)."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import vms
from vms import UID

from fumehood.errors import ProtectionUnavailable, SetupFailed
from fumehood.runtime.microvm.firecracker import Firecracker, refusal
from fumehood.runtime.microvm.firecracker_api import Api, Fault, fault_message, parse_head
from fumehood.runtime.microvm.jailer import API, Jail
from fumehood.runtime.microvm.machine import CHANNEL, MachineSpec
from fumehood.runtime.microvm.process import Monitor

pytestmark = [pytest.mark.microvm, pytest.mark.root]
Booted = tuple[MachineSpec, Path]
SECCOMP_FILTER = "2"


@pytest.fixture
def scratch(machines_dir: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=machines_dir) as directory:
        yield Path(directory)


@pytest.mark.parametrize("version", [(1, 12, 0), (1, 12, 9), (1, 13, 0), (1, 14, 4), (1, 15, 1), (2, 0, 0)])
def test_versions_without_a_known_way_out_are_taken(version: tuple[int, int, int]) -> None:
    assert refusal(version) == ""


@pytest.mark.parametrize("version", [(0, 9, 9), (1, 11, 9), (1, 13, 1), (1, 14, 0), (1, 14, 3), (1, 15, 0)])
def test_versions_with_a_known_way_out_are_refused(version: tuple[int, int, int]) -> None:
    assert refusal(version)


def script(path: Path, says: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


async def test_the_version_is_the_binarys_and_is_asked_again_when_that_has_changed(firecracker: Path, tmp_path: Path) -> None:
    assert await Firecracker(firecracker).version() == "1.12.1"
    vmm = Firecracker(script(tmp_path / "firecracker", "Firecracker v1.14.4"))
    assert await vmm.version() == "1.14.4"
    script(tmp_path / "firecracker", "Firecracker v1.14.3")
    with pytest.raises(ProtectionUnavailable, match=r"1\.14\.3"):
        await vmm.version()


@pytest.mark.parametrize(
    ("says", "jailer", "word"),
    [
        ("Firecracker v1.14.3", "", "1.14.3"),
        ("Firecracker v1.14.4", "Jailer v1.14.3", "another version"),
        ("something else", "", "something else"),
        (None, "", "No such file"),
    ],
)
async def test_a_binary_that_is_no_good_one_is_refused_before_anything_starts(
    booted: Booted, scratch: Path, says: str | None, jailer: str, word: str
) -> None:
    binaries = scratch / "bin"
    binaries.mkdir()
    if says:
        script(binaries / "firecracker", says)
    if jailer:
        script(binaries / "jailer", jailer)
    with vms.place(scratch, UID) as where:
        with pytest.raises(ProtectionUnavailable, match=word) as refused:
            await Firecracker(binaries / "firecracker").restore(*booted, where)
        assert "1.14.4" in refused.value.remediation


async def test_without_a_firecracker_on_the_path_the_remediation_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ProtectionUnavailable, match="PATH"):
        await Firecracker().version()


async def test_a_monitor_that_is_jailed_has_a_uid_a_root_and_namespaces_of_its_own_no_capability_and_a_filter(
    firecracker: Path, booted: Booted, scratch: Path
) -> None:
    vmm = Firecracker(firecracker)
    assert vmm.jailed
    with vms.place(scratch, UID) as where:
        async with vms.restored(vmm, *booted, where) as machine:
            process = Path(f"/proc/{machine.pid}")
            assert os.readlink(process / "exe").endswith("/firecracker")
            status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
            assert status["Uid"].split() == status["Gid"].split() == [str(UID)] * 4 and status["Groups"].strip() == ""
            capabilities = {
                name: int(value, 16) for name, value in status.items() if name in ("CapEff", "CapPrm", "CapInh", "CapAmb")
            }
            assert set(capabilities.values()) == {0} and len(capabilities) == 4
            assert status["NoNewPrivs"] == "1"
            assert {(t / "status").read_text().split("Seccomp:\t")[1][0] for t in process.glob("task/*")} == {SECCOMP_FILTER}
            assert {"rootfs", "channel", "dev"} <= set(os.listdir(process / "root")) and not (process / "root/etc").exists()
            for kind in ("net", "ipc", "uts", "mnt"):
                assert os.readlink(process / "ns" / kind) != os.readlink(f"/proc/self/ns/{kind}")
            owner = where.directory.stat()
            assert (owner.st_uid, owner.st_mode & 0o7777) == (0, 0o700)
        owner = where.directory.stat()
        assert owner.st_uid == UID


@pytest.mark.parametrize("name", ["firecracker", "vm", "anything"])
async def test_a_link_that_was_planted_in_the_way_of_the_jailer_is_refused_and_not_followed(
    firecracker: Path, booted: Booted, scratch: Path, name: str
) -> None:
    target = scratch / "target"
    target.mkdir(mode=0o755)
    with vms.place(scratch, UID) as where:
        (where.directory / name).symlink_to(target)
        with pytest.raises(SetupFailed, match="not empty"):
            await Firecracker(firecracker).restore(*booted, where)
        assert not list(target.iterdir()) and target.stat().st_uid == 0
        assert where.directory.stat().st_uid == UID
        (where.directory / name).unlink()


async def test_a_directory_that_is_a_link_itself_is_refused(firecracker: Path, booted: Booted, scratch: Path) -> None:
    with vms.place(scratch, UID) as real:
        (scratch / "link").symlink_to(real.directory)
        with pytest.raises(SetupFailed, match="can't have the directory"):
            await Firecracker(firecracker).restore(*booted, vms.Place("link", scratch / "link", UID))
        assert real.directory.stat().st_uid == UID


async def test_without_a_jailer_the_tier_can_say_so_and_the_monitor_has_a_uid(firecracker: Path, scratch: Path) -> None:
    with vms.open_to_all() as directory, vms.place(scratch, UID) as where:
        binary = vms.copied(firecracker, directory)
        assert Firecracker(binary).jailed == ""
        jail = Jail(where, binary, None)
        monitor = Monitor.start(jail.command, where, file_bytes=vms.MIB)
        api = Api(monitor, jail)
        try:
            with pytest.raises(Fault, match=r"(?i)invalid|unknown|not supported"):  # it is there, and answers
                await api.ask("PUT /machine-config", {"nonsense": 1})
            status = Path(f"/proc/{monitor.pid}/status").read_text()
            assert f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n" in status and "CapBnd:\t0000000000000000" in status
        finally:
            await api.aclose()
            await monitor.aclose()
            await jail.aclose()


async def test_what_is_no_socket_of_the_monitors_is_not_connected_to(scratch: Path) -> None:
    with vms.place(scratch, None) as where, socket.socket(socket.AF_UNIX) as host:
        host.bind(str(scratch / "of-the-host"))
        host.listen()
        jail = Jail(where, Path("/bin/firecracker"), None)
        try:
            (where.directory / CHANNEL).symlink_to(scratch / "of-the-host")
            (where.directory / API).write_text("")
            for name in (CHANNEL, API):
                with pytest.raises(ConnectionRefusedError), jail.socket(name):
                    pass
            with pytest.raises(FileExistsError):
                jail.create(CHANNEL)
        finally:
            await jail.aclose()
        assert (scratch / "of-the-host").exists()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n",
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 2000\r\n\r\n",
        b"",
        b"x" * 200_000,
    ],
)
async def test_an_answer_that_is_none_of_firecrackers_is_a_fault(scratch: Path, answer: bytes) -> None:
    async def hostile(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    with vms.place(scratch, None) as where:
        jail = Jail(where, Path("/bin/firecracker"), None)
        monitor = Monitor.start(["sleep", "0.1"], where, file_bytes=0)
        try:
            async with await asyncio.start_unix_server(hostile, where.directory / API):
                with pytest.raises(Fault, match="PATCH /vm"):
                    await Api(monitor, jail).ask("PATCH /vm", {"state": "Paused"}, 5.0)
        finally:
            await monitor.aclose()
            await jail.aclose()


async def test_one_that_never_answers_is_given_up(scratch: Path) -> None:
    with vms.place(scratch, None) as where:
        jail = Jail(where, Path("/bin/firecracker"), None)
        monitor = Monitor.start(["sleep", "600"], where, file_bytes=0)
        try:
            with pytest.raises(Fault, match="no answer within"):
                await Api(monitor, jail).ask("PATCH /vm", {"state": "Paused"}, 0.05)
        finally:
            await monitor.aclose()
            await jail.aclose()


def test_answers_are_read_as_far_as_they_are_one() -> None:
    assert parse_head(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n") == (204, 0)
    assert parse_head(b"HTTP/1.1 400 \r\nContent-Length: 12\r\n\r\n") == (400, 12)
    assert fault_message(b'{"fault_message": "no"}') == "no"
    for odd in (b"", b"[]", b'"x"', b"\xff", b'{"other": 1}'):
        assert fault_message(odd)
