"""A guest boots from our kernels and images, its agent answers, and user code in it is confined, bounded and accounted for."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machines
import pytest
from machines import Guest

from fumehood.agent import wire
from fumehood.runtime.microvm.assets import Manifest
from fumehood.runtime.microvm.image import ROOTFS

pytestmark = [pytest.mark.microvm, pytest.mark.root]
Find = Callable[[str], Manifest]


@pytest.fixture(scope="module", params=["stock", "small"])
def guest(
    request: pytest.FixtureRequest, kernel: Find, image: Find, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("qemu")
    args = "fumehood.preload=IPython fumehood.prestart=python"
    with machines.qemu(kernel(request.param), image("python").path(ROOTFS), directory, args) as found:
        found.connect()
        yield found


@pytest.fixture(autouse=True)
def bound(request: pytest.FixtureRequest) -> None:
    if "guest" in request.fixturenames:
        bind(request.getfixturevalue("guest"))


def bind(guest: Guest, **more: object) -> None:
    limits = {"memory_bytes": 200 << 20, "pids": 64, "disk_bytes": 64 << 20}
    entropy = base64.b64encode(os.urandom(64)).decode()
    given = {"env": {}, "clock_s": time.time(), "entropy": entropy, "hostname": "box", "limits": limits, **more}
    assert "ok" in guest.call("bind", **given).end


def ids(guest: Guest) -> dict[str, str]:
    paths = {"machine": "/etc/machine-id", "boot": "/proc/sys/kernel/random/boot_id", "host": "/etc/hostname"}
    return {name: guest.sh(f"cat {path}").stdout.strip() for name, path in paths.items()}


def test_the_agent_answers(guest: Guest) -> None:
    assert guest.run("6*7").result == "42"
    assert guest.sh("echo hi").stdout == "hi\n"


def test_a_host_that_comes_back_gets_a_hello_and_finds_what_was_there(guest: Guest) -> None:
    assert guest.run("kept = 1234").ok
    for _ in range(3):
        assert guest.connect()["generation"] == wire.GENERATION
        assert guest.run("kept").result == "1234"


def test_a_host_that_leaves_in_the_middle_of_a_run_does_not_end_it(guest: Guest) -> None:
    assert guest.run("import time").ok
    code = "time.sleep(0.5); done = True"
    guest.channel.sendall(
        wire.encode_json(10_000, wire.OPEN, {"verb": "context.run", "code": code, "env": {}, "language": "python"})
    )
    guest.connect()
    assert guest.run("done").result == "True"


def test_user_code_is_an_ordinary_user_without_any_capability(guest: Guest) -> None:
    script = "id -u; id -G; grep -E 'Cap|NoNewPrivs' /proc/self/status; cat /proc/self/cgroup"
    lines = guest.sh(script).stdout.split("\n")
    assert lines[:2] == ["1000", "1000"] and lines[-2] == "0::/user"
    assert [line.split()[1] for line in lines[2:-2]] == ["0000000000000000"] * 5 + ["1"]
    assert guest.run("import os; os.getresuid() + os.getresgid()").result == str((1000,) * 6)


def test_user_code_can_not_write_outside_its_own_directories_or_change_the_machine(guest: Guest) -> None:
    attempts = {
        "touch /etc/x": 1, "touch /opt/x": 1, "touch /run/x": 1, "touch /dev/x": 1, "mkdir /sys/fs/cgroup/user/x": 1,
        "echo 0 > /proc/sys/kernel/dmesg_restrict": 2, "echo max > /sys/fs/cgroup/user/memory.max": 2,
        "echo $$ > /sys/fs/cgroup/cgroup.procs": 2, "kill -9 1": 1, "cat /proc/1/environ": 1, "cat /proc/1/mem": 1,
        "hostname other": 1, "mount -t tmpfs x /tmp": 32, "touch /home/user/x /tmp/x /dev/shm/x": 0,
    }  # fmt: skip
    codes = {script: guest.sh(script).ok["exit_code"] for script in attempts}
    assert {s: bool(code) for s, code in codes.items()} == {s: bool(code) for s, code in attempts.items()}, codes


def test_there_is_no_device_but_the_harmless_ones_and_no_network_but_the_loopback(guest: Guest) -> None:
    found = guest.sh("find /dev -type b -o -type c ! -path '/dev/pts/*' | sort").stdout.split()
    assert found == [f"/dev/{n}" for n in ("full", "null", "random", "tty", "urandom", "zero")]
    interfaces = guest.sh("cat /proc/net/dev").stdout.splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces if "sit" not in line] == ["lo"]
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); c.close()"
    assert guest.run(code).ok["outcome"] == "ok"


def test_bind_renews_clock_names_and_ids(guest: Guest) -> None:
    first = ids(guest)
    bind(guest, hostname="other", clock_s=2_000_000_000)
    second = ids(guest)
    assert first["host"] == "box" and second["host"] == "other" == guest.sh("hostname").stdout.strip()
    assert first["machine"] != second["machine"] and len(second["machine"]) == 32
    assert first["boot"] != second["boot"] and len(second["boot"]) == 36
    assert 0 <= int(guest.sh("date +%s").stdout) - 2_000_000_000 < machines.PATIENCE_S


def test_bind_reseeds_sessions_that_are_there_already(guest: Guest) -> None:
    assert guest.run("import random; random.seed(1); first = random.random(); random.seed(1)").ok
    bind(guest)
    assert guest.run("random.random() == first").result == "False"


@pytest.mark.parametrize("limits", [{"memory_bytes": -1}, {"memory_bytes": True}, {"cpus": 1}, {"pids": "9"}, []])
def test_limits_that_make_no_sense_are_refused(guest: Guest, limits: object) -> None:
    assert guest.call("bind", env={}, limits=limits).end["error"]["code"] == "invalid"


def test_too_much_memory_ends_user_code_alone_and_is_accounted(guest: Guest) -> None:
    before = guest.sh("true").account["oom_kills"]
    died = guest.sh("head -c 400000000 /dev/zero | tail")
    assert died.account["oom_kills"] > before
    assert guest.run("1 + 1").result == "2"


def test_too_many_processes_are_refused_and_accounted(guest: Guest) -> None:
    bind(guest, limits={"pids": 12})
    before = guest.sh("true").account["pids_refused"]
    refused = guest.sh("for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do sleep 1 & done; wait")
    assert refused.account["pids_refused"] > before
    assert guest.run("1 + 1").result == "2"


def test_a_full_disk_is_an_error_of_the_program_and_accounted(guest: Guest) -> None:
    full = guest.sh("head -c 100000000 /dev/zero > /tmp/big")
    assert full.ok["exit_code"] == 1 and full.account["disk_full"] and full.account["disk_used_bytes"] > 60 << 20
    emptied = guest.sh("rm /tmp/big")
    assert not emptied.account["disk_full"] and emptied.account["disk_used_bytes"] < 1 << 20


def test_orphans_are_reaped(guest: Guest) -> None:
    assert guest.sh("for i in 1 2 3; do (sleep 0.05 &); done").ok
    deadline = time.monotonic() + machines.PATIENCE_S
    while "Z" in guest.sh("ps -eo stat=").stdout:
        assert time.monotonic() < deadline


def test_the_kernel_reports_no_weakness_of_the_cpu_that_it_leaves_open(guest: Guest) -> None:
    found = guest.sh("cd /sys/devices/system/cpu/vulnerabilities; grep . *").stdout
    assert found.count("\n") >= 8 and "Vulnerable" not in found, found
    words = guest.sh("cat /proc/cmdline").stdout.split()
    assert not {"nopti", "nokaslr", "mitigations=off"} & set(words)


def test_the_kernel_lies_elsewhere_at_each_boot(kernel: Find, tmp_path: Path) -> None:
    """A panic says by how much it was moved; without a disk there is one at once."""
    offsets = set[str]()
    for boot in ("one", "two", "three"):
        (tmp_path / boot).mkdir()
        with machines.qemu(kernel("small"), Path(os.devnull), tmp_path / boot) as guest:
            guest.process.wait(machines.PATIENCE_S)
        offsets |= set(re.findall(r"Kernel Offset: (0x[0-9a-f]+) from", (tmp_path / boot / "console.log").read_text()))
    assert len(offsets) >= 2, offsets


def test_firecracker_with_the_pvm_kernel_answers_and_serves_a_host_that_comes_back(
    firecracker: Path, kernel: Find, image: Find, tmp_path: Path
) -> None:
    with machines.firecracker(firecracker, kernel("pvm"), image("python").path(ROOTFS), tmp_path) as guest:
        assert guest.connect()["generation"] == wire.GENERATION
        bind(guest, limits={"memory_bytes": 100 << 20})
        code = "import os, socket\n(6 * 7, os.getuid(), socket.gethostname())"
        assert guest.run(code).result == "(42, 1000, 'box')"
        guest.connect()
        answer = guest.run("kept = len(_)\nkept")
        assert answer.result == "3" and answer.account["oom_kills"] == 0


def test_a_step_that_fails_is_told_to_the_host(kernel: Find, image: Find, tmp_path: Path) -> None:
    with machines.qemu(kernel("stock"), image("python").path(ROOTFS), tmp_path, "fumehood.preload=no_such_module") as guest:
        failed = guest.connect()["setup_failed"]
        assert failed["step"] == "agent" and "no_such_module" in failed["message"], json.dumps(failed)
