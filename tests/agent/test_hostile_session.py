"""What user code says on its own session's control socket costs it that session at most (H16)."""

from __future__ import annotations

import pytest

from .conftest import Client

SESSION = "import gc\nsession = next(o for o in gc.get_objects() if type(o).__name__ == 'Session')\n"

NAMES = """\
import os
home = os.getcwd()
for _ in range(15):
    os.mkdir(b"\\xff" * 240)
    os.chdir(b"\\xff" * 240)
for n in range(1000):
    open(b"\\xff" * 100 + b"%d" % n, "w").close()
os.chdir(home)"""


def goes_on(agent: Client) -> None:
    assert agent.sh("echo on").stdout == "on\n"
    agent.ok("context.create", id="other", language="python", cwd="")
    assert agent.run("print('too')", id="other").stdout == "too\n"


def test_a_twin_with_a_number_that_no_process_can_have_is_none(agent: Client) -> None:
    claims = """
import socket, threading
ours, theirs = socket.socketpair()
def fork(self, request):
    self._end({"ok": {"pid": 1 << 40}}, [ours.fileno()])
    ours.close()
    threading.Timer(0.1, theirs.close).start()
type(session)._fork = fork"""
    assert agent.run(SESSION + claims).ok
    answer = agent.call("context.checkpoint", id="python")
    assert answer.error is not None and answer.error["code"] == "not_found"
    agent.run("import time; time.sleep(0.3)")
    goes_on(agent)


def test_an_error_too_long_for_a_frame_is_cut(agent: Client) -> None:
    """What takes two bytes in the session's frame takes six in the agent's."""
    says = """
import json
from fumehood.agent import wire
said = {"error": {"code": "internal", "message": "\\u00e9" * 8_000_000}}
session._control.sendall(wire.encode(session._stream, wire.END, json.dumps(said, ensure_ascii=False).encode()))"""
    answer = agent.run(SESSION + says)
    assert answer.error is not None and len(answer.error["message"]) == 4096
    goes_on(agent)


def test_a_run_that_changed_files_with_names_too_long_for_a_frame_ends_all_the_same(agent: Client) -> None:
    """A byte that is no UTF-8 takes six."""
    answer = agent.run(NAMES)
    assert answer.error is not None and "over" in answer.error["message"]
    goes_on(agent)


@pytest.mark.parametrize("odd", ["", "x"])
def test_a_program_whose_name_is_cut_in_the_middle_of_a_character_is_not_found(agent: Client, odd: str) -> None:
    answer = agent.call("exec.start", argv=[odd + "\u00e9" * 150])
    assert answer.error is not None and answer.error["code"] in ("not_found", "invalid")
    answer = agent.call("exec.start", argv=["true"], cwd="/" + odd + "\u00e9" * 150)
    assert answer.error is not None and answer.error["code"] == "invalid"
    goes_on(agent)


def test_a_program_that_changed_files_with_names_too_long_for_a_frame_ends_all_the_same(agent: Client) -> None:
    assert agent.run("import os, sys\nopen('code.py', 'w').write(" + repr(NAMES) + ")").ok
    answer = agent.call("exec.start", argv=["python3", "code.py"])
    assert answer.error is not None and "over" in answer.error["message"]
    goes_on(agent)
