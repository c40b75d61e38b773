"""The agent as a real PID 1 in a pid namespace of its own: reaping, signals, and what user code can't do to it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fumehood.agent import wire

from .conftest import Client, StartAgent

pytestmark = pytest.mark.root  # mounting /proc for the namespace; the rootless way is tests/native's


@pytest.fixture
def init(start_agent: StartAgent) -> Client:
    client = start_agent("--init")
    client.hello()
    return client


def processes(agent: Client) -> list[str]:
    """`pid state` of every process but the one that looks."""
    script = "import os\nfor p in sorted(filter(str.isdigit, os.listdir('/proc')), key=int):\n"
    script += " s = open(f'/proc/{p}/stat').read()\n"
    script += " if int(p) != os.getpid(): print(p, s.rsplit(')', 1)[1].split()[0])"
    return agent.call("exec.start", argv=[sys.executable, "-c", script]).stdout.splitlines()


def nobody_else_is_left(init: Client) -> None:
    """No zombie either, from the first look on; PID 1 itself may still be at work then, and comes to rest."""
    deadline = time.monotonic() + 10
    while (found := processes(init)) == ["1 R"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == ["1 S"]


def test_it_is_pid_1_and_reaps_orphans(init: Client) -> None:
    assert init.sh("cat /proc/1/comm").stdout.startswith("python")
    for _ in range(5):
        init.sh("(sleep 0.05 &) ; (sleep 0.05 &)")
    time.sleep(0.3)
    nobody_else_is_left(init)


def test_many_children_at_once_are_all_reaped_with_their_own_status(init: Client) -> None:
    streams = {n: init.open("exec.start", argv=["sh", "-c", f"exit {n}"]) for n in range(60)}
    for n, stream in streams.items():
        answer = init.finish(stream)
        assert answer.ok is not None and answer.ok["exit_code"] == n
    nobody_else_is_left(init)


@pytest.mark.parametrize("number", ["STOP", "KILL", "INT", "TERM", "HUP", "CHLD", "PIPE", "ALRM", "SEGV", "35"])
def test_no_signal_from_user_code_stops_or_kills_it(init: Client, number: str) -> None:  # H15, H16
    init.sh(f"for i in 1 2 3 4 5; do kill -{number} 1; done")
    assert init.ok("ping") == {}
    assert init.sh("echo alive").stdout == "alive\n"


def test_user_code_can_not_read_write_or_trace_it(init: Client) -> None:  # H16
    attack = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
got = {}
for name, flags in (("mem", os.O_RDWR), ("environ", os.O_RDONLY), ("maps", os.O_RDONLY), ("auxv", os.O_RDONLY)):
    try:
        fd = os.open(f"/proc/1/{name}", flags)
        os.read(fd, 1)
        got[name] = "open"
    except OSError as e:
        got[name] = os.strerror(e.errno)
try:
    got["fd"] = os.listdir("/proc/1/fd") and os.readlink("/proc/1/fd/0")
except OSError as e:
    got["fd"] = os.strerror(e.errno)
libc.ptrace.argtypes = [ctypes.c_long] * 4
for name, request in (("attach", 16), ("seize", 0x4206)):
    got[name] = os.strerror(ctypes.get_errno()) if libc.ptrace(request, 1, 0, 0) else "traced"
print(json.dumps(got))"""
    got = json.loads(init.call("exec.start", argv=[sys.executable, "-c", attack]).stdout)
    assert set(got.values()) <= {"Permission denied", "Operation not permitted"}, got


def test_user_code_is_dumpable_so_its_own_proc_works(init: Client) -> None:
    check = "import os; print(os.listdir('/proc/self/fd') != [], open('/proc/self/mem', 'rb').fileno() > 0)"
    assert init.call("exec.start", argv=[sys.executable, "-c", check]).stdout == "True True\n"
    assert init.run(check).stdout == "True True\n"


