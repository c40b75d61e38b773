"""context.*: sessions that keep state, that die without taking the agent along, and that can be rolled back."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fumehood.agent import wire
from fumehood.agent.session import languages

from .conftest import Answer, Client, StartAgent

# How user code, in a real session, finds the session's control socket: the only socket it has.
FIND_CONTROL = """
import os, stat, socket, struct, json
fd = next(n for n in range(3, 100) if os.path.exists(f'/proc/self/fd/{n}') and stat.S_ISSOCK(os.fstat(n).st_mode))
control = socket.socket(fileno=os.dup(fd))
def frame(stream, kind, value):
    payload = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack('>IIB', len(payload), stream, kind) + payload
"""


@pytest.fixture
def agent(start_agent: StartAgent) -> Client:
    client = start_agent("--preload")
    client.hello()
    return client


def outcome(answer: Answer) -> str:
    assert answer.ok is not None, answer.error
    return answer.ok["outcome"]


def main_text(answer: Answer) -> str:
    return next(e["data"]["text/plain"] for e in answer.events if e["type"] == "result" and e["is_main_result"])


def started(agent: Client, code: str, **args: Any) -> int:
    """A run that has begun: `code` follows a line of output that was seen."""
    stream = agent.open("context.run", code=f"print('begun', flush=True)\n{code}", **args)
    agent.wait_output(stream, b"begun")
    return stream


def test_state_is_kept_and_results_output_and_errors_are_told(agent: Client) -> None:
    first = agent.run("import sys\nx = 20; print('out'); print('err', file=sys.stderr)\nx + 1")
    assert (first.stdout, first.stderr, main_text(first)) == ("out\n", "err\n", "21")
    assert first.ok == {"context": "python", "outcome": "ok", "execution_count": 1, "changed": []}
    assert main_text(agent.run("x")) == "20"
    failed = agent.run("1 / 0")
    assert outcome(failed) == "error"
    assert [e["name"] for e in failed.events if e["type"] == "error"] == ["ZeroDivisionError"]


def test_all_output_comes_before_the_end(agent: Client) -> None:
    answer = agent.run("for i in range(20_000): print(i)")
    assert answer.stdout.splitlines()[-1] == "19999" and len(answer.stdout.splitlines()) == 20_000


def test_contexts_are_apart_and_listed_in_order_of_creation(agent: Client) -> None:
    mine = agent.ok("context.create", language="python", cwd="/tmp")
    named = agent.ok("context.create", language="python", id="named")
    assert named == {"id": "named", "language": "python", "cwd": str(agent.home)}
    agent.run("x = 1", id=mine["id"])
    assert outcome(agent.run("x", id="named")) == "error"
    assert main_text(agent.run("import os; os.getcwd()", id=mine["id"])) == "'/tmp'"
    assert [c["id"] for c in agent.ok("context.list")["contexts"]] == [mine["id"], "named"]


@pytest.mark.parametrize(
    ("verb", "args", "code"),
    [
        ("context.create", {"language": "cobol"}, "unsupported"),
        ("context.create", {"language": "python", "id": "../x"}, "invalid"),
        ("context.create", {"language": "python", "cwd": "/no/such"}, "invalid"),
        ("context.run", {"code": "1", "id": "nobody"}, "not_found"),
        ("context.run", {"code": "1", "language": "cobol"}, "unsupported"),
        ("context.run", {"code": 1}, "invalid"),
        ("context.interrupt", {"id": "nobody"}, "not_found"),
        ("context.rollback", {"id": "there", "checkpoint": "no"}, "not_found"),
        ("context.create", {"language": "python", "id": "there"}, "exists"),
    ],
)
def test_bad_requests_have_errors_of_their_own(agent: Client, verb: str, args: dict[str, Any], code: str) -> None:
    agent.ok("context.create", language="python", id="there")
    error = agent.call(verb, **args).error
    assert error is not None and error["code"] == code


@pytest.mark.parametrize("language", sorted({"bash", "javascript"} & set(languages())))
def test_other_languages_keep_state_and_say_that_they_have_no_checkpoint(agent: Client, language: str) -> None:
    code = {"bash": ("x=5", "echo $x"), "javascript": ("let x = 5", "console.log(x)")}[language]
    agent.run(code[0], language=language)
    assert agent.run(code[1], language=language).stdout == "5\n"
    error = agent.call("context.checkpoint", id=language).error
    assert error is not None and error["code"] == "unsupported"


def test_runs_of_one_context_are_queued_and_other_streams_go_on(agent: Client) -> None:
    first = started(agent, "import time; time.sleep(0.5); x = 1")
    second = agent.open("context.run", code="x + 1")
    third = agent.open("context.run", code="x + 2")
    assert agent.sh("echo meanwhile").stdout == "meanwhile\n"
    assert outcome(agent.finish(first)) == "ok"
    assert main_text(agent.finish(second)) == "2" and main_text(agent.finish(third)) == "3"


def test_bound_and_asked_environment_are_seen_by_a_run_only(start_agent: StartAgent) -> None:  # late binding
    agent = start_agent("--prestart", "python")
    agent.hello()
    agent.ok("bind", env={"BOUND": "b"})
    code = "import os; (os.environ.get('BOUND'), os.environ.get('ASKED'))"
    assert main_text(agent.run(code, env={"ASKED": "a"})) == "('b', 'a')"
    assert main_text(agent.run(code)) == "('b', None)"


def test_a_prestarted_context_is_there_before_hello(start_agent: StartAgent) -> None:
    agent = start_agent("--prestart", "python")
    agent.hello()
    assert [c["id"] for c in agent.ok("context.list")["contexts"]] == ["python"]


def test_a_session_inherits_nothing_and_is_confined(agent: Client) -> None:  # H5, H8, H16
    code = """
