"""exec.*: what a program sees, what the host hears, and that neither can hurt the agent."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from pathlib import Path

import pytest

from fumehood.agent import wire

from .conftest import Client


def rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_output_exit_code_and_streams_are_told_apart(agent: Client) -> None:
    answer = agent.sh("echo out; echo err >&2; exit 3")
    assert (answer.stdout, answer.stderr) == ("out\n", "err\n")
    assert answer.ok == {"exit_code": 3, "signal": None, "changed": []}
    assert answer.events[0]["type"] == "started"


def test_a_death_by_signal_names_the_signal(agent: Client) -> None:
    assert agent.sh("kill -SEGV $$").ok == {"exit_code": None, "signal": signal.SIGSEGV, "changed": []}


def test_the_environment_is_only_what_was_asked_for(agent: Client) -> None:
    agent.ok("bind", env={"BOUND": "1", "BOTH": "bound"})
    answer = agent.call("exec.start", argv=["env"], env={"ASKED": "2", "BOTH": "asked"})
    env = dict(line.split("=", 1) for line in answer.stdout.splitlines())
    assert env.pop("PATH")
    assert env == {
        "HOME": str(agent.home),
        "USER": "user",
        "LOGNAME": "user",
        "LANG": "C.UTF-8",
        "BOUND": "1",
        "ASKED": "2",
        "BOTH": "asked",
    }


def test_a_program_inherits_nothing_and_is_confined(agent: Client) -> None:  # H5, H8, H16
    probe = """