def test_a_closed_channel_ends_it_and_everything_in_it(start_agent: StartAgent) -> None:  # H15
    agent = start_agent("--init", "--prestart", "python")
    agent.hello()
    marker = f"sleep 98{time.time_ns() % 10_000_000}"
    stream = agent.open("exec.start", argv=["sh", "-c", f"trap '' TERM HUP; setsid {marker} & echo up; {marker}"])
    agent.wait_output(stream, b"up")
    agent.close()
    assert agent.process.returncode == 0
    assert marker not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "bytes_",
    [
        wire.encode_json(1, wire.OPEN, {"verb": "ping"}),  # before HELLO
        wire.encode_json(0, wire.HELLO, {"generation": 99}),
        wire.encode_json(0, wire.HELLO, {"generation": wire.GENERATION}) + wire.encode_json(5, wire.END, {}),
        b"\xff" * 32,
    ],
)
def test_a_host_that_breaks_the_protocol_is_not_served(
    start_agent: StartAgent, bytes_: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    agent = start_agent("--init")
    agent.next(0)
    agent.channel.sendall(bytes_)
    with pytest.raises(ConnectionError):
        agent.next(0)
    agent.close()
    assert agent.process.returncode == 1
    assert "BadFrame" in capfd.readouterr().err


def test_a_bind_that_is_not_possible_here_is_said_and_binds_nothing(init: Client) -> None:
    for late in ({"clock_s": 1_700_000_000}, {"entropy": "AAAA"}):
        error = init.call("bind", env={"BOUND": "1"}, **late).error
        assert error is not None and error["code"] == "unsupported"
    error = init.call("bind", entropy="no base64!").error
    assert error is not None and error["code"] == "invalid"
    assert init.sh("echo -$BOUND-").stdout == "--\n"


def test_confine_that_fails_runs_nothing(start_agent: StartAgent, capfd: pytest.CaptureFixture[str]) -> None:  # H13
    agent = start_agent("--fail-confine")
    agent.hello()
    answer = agent.sh("touch ran")
    assert answer.error is not None and answer.error["code"] == "internal" and "confine" in answer.error["message"]
    died = agent.run("open('ran', 'w')")
    assert died.ok is not None and died.ok["outcome"] == "died" and "refused to confine" in died.stderr
    assert list(agent.home.iterdir()) == []


def test_out_of_descriptors_the_answer_is_an_error_and_it_recovers(start_agent: StartAgent) -> None:  # H15, H21
    agent = start_agent("--init", "--open-files", "40")
    agent.hello()
    streams = [agent.open("exec.start", argv=["sleep", "1"], pty={"rows": 9, "cols": 9}) for _ in range(40)]
    answers = [agent.finish(s) for s in streams]
    refused = [a.error for a in answers if a.error]
    assert refused and all((e["code"], e["errno"]) == ("file_error", "EMFILE") for e in refused)
    assert agent.sh("echo fine").stdout == "fine\n"
    assert {a.ok["exit_code"] for a in answers if a.ok} == {0}
    assert len([a for a in (agent.finish(agent.open("exec.start", argv=["true"])) for _ in range(80)) if a.ok]) == 80


def test_at_the_pids_limit_the_answer_is_busy_and_it_recovers(start_agent: StartAgent) -> None:  # H15, H21
    agent = start_agent("--prestart", "python")
    agent.hello()
    base = next(p for p in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if (p / "cgroup.procs").exists())
    group = base / f"fumehood-test-{agent.process.pid}"
    group.mkdir()
    try:
        (group / "pids.max").write_text("6")
        (group / "cgroup.procs").write_text(str(agent.process.pid))
        streams = [agent.open("exec.start", argv=["sleep", "0.5"]) for _ in range(8)]
        answers = [agent.finish(s) for s in streams]
        refused = [a.error for a in answers if a.error]
        assert refused and all((e["code"], e["errno"]) == ("busy", "EAGAIN") for e in refused)
        assert agent.sh("echo fine").stdout == "fine\n"
    finally:
        agent.close()
        group.rmdir()
