"""Each status of the closed set that this tier has, from a real run, with a cause that a caller can act on (H21, M3)."""

import os
import threading

import pytest
from attack import PRELUDE

from fumehood import Sandbox
from fumehood.errors import PolicyError
from fumehood.model import MIB

pytestmark = pytest.mark.rootless
ROOT = os.geteuid() == 0


def test_a_program_that_works_is_ok_and_one_that_fails_is_an_error(box: Sandbox) -> None:
    """H21"""
    good, bad = box.exec("true"), box.exec("exit 9")
    assert (good.status, good.cause, good.exit_code) == ("ok", "", 0)
    assert (bad.status, bad.cause, bad.exit_code) == ("error", "exit code 9", 9)


def test_memory_over_the_limit_is_oom_with_limit_and_peak(box: Sandbox) -> None:
    """H15, H21: by the cgroup's own events, or by the watchdog of an ordinary user, never guessed from a signal."""
    with Sandbox(tier="native", limits={"memory_bytes": 64 * MIB}) as small:
        result = small.exec(["python3", "-c", "a = [bytearray(1 << 20) for _ in range(400)]\nimport time; time.sleep(5)"])
        assert result.status == "oom", result
        assert str(64 * MIB) in result.cause and "peak" in result.cause
        assert result.usage.peak_memory_bytes >= 48 * MIB
    assert box.run("1").ok


def test_a_killed_program_within_its_memory_is_not_oom(box: Sandbox) -> None:
    """H21: SIGKILL alone proves nothing."""
    result = box.exec("kill -9 $$")
    assert result.status == "killed" and "signal 9" in result.cause


def test_a_deadline_that_passed_is_timeout_and_states_it(box: Sandbox) -> None:
    """H17"""
    result = box.exec("sleep 20", timeout_s=0.3)
    assert result.status == "timeout" and "0.3 s" in result.cause


def test_forks_over_the_limit_are_pids_limit_and_counted() -> None:
    """H15, H21"""
    with Sandbox(tier="native", limits={"pids": 24}) as box:
        result = box.run("import subprocess\nkept = [subprocess.Popen(['sleep', '9']) for _ in range(40)]")
        assert result.status == "pids_limit" and "24" in result.cause, result


def test_a_full_disk_is_disk_full_in_bytes_and_in_inodes() -> None:
    """H15, H21"""
    with Sandbox(tier="native", limits={"disk_bytes": 4 * MIB}) as box:
        result = box.run("open('f', 'wb', buffering=0).write(b'x')\nwith open('f', 'wb') as f: f.write(bytes(8 << 20))")
        assert result.status == "disk_full" and str(4 * MIB) in result.cause, result
    with Sandbox(tier="native", limits={"inodes": 64}) as box:
        result = box.exec("for n in $(seq 100); do : > f$n || exit 1; done")
        assert result.status == "disk_full" and "64 inodes" in result.cause, result


def test_a_flood_is_output_limit_and_the_next_run_works() -> None:
    """H15"""
    with Sandbox(tier="native", limits={"output_kill_bytes": MIB}) as box:
        result = box.exec("yes")
        assert result.status == "output_limit" and str(MIB) in result.cause
        assert box.exec("echo still").stdout == "still\n"


def test_a_sandbox_that_its_owner_kills_is_killed_with_the_reason(box: Sandbox) -> None:
    """H21"""
    threading.Timer(0.3, box.kill).start()
    result = box.exec("sleep 20")
    assert result.status == "killed" and "owner" in result.cause


def test_refused_calls_are_named_and_counted_and_end_in_syscall_refused(box: Sandbox) -> None:
    """H25, H21: two mount() attempts and one keyctl(), then a failure because of them."""
    code = "for _ in range(2): attempt(syscall, 165, b'none', b'/tmp', b'tmpfs', 0, 0)\nsyscall(250, 0, 0, 0)"
    result = box.run(PRELUDE + code)
    assert result.status == "syscall_refused" and "mount x2" in result.cause and "keyctl x1" in result.cause
    assert {(r.name, r.count) for r in result.refused_syscalls} == {("mount", 2), ("keyctl", 1)}


def test_a_refused_call_that_the_program_survives_is_still_listed_in_an_ok_result(box: Sandbox) -> None:
    """H25"""
    result = box.run(PRELUDE + "attempt(syscall, 321, 0, 0, 0)")
    assert result.status == "ok" and [r.name for r in result.refused_syscalls] == ["bpf"]


def test_a_connection_attempt_is_egress_denied_with_its_address(box: Sandbox) -> None:
    """H9, H21"""
    result = box.run("import socket\nsocket.create_connection(('192.0.2.7', 443), 2)")
    assert result.status == "egress_denied"
    assert [(c.address, c.port, c.allowed) for c in result.connections] == [("192.0.2.7", 443, False)]


def test_a_look_up_of_a_name_is_an_attempt_to_leave() -> None:
    """H9, M16: what model-written code tries first is a host by its name."""
    with Sandbox(tier="native") as box:
        result = box.run("import socket; socket.create_connection(('example.com', 443))")
        assert result.status == "egress_denied" and result.connections[0].port == 53


@pytest.mark.parametrize(
    "files", [{"read_only": ["/home/user/later"]}, {"hidden": ["/home/user/.later"]}, {"writable": ["/usr/share", "/tmp"]}]
)
def test_a_file_rule_that_could_not_hold_means_no_sandbox(files: dict[str, list[str]]) -> None:
    """H13: a path that is not there yet can be neither hidden nor kept from writing."""
    with pytest.raises(PolicyError, match="file-rules"), Sandbox(tier="native", policy={"files": files}):
        pass