import json, os, signal
status = dict(l.split(':', 1) for l in open('/proc/self/status').read().splitlines())
print(json.dumps({
    "fds": sorted(os.listdir('/proc/self/fd')), "sid": os.getsid(0) == os.getpid(), "group": os.getpgrp() == os.getpid(),
    # 32 and 33 are glibc's own: what make's posix_spawn() left ignored, no libc call can reset, and nobody can send.
    "ignored": int(status["SigIgn"], 16) & ~(1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1) | 3 << 31),
    "blocked": int(status["SigBlk"], 16), "no_new_privs": status["NoNewPrivs"].strip(),
    "oom": open('/proc/self/oom_score_adj').read().strip(), "umask": status["Umask"].strip(), "cwd": os.getcwd(),
}))"""
    seen = json.loads(agent.call("exec.start", argv=[sys.executable, "-c", probe]).stdout)
    assert seen.pop("fds") == ["0", "1", "2", "3"]  # 3 is listdir's own
    assert seen == {
        "sid": True,
        "group": True,
        "ignored": 0,
        "blocked": 0,
        "no_new_privs": "1",
        "oom": "500",
        "umask": "0022",
        "cwd": str(agent.home),
    }


def test_sigpipe_ends_a_program_as_in_a_shell(agent: Client) -> None:
    assert agent.sh("yes | head -1; echo done").stdout == "y\ndone\n"


@pytest.mark.parametrize(
    ("args", "code", "errno", "words"),
    [
        ({"argv": ["no-such-program"]}, "not_found", "ENOENT", "no-such-program"),
        ({"argv": ["/etc/passwd"]}, "invalid", "EACCES", "/etc/passwd"),
        ({"argv": ["true"], "cwd": "/no/such"}, "invalid", "ENOENT", "/no/such"),
        ({"argv": ["true"], "cwd": "/etc/passwd"}, "invalid", "ENOTDIR", "/etc/passwd"),
        ({"argv": []}, "invalid", None, "argv"),
        ({"argv": "ls"}, "invalid", None, "argv"),
        ({"argv": ["a\0b"]}, "invalid", None, "null"),
        ({"argv": ["true"], "env": {"A=B": "c"}}, "invalid", None, "env"),
        ({"argv": ["true"], "env": {"A": 1}}, "invalid", None, "env"),
        ({"argv": ["true"], "pty": {"rows": 0, "cols": 80}}, "invalid", None, "rows"),
    ],
)
def test_what_cannot_be_executed_is_an_error_that_says_why(
    agent: Client, args: dict[str, object], code: str, errno: str | None, words: str
) -> None:
    answer = agent.call("exec.start", **args)
    assert answer.error is not None and answer.events == []
    assert (answer.error["code"], answer.error.get("errno")) == (code, errno)
    assert words in answer.error["message"]


def test_stdin_arrives_whole_and_ends(agent: Client) -> None:
    data = bytes(range(256)) * 20_000  # 5 MB, far over a pipe and over the in-memory part of the spool
    stream = agent.open("exec.start", argv=["sh", "-c", "sleep 0.3; md5sum; cat"], stdin=True)
    agent.data(stream, data)
    agent.send(stream, wire.CLOSE)
    assert agent.finish(stream).stdout.split()[0] == hashlib.md5(data).hexdigest()


def test_a_program_that_closed_its_stdin_does_not_disturb(agent: Client) -> None:
    stream = agent.open("exec.start", argv=["sh", "-c", "exec <&-; echo closed; sleep 0.2"], stdin=True)
    agent.wait_output(stream, b"closed")
    agent.data(stream, b"x" * 300_000)
    answer = agent.finish(stream)
    assert answer.ok is not None and answer.ok["exit_code"] == 0


def test_without_stdin_a_program_reads_end_of_file(agent: Client) -> None:
    assert agent.sh("cat; echo end").stdout == "end\n"


def test_end_comes_when_the_started_process_exits_not_its_orphans(agent: Client) -> None:  # H15
    answer = agent.sh("sleep 60 & echo here")
    assert answer.stdout == "here\n" and answer.ok is not None
    writer = agent.sh("yes & echo $!; sleep 0.1")  # an orphan that floods the pipe it holds
    assert writer.ok is not None and writer.ok["exit_code"] == 0


def test_a_gibibyte_without_a_line_end_costs_the_agent_little(agent: Client) -> None:  # H15
    agent.sh("true")
    before = rss_bytes(agent.process.pid)
    stream = agent.open("exec.start", argv=["head", "-c", str(1 << 30), "/dev/zero"])
    got = peak = 0
    while (frame := agent.next(stream)).kind != wire.END:
        if frame.kind == wire.DATA:
            got += len(frame.payload) - 1
            peak = max(peak, rss_bytes(agent.process.pid)) if got % (64 << 20) < wire.CHUNK_BYTES else peak
    assert got == 1 << 30
    assert peak - before < 8 << 20


def test_a_host_that_does_not_read_costs_the_agent_little_and_the_rest_still_works(agent: Client) -> None:  # H15
    agent.sh("true")
    before = rss_bytes(agent.process.pid)
    floods = [agent.open("exec.start", argv=["head", "-c", str(32 << 20), "/dev/zero"]) for _ in range(8)]
    time.sleep(1.0)
    assert rss_bytes(agent.process.pid) - before < 8 << 20
    ping = agent.open("ping")
    assert agent.finish(ping).ok == {}
    for stream in floods:
        assert len(agent.finish(stream).output[wire.STDOUT]) == 32 << 20


def test_attach_follows_from_now_on_and_cancel_leaves_the_process_alive(agent: Client) -> None:
    first = agent.open("exec.start", argv=["sh", "-c", "echo one; read x; echo two $x"], stdin=True, tag="t")
    pid = agent.event(first, "started")["pid"]
    agent.wait_output(first, b"one\n")
    agent.send(first, wire.CANCEL)
    assert agent.finish(first).ok is not None
    assert agent.ok("exec.list")["processes"] == [
        {
            "pid": pid,
            "argv": ["sh", "-c", "echo one; read x; echo two $x"],
            "cwd": str(agent.home),
            "tag": "t",
            "pty": False,
        }
    ]
    second = agent.open("exec.attach", pid=pid)
    assert agent.event(second, "started")["pid"] == pid
    write = agent.open("exec.write", pid=pid)
    agent.data(write, b"x\n")
    agent.send(write, wire.CLOSE)
    assert agent.finish(write).ok == {}
    answer = agent.finish(second)
    assert answer.stdout == "two x\n" and answer.ok is not None and answer.ok["exit_code"] == 0
    assert agent.ok("exec.list") == {"processes": []}


def test_eof_ends_the_input_of_a_process(agent: Client) -> None:
    stream = agent.open("exec.start", argv=["cat"], stdin=True)
    pid = agent.event(stream, "started")["pid"]
    agent.data(stream, b"abc")
    agent.ok("exec.eof", pid=pid)
    assert agent.finish(stream).stdout == "abc"


def test_signals_reach_a_process_or_its_group_and_nobody_else(agent: Client) -> None:
    stream = agent.open("exec.start", argv=["sh", "-c", "trap 'echo got' USR1; echo up; while :; do sleep 0.05; done"])
    pid = agent.event(stream, "started")["pid"]
    agent.wait_output(stream, b"up")
    agent.ok("exec.signal", pid=pid, signal=signal.SIGUSR1)
    agent.wait_output(stream, b"got")
    agent.ok("exec.signal", pid=pid, signal=signal.SIGKILL, group=True)
    answer = agent.finish(stream)
    assert answer.ok is not None and answer.ok["signal"] == signal.SIGKILL
    for stranger in (pid, 1, -1, 0, agent.process.pid):
        error = agent.call("exec.signal", pid=stranger, signal=signal.SIGTERM).error
        assert error is not None and error["code"] == "not_found"


def test_a_terminal_is_one(agent: Client) -> None:
    script = "tty -s && echo tty; read line; trap 'stty size; exit 4' WINCH; echo armed $line; sleep 9 & wait"
    stream = agent.open("exec.start", argv=["bash", "-c", script], pty={"rows": 11, "cols": 33}, env={"TERM": "dumb"})
    pid = agent.event(stream, "started")["pid"]
    agent.wait_output(stream, b"tty\r\n", wire.TERMINAL)
    agent.data(stream, b"hello\n")
    agent.wait_output(stream, b"armed hello", wire.TERMINAL)
    agent.ok("exec.resize", pid=pid, rows=22, cols=44)
    answer = agent.finish(stream)
    assert b"22 44" in answer.output[wire.TERMINAL]
    assert answer.ok is not None and answer.ok["exit_code"] == 4


def test_the_last_words_on_a_terminal_arrive_though_an_orphan_holds_it(agent: Client) -> None:  # H15
    for _ in range(10):
        script = "trap '' HUP; sleep 60 & seq 1000; echo last"
        answer = agent.call("exec.start", argv=["bash", "-c", script], pty={"rows": 24, "cols": 80})
        assert answer.output[wire.TERMINAL].endswith(b"1000\r\nlast\r\n")


def test_changes_of_the_workspace_are_told(agent: Client) -> None:
    agent.sh("mkdir d; echo a > d/a; echo b > b; echo c > c")
    answer = agent.sh("echo new > d/new; echo longer > b; rm c")
    assert answer.ok is not None
    assert answer.ok["changed"] == [
        {"path": f"{agent.home}/b", "kind": "modified", "size": 7},
        {"path": f"{agent.home}/c", "kind": "removed", "size": 0},
        {"path": f"{agent.home}/d/new", "kind": "created", "size": 4},
    ]


def test_too_many_files_to_compare_is_said(agent: Client) -> None:
    answer = agent.sh("mkdir many; cd many; seq 12000 | xargs touch")
    assert answer.ok is not None and answer.ok["changed_truncated"] is True and len(answer.ok["changed"]) <= 1000


def test_unknown_verbs_and_processes_have_errors_of_their_own(agent: Client) -> None:
    for verb, args, code in (
        ("exec.fly", {}, "unsupported"),
        ("exec.attach", {"pid": 4_000_000}, "not_found"),
        ("exec.attach", {"pid": True}, "invalid"),
        ("exec.attach", {}, "invalid"),
        ("exec.resize", {"pid": 1, "rows": 1, "cols": 1}, "not_found"),
    ):
        error = agent.call(verb, **args).error
        assert error is not None and error["code"] == code, verb