import json, os
fds = {n: os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{n}')}
status = dict(l.split(':', 1) for l in open('/proc/self/status').read().splitlines())
print(json.dumps([fds, status['NoNewPrivs'].strip(), os.getpgrp() == os.getpid(),
                  open('/proc/self/oom_score_adj').read().strip()]))"""
    fds, *facts = json.loads(agent.run(code).stdout)
    assert facts == ["1", True, "500"]
    assert fds.pop("0") == "/dev/null"
    output = {fds.pop("1"), fds.pop("2")}
    own = Path(f"/proc/{agent.process.pid}/fd")
    agents = {os.readlink(fd) for fd in own.iterdir()} - {"anon_inode:[eventpoll]"}  # eventpolls all have one name
    assert len(output & agents) == 2  # the agent has the other ends, which bear the same name
    assert not agents & set(fds.values())


def test_an_interrupt_stops_the_run_and_keeps_the_state(agent: Client) -> None:
    agent.run("x = 7")
    stream = started(agent, "import time\ntime.sleep(100)")
    agent.ok("context.interrupt", id="python")
    assert outcome(agent.finish(stream)) == "interrupted"
    assert main_text(agent.run("x")) == "7"
    agent.ok("context.interrupt", id="python")  # nothing runs: nothing happens
    assert main_text(agent.run("x")) == "7"


def test_cancel_interrupts_a_run_and_drops_a_queued_one(agent: Client) -> None:
    running = started(agent, "import time; time.sleep(100)")
    queued = agent.open("context.run", code="print('never')")
    agent.send(queued, wire.CANCEL)
    assert agent.finish(queued).stdout == ""
    agent.send(running, wire.CANCEL)
    assert outcome(agent.finish(running)) == "interrupted"


def test_a_run_that_ignores_the_interrupt_is_killed_and_the_context_starts_afresh(agent: Client) -> None:
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); x = 1; print('begun', flush=True)"
    stream = agent.open("context.run", code=f"{ignore}\nwhile True: pass")
    agent.wait_output(stream, b"begun")
    agent.send(stream, wire.CANCEL)
    end = agent.finish(stream).ok
    assert end is not None and (end["outcome"], end["signal"]) == ("died", signal.SIGKILL)
    assert end["reason"] == "killed after cancel"
    assert outcome(agent.run("x")) == "error"  # a new namespace, under the same id
    assert [c["id"] for c in agent.ok("context.list")["contexts"]] == ["python"]


@pytest.mark.parametrize(
    ("code", "exit_code", "number"),
    [
        ("import os; print('last', flush=True); os._exit(3)", 3, None),
        ("import os; print('last', flush=True); os.kill(os.getpid(), 9)", None, 9),
        ("import ctypes; print('last', flush=True); ctypes.string_at(0)", None, signal.SIGSEGV),
    ],
)
def test_a_session_that_dies_says_how_and_is_replaced(
    agent: Client, code: str, exit_code: int | None, number: int | None
) -> None:
    answer = agent.run(code)
    assert answer.ok is not None and answer.stdout == "last\n"
    assert (answer.ok["outcome"], answer.ok["exit_code"], answer.ok["signal"]) == ("died", exit_code, number)
    assert main_text(agent.run("1 + 1")) == "2"


def test_a_restart_forgets_and_a_removal_ends(agent: Client) -> None:
    agent.run("x = 1")
    agent.ok("context.restart", id="python")
    assert outcome(agent.run("x")) == "error"
    busy = started(agent, "import time; time.sleep(100)")
    agent.ok("context.restart", id="python")
    end = agent.finish(busy).ok
    assert end is not None and (end["outcome"], end["reason"]) == ("died", "restarted")
    busy = started(agent, "import time; time.sleep(100)")
    queued = agent.open("context.run", code="1")
    agent.ok("context.remove", id="python")
    assert outcome(agent.finish(busy)) == "died"
    error = agent.finish(queued).error
    assert error is not None and error["code"] == "not_found"
    assert agent.ok("context.list") == {"contexts": []}


def test_output_of_an_earlier_runs_orphan_is_not_in_a_later_run(agent: Client) -> None:  # H15, H16
    agent.run("import subprocess; subprocess.Popen(['sh', '-c', 'sleep 0.2; echo late'])")
    agent.sh("sleep 0.5")
    assert agent.run("print('mine')").stdout == "mine\n"
    answer = agent.run("import subprocess; p = subprocess.Popen(['yes']); print('end')")
    assert outcome(answer) == "ok" and "end" in answer.stdout
    agent.run("p.kill()")


@pytest.mark.parametrize(
    "attack",
    [
        "b'\\xff' * 100",  # a length over the cap, an unknown kind
        "frame(1, 9, b'')",
        "frame(1, 2, b'\\1x')",  # DATA is not for sessions
        "frame(99, 4, {'ok': {'outcome': 'ok', 'execution_count': 1}})",  # an END of another stream
        "frame(1, 3, {'type': 'host_says_ok'})",
        "frame(1, 4, b'not json')",
        "frame(1, 4, b'[' * 100000)",
        "frame(1, 4, {'ok': {'outcome': 'excellent', 'execution_count': 1}})",
        "frame(1, 4, {'error': {'code': 'made_up', 'message': 'x'}})",
        "frame(1, 4, {'error': {'code': [], 'message': 'x'}})",
        "frame(1, 4, {'ok': {'outcome': ['ok'], 'execution_count': 1}})",
    ],
)
def test_forged_frames_kill_their_own_session_only(agent: Client, attack: str) -> None:  # H16
    agent.ok("context.create", language="python", id="other")
    agent.run("x = 'kept'", id="other")
    answer = agent.run(f"{FIND_CONTROL}\ncontrol.sendall({attack})\nimport time; time.sleep(100)")
    assert answer.ok is not None and answer.ok["outcome"] == "died"
    assert answer.ok["reason"].startswith("broke the protocol")
    assert main_text(agent.run("x", id="other")) == "'kept'"
    assert main_text(agent.run("1 + 1")) == "2"


def test_descriptors_sent_unasked_are_closed(agent: Client) -> None:  # H16
    agent.run("1")
    fds = f"/proc/{agent.process.pid}/fd"
    before = len(os.listdir(fds))
    send = "socket.send_fds(control, [frame(2, 3, {'type': 'count', 'execution_count': 2})], [0, 1, 2])"
    assert outcome(agent.run(f"{FIND_CONTROL}\n{send}\ncontrol.close()")) == "ok"
    assert len(os.listdir(fds)) == before
    flood = "for i in range(9): socket.send_fds(control, [frame(3, 3, {'type': 'count'})], [0, 1, 2])"
    assert outcome(agent.run(f"{FIND_CONTROL}\n{flood}\nimport time; time.sleep(100)")) == "died"
    agent.run("1")
    assert len(os.listdir(fds)) == before


def test_a_rollback_brings_back_variables_and_workspace_as_often_as_wanted(agent: Client) -> None:
    agent.run("x = [1]\nimport os\nos.mkdir('d'); open('d/kept', 'w').write('old'); os.chmod('d', 0o500)")
    checkpoint = agent.ok("context.checkpoint", id="python")["checkpoint"]
    for attempt in range(3):
        agent.run(f"x.append({attempt}); os.chmod('d', 0o700); open('d/kept', 'w').write('new'); open('extra', 'w')")
        agent.ok("context.rollback", id="python", checkpoint=checkpoint)
        answer = agent.run("x, open('d/kept').read(), os.listdir('.'), oct(os.stat('d').st_mode)[-3:]")
        assert main_text(answer) == "([1], 'old', ['d'], '500')"
    stream = started(agent, "import time; time.sleep(100)")  # the woken copy is a full session
    agent.ok("context.interrupt", id="python")
    assert outcome(agent.finish(stream)) == "interrupted"
    end = agent.run("os._exit(5)").ok
    assert end is not None and (end["outcome"], end["exit_code"]) == ("died", 5)
    agent.ok("context.rollback", id="python", checkpoint=checkpoint)
    assert main_text(agent.run("x")) == "[1]"
    agent.ok("context.remove", id="python")


def test_checkpoints_leave_no_process_or_copy_behind_when_their_context_goes(agent: Client) -> None:
    agent.run("open('f', 'w').write('x')")
    own = f"/proc/{agent.process.pid}/task/{agent.process.pid}/children"
    agent.ok("context.checkpoint", id="python")
    agent.ok("context.checkpoint", id="python")
    agent.ok("context.remove", id="python")
    agent.sh("sleep 0.3")
    with open(own) as children:
        assert children.read() == ""


def test_a_dead_twin_is_said_and_changes_nothing(agent: Client) -> None:
    agent.run("x = 1; open('f', 'w').write('1')")
    checkpoint = agent.ok("context.checkpoint", id="python")["checkpoint"]
    agent.run("x = 2; open('f', 'w').write('2')\nimport os, signal")
    kill = """
for n in map(int, filter(str.isdigit, os.listdir('/proc'))):
    try: same = os.readlink(f'/proc/{n}/fd/1') == os.readlink('/proc/self/fd/1')
    except OSError: continue
    if same and n != os.getpid(): os.kill(n, signal.SIGKILL)"""
    agent.run(kill)
    agent.sh("sleep 0.3")
    error = agent.call("context.rollback", id="python", checkpoint=checkpoint).error
    assert error is not None and error["code"] == "not_found"
    assert main_text(agent.run("x, open('f').read(), os.listdir('.')")) == "(2, '2', ['f'])"


@pytest.mark.root
def test_a_checkpoint_that_does_not_fit_is_refused_and_leaves_nothing(start_agent: StartAgent) -> None:  # H15
    agent = start_agent("--init", "--disk", str(4 << 20))
    agent.hello()
    agent.run("open('f', 'wb').write(bytes(3 << 20)); x = 1")
    error = agent.call("context.checkpoint", id="python").error
    assert error is not None and (error["code"], error["errno"]) == ("file_error", "ENOSPC")
    assert agent.sh("ls -A /tmp | grep -c checkpoint").stdout == "0\n"
    assert main_text(agent.run("x, len(open('f', 'rb').read())")) == f"(1, {3 << 20})"


@pytest.mark.root
def test_a_rollback_that_does_not_fit_is_refused_and_changes_nothing(start_agent: StartAgent) -> None:  # H15
    agent = start_agent("--init", "--disk", str(8 << 20))
    agent.hello()
    agent.run("open('f', 'wb').write(bytes(2 << 20)); x = 1")
    checkpoint = agent.ok("context.checkpoint", id="python")["checkpoint"]
    agent.run("open('g', 'wb').write(bytes(3 << 20)); x = 2")
    error = agent.call("context.rollback", id="python", checkpoint=checkpoint).error
    assert error is not None and (error["code"], error["errno"]) == ("file_error", "ENOSPC")
    assert main_text(agent.run("import os; x, sorted(os.listdir('.'))")) == "(2, ['f', 'g'])"


def test_a_sparse_terabyte_is_refused_before_it_is_read(agent: Client) -> None:  # H12
    agent.sh("truncate -s 1T sparse")
    agent.run("1")
    error = agent.call("context.checkpoint", id="python").error
    assert error is not None and (error["code"], error["errno"]) == ("file_error", "EFBIG")
