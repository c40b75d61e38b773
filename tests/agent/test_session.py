"""session_main in real forked children: M4 (contexts that keep state), M5 (output), H5, H8, H16, H20."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fumehood.agent import wire

from .session_driver import Client, Zygote

ZYGOTES = {"notebook": ["json"], "plain": ["no-ipython"], "cold": []}


@pytest.fixture(scope="module", params=ZYGOTES)
def zygote(request: pytest.FixtureRequest) -> Iterator[Zygote]:
    made = Zygote(ZYGOTES[request.param])
    yield made
    made.close()


@pytest.fixture(scope="module")
def notebook_zygote() -> Iterator[Zygote]:
    made = Zygote(["numpy"])
    yield made
    made.close()


@pytest.fixture
def session(zygote: Zygote, tmp_path: Path) -> Iterator[Client]:
    client = zygote.session(tmp_path)
    yield client
    client.close()


@pytest.fixture
def notebook(notebook_zygote: Zygote, tmp_path: Path) -> Iterator[Client]:
    client = notebook_zygote.session(tmp_path)
    yield client
    client.close()


def test_variables_imports_and_functions_stay_between_runs(session: Client):
    session.run("import math\ndef area(r):\n    return math.pi * r * r")
    assert session.run("x = area(1)").outcome == "ok"
    assert session.run("round(x, 3)").main["text/plain"] == "3.142"


def test_every_run_starts_with_its_count_and_ends_with_it(session: Client):
    for n in (1, 2, 3):
        answer = session.run("None")
        assert answer.events == [{"type": "count", "execution_count": n}]
        assert answer.end == {"ok": {"outcome": "ok", "execution_count": n}}


def test_a_cell_without_output_is_one_message_to_the_agent(session: Client):
    session.run("1")
    session.control.sendall(wire.encode_json(9, wire.OPEN, {"verb": "run", "code": "6 * 7"}))
    frames = wire.Decoder().feed(session.control.recv(1 << 16))
    assert [frame.kind for frame in frames] == [wire.EVENT, wire.EVENT, wire.END]


def test_only_the_last_expression_is_the_main_result(session: Client):
    answer = session.run("1\n2\ndisplay('shown')\n3")
    assert [(e["is_main_result"], e["data"]["text/plain"]) for e in answer.events if e["type"] == "result"] == [
        (False, "'shown'"),
        (True, "3"),
    ]


def test_a_semicolon_hides_the_last_value(session: Client):
    assert session.run("1 + 1;").results == []


def test_output_is_in_order_with_subprocesses_even_without_a_newline(session: Client):
    answer = session.run(
        "import subprocess\nfor i in range(20):\n    print(i, end='')\n    subprocess.run(['echo', '-n', f'<{i}>'])"
    )
    assert answer.stdout == "".join(f"{i}<{i}>" for i in range(20))


def test_output_arrives_while_the_cell_runs(session: Client):
    # The interrupt is sent when 'live' has been read; a held-back output would end in the driver's deadline.
    answer = session.run("print('live', end='')\nimport time\ntime.sleep(300)", interrupt_at="live")
    assert answer.outcome == "interrupted"


def test_a_megabyte_of_output_is_whole(session: Client):
    assert session.run("print('x' * 3_000_000, end='')").stdout == "x" * 3_000_000


def test_text_that_utf8_can_not_hold_is_escaped_and_not_an_error(session: Client):
    assert session.run("print('\\udcff é')").stdout == "\\udcff é\n"


def test_an_exception_is_an_event_with_name_value_and_plain_traceback(session: Client):
    answer = session.run("def f():\n    return 1 / 0\nf()")
    assert answer.outcome == "error"
    assert (answer.error["name"], answer.error["value"]) == ("ZeroDivisionError", "division by zero")
    assert "return 1 / 0" in answer.error["traceback"]
    assert "\x1b[" not in answer.error["traceback"]
    assert "fumehood/agent" not in answer.error["traceback"]


def test_a_syntax_error_is_an_error_and_the_session_lives_on(session: Client):
    assert session.run("x = (").error["name"] == "SyntaxError"
    assert session.run("2").main["text/plain"] == "2"


def test_an_exception_group_shows_its_members_and_no_frame_of_ours(session: Client):
    answer = session.run("raise ExceptionGroup('both', [ValueError('a'), KeyError('b')])")
    assert "ValueError: a" in answer.error["traceback"] and "KeyError: 'b'" in answer.error["traceback"]
    assert "fumehood/agent" not in answer.error["traceback"]


def test_an_exception_whose_str_raises_is_still_reported(session: Client):
    answer = session.run("class E(Exception):\n    def __str__(self):\n        raise KeyError('x')\nraise E()")
    assert answer.outcome == "error"
    assert answer.error["name"] == "E"


def test_code_after_an_exception_does_not_run(session: Client):
    assert session.run("print('a')\nraise ValueError\nprint('b')").stdout == "a\n"


@pytest.mark.parametrize(
    ("code", "outcome", "status"),
    [
        ("import sys; sys.exit()", "ok", 0),
        ("import sys; sys.exit(0)", "ok", 0),
        ("raise SystemExit(3)", "error", 3),
        ("import sys; sys.exit('why')", "error", 1),
        ("import sys\nasync def f(): sys.exit(4)\nawait f()", "error", 4),
    ],
)
def test_exit_ends_the_cell_with_its_code_and_not_the_session(session: Client, code: str, outcome: str, status: int):
    answer = session.run("keep = 1\n" + code)
    assert (answer.outcome, answer.end["ok"]["exit_code"]) == (outcome, status)
    assert [e["name"] for e in answer.events if e["type"] == "error"] == ["SystemExit"] * (outcome == "error")
    assert answer.stderr == ("why\n" if "why" in code else "")
    assert session.run("keep").main["text/plain"] == "1"


def test_input_says_that_nobody_answers(session: Client):
    answer = session.run("input('name? ')")
    assert answer.error["name"] == "StdinNotImplementedError"
    assert "name? " in answer.error["value"]
    assert session.run("import sys; sys.stdin.read()").main["text/plain"] == "''"


@pytest.mark.parametrize(
    "code",
    [
        "print('go')\nwhile True: pass",
        "print('go')\nimport time\ntime.sleep(300)",
        "print('go')\nimport subprocess\nsubprocess.run(['sleep', '300'])",
        "import asyncio\nasyncio.get_running_loop().call_later(0.05, print, 'go')\nawait asyncio.sleep(300)\nprint('zombie')",
        "def f():\n    yield\n    while True: pass\nprint('go')\nlist(f())",
        "import threading\nprint('go')\nthreading.Event().wait()",
    ],
)
def test_sigint_interrupts_a_run_and_the_state_stays(session: Client, code: str):
    session.run("keep = [1]")
    answer = session.run(code, interrupt_at="go")
    assert answer.outcome == "interrupted", answer
    assert "fumehood/agent" not in answer.error["traceback"]
    after = session.run("import asyncio\nawait asyncio.sleep(0.05)\nkeep")
    assert (after.main["text/plain"], after.stdout) == ("[1]", "")


def test_an_interrupt_that_user_code_turns_into_an_error_is_an_interrupt(session: Client):
    code = "import time\ntry:\n    print('go')\n    time.sleep(300)\nexcept KeyboardInterrupt:\n    raise ValueError('cut')"
    answer = session.run(code, interrupt_at="go")
    assert (answer.outcome, answer.error["name"]) == ("interrupted", "ValueError")
    assert session.run("1 / 0").outcome == "error"


def test_sigint_between_runs_is_ignored(session: Client):
    session.run("x = 1")
    for _ in range(20):
        os.kill(session.pid, signal.SIGINT)
    session.request({"verb": "nothing"})  # one that is handled only when the run is there would be the run's
    assert session.run("x").main["text/plain"] == "1"


def test_a_sigint_that_overtakes_its_run_still_interrupts_it(zygote: Zygote, tmp_path: Path):
    # The agent interrupts a request that it has written; the session, just forked or stopped, has not read it yet.
    client = zygote.session(tmp_path)
    client.run("1")
    for _ in range(5):
        os.kill(client.pid, signal.SIGSTOP)
        client.stream += 1
        run = {"verb": "run", "code": "import time\ntime.sleep(300)", "env": {}}
        client.control.sendall(wire.encode_json(client.stream, wire.OPEN, run))
        os.kill(client.pid, signal.SIGINT)
        os.kill(client.pid, signal.SIGCONT)
        assert client.answer().outcome == "interrupted"
    client.close()


def test_a_storm_of_interrupts_never_breaks_the_frames(session: Client):
    # Each display() writes a frame much larger than the socket's buffer, so that signals fall into the middle of writes.
    for _ in range(10):
        answer = session.run("print('go')\nwhile True:\n    display('x' * 2_000_000)", interrupt_at="go")
        assert answer.outcome == "interrupted", answer.events[-2:]
    assert session.run("1").main["text/plain"] == "1"


def test_a_handler_of_sigint_that_user_code_set_is_gone_in_the_next_run(session: Client):
    session.run("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert session.run("print('go')\nimport time\ntime.sleep(300)", interrupt_at="go").outcome == "interrupted"


def test_env_is_set_for_the_run_and_restored_after_it(session: Client):
    session.run("import os\nos.environ['HAD'] = 'old'")
    code = "os.environ['HAD'], os.environ['NEW'], __import__('subprocess').getoutput('echo $NEW')"
    assert session.run(code, {"HAD": "1", "NEW": "a b"}).main["text/plain"] == "('1', 'a b', 'a b')"
    assert session.run("os.environ['HAD'], os.environ.get('NEW')").main["text/plain"] == "('old', None)"
    session.run("1/0", {"NEW": "x"})
    assert session.run("os.environ.get('NEW') is None").main["text/plain"] == "True"


@pytest.mark.parametrize(
    "request_",
    [
        {"verb": "no"},
        {"verb": []},
        {},
        {"verb": "run"},
        {"verb": "run", "code": 1},
        {"verb": "run", "code": "1", "env": {"A=B": "x"}},
        {"verb": "run", "code": "1", "env": {"A": 1}},
        {"verb": "run", "code": "1", "env": {"A": "\ud800"}},
        {"verb": "run", "code": "1", "env": []},
        {"verb": "wake"},
    ],
)
def test_a_bad_request_is_refused_and_the_session_lives_on(session: Client, request_: dict[str, object]):
    assert session.request(request_).end["error"]["code"] == "invalid"
    assert session.run("1").main["text/plain"] == "1"


def test_a_checkpoint_can_be_rolled_back_to_many_times(session: Client):
    session.run("state = {'n': 1}\nimport asyncio\nawait asyncio.sleep(0)")
    twin = session.fork("checkpoint")
    session.run("state['n'] = 2")
    assert session.run("state['n']").main["text/plain"] == "2"
    for _ in range(3):
        live = twin.fork("wake")
        assert live.run("state['n']").main["text/plain"] == "1"
        live.run("state['n'] = 99\nawait asyncio.sleep(0)")
        assert live.run("print('go')\nwhile True: pass", interrupt_at="go").outcome == "interrupted"
        assert live.run("import os; os.getpid() == os.getpgrp()").main["text/plain"] == "True"
        live.close()
    assert session.run("state['n']").main["text/plain"] == "2"
    assert twin.request({"verb": "run", "code": "1"}).end["error"]["code"] == "invalid"
    twin.close()


def test_a_checkpoint_outlives_its_session_and_ends_with_its_socket(session: Client):
    session.run("x = 5")
    twin = session.fork("checkpoint")
    os.kill(session.pid, signal.SIGKILL)
    live = twin.fork("wake")
    assert live.run("x").main["text/plain"] == "5"
    pidfd = os.pidfd_open(twin.pid)
    twin.control.close()
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)
    live.close()


def test_a_session_ends_when_the_agent_closes_its_socket(session: Client):
    session.run("1")
    pidfd = os.pidfd_open(session.pid)
    session.control.close()
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_a_child_that_user_code_forks_can_not_answer_for_it_h16(session: Client):
    answer = session.run("import os\nif os.fork() == 0:\n    display('child')\nelse:\n    os.wait()\n    display('parent')")
    assert [r["text/plain"] for r in answer.results] == ["'parent'"]
    assert session.run("1").main["text/plain"] == "1"


def test_user_code_finds_no_descriptor_but_0_to_2_and_the_control_socket_h5(session: Client):
    found = session.run("import os\nprint(sorted(int(f) for f in os.listdir('/proc/self/fd')))").stdout
    assert len(eval(found)) == 5  # 0-2, control, and the listing itself
    assert session.run("import subprocess\nsubprocess.getoutput('ls /proc/self/fd | wc -l')").main["text/plain"] == "'4'"


def test_two_forks_of_one_zygote_draw_different_random_numbers_h20(notebook_zygote: Zygote, tmp_path: Path):
    code = "import random, numpy\n(random.random(), numpy.random.rand())"
    clients = [notebook_zygote.session(tmp_path) for _ in range(3)]
    drawn = [eval(c.run(code).main["text/plain"].replace("np.float64", "")) for c in clients]
    assert len({d[0] for d in drawn}) == len({float(d[1]) for d in drawn}) == 3
    for client in clients:
        client.close()


def test_pickle_and_modules_beside_the_files_work_as_in_a_notebook(session: Client, tmp_path: Path):
    (tmp_path / "mine.py").write_text("X = 7\n")
    assert session.run("import mine\nmine.X").main["text/plain"] == "7"
    session.run("import pickle\nclass K:\n    pass")
    assert session.run("type(pickle.loads(pickle.dumps(K()))) is K").main["text/plain"] == "True"


def test_user_code_that_replaces_or_closes_stdout_can_not_stop_the_session(session: Client):
    session.run("import sys, io\nsys.stdout = io.StringIO()\nprint('lost')")
    assert session.run("sys.stdout = sys.__stdout__\nprint('back')").stdout == "back\n"
    session.run("sys.stdout.close()")
    assert session.run("1").main["text/plain"] == "1"


def test_a_bad_directory_or_language_ends_the_session_with_a_reason(zygote: Zygote, tmp_path: Path):
    for cwd, language, said in ((tmp_path / "none", "python", "No such file"), (tmp_path, "cobol", "cobol")):
        client = zygote.session(cwd, language)
        assert client.control.recv(1) == b""
        assert said in os.read(client.err, 4096).decode()
        client.close()


# What only the notebook has.


def test_magics_shell_commands_and_exit_work_as_in_a_notebook(notebook: Client, tmp_path: Path):
    assert notebook.run("!echo out; echo err >&2; exit 3").stdout == "out\n"
    assert notebook.run("_exit_code").main["text/plain"] == "3"
    assert notebook.run("name = 'x'\n!echo {name} $name").stdout == "x x\n"
    assert notebook.run("files = !printf 'a\\nb'\nlist(files)").main["application/json"] == ["a", "b"]
    assert notebook.run("%cd -q /\nimport os\nos.getcwd()").main["text/plain"] == "'/'"
    assert notebook.run("%%bash\necho from bash").stdout == "from bash\n"
    assert "Wall time" in notebook.run("%time 1").stdout
    assert notebook.run("exit").end["ok"]["exit_code"] == 0
    assert notebook.run("quit(2)").end["ok"]["exit_code"] == 2
    assert notebook.run("    x = 1\n    x + 1").main["text/plain"] == "2"
    assert notebook.run("len?").results or notebook.run("len?").stdout


def test_an_unknown_magic_and_a_failing_cell_magic_are_errors(notebook: Client):
    assert notebook.run("%nothing").error["name"] == "UsageError"
    assert notebook.run("%%time\n1/0").outcome == "error"


def test_an_interrupted_shell_command_ends_with_its_children(notebook: Client):
    answer = notebook.run("!echo go; sleep 3001 | cat\nprint('next')", interrupt_at="go")
    assert (answer.outcome, answer.stdout) == ("interrupted", "go\n")
    assert notebook.run("!pgrep -f 'sleep 300[1]' | wc -l").stdout.strip() == "0"


def test_out_and_underscore_are_kept(notebook: Client):
    notebook.run("40 + 2")
    assert notebook.run("_ + Out[1]").main["text/plain"] == "84"


@pytest.mark.parametrize("modules", [["matplotlib"], [], ["no-ipython"]], ids=["preloaded", "cold", "plain"])
def test_nothing_that_a_user_controls_runs_at_start_h8(tmp_path: Path, modules: list[str]):
    home, ran = tmp_path / "home", tmp_path / "ran"
    evil = f"open({str(ran)!r}, 'a').write(__file__ + '\\n')\n"
    startup = home / ".ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text(evil)
    (home / ".ipython/profile_default/ipython_config.py").write_text(evil)
    (home / "rc.py").write_text(evil)
    for name in ("sitecustomize", "usercustomize", "IPython_config", "matplotlibrc"):
        (home / f"{name}.py").write_text(evil)
    (home / "matplotlibrc").write_text("axes.titlesize: 77\n")
    (home / "evil.pth").write_text(f"import sys; open({str(ran)!r}, 'a')\n")
    env = {"HOME": str(home), "IPYTHONDIR": str(home / ".ipython"), "PYTHONSTARTUP": str(home / "rc.py")}
    zygote = Zygote(modules, {**env, "VIRTUAL_ENV": str(home)}, cwd=str(home))
    client = zygote.session(home)
    assert client.run("1 + 1").main["text/plain"] == "2"
    assert not ran.exists()
    before = {p for p in home.rglob("*") if ".cache" not in p.parts}
    client.run("'kept nowhere'")
    assert {p for p in home.rglob("*") if ".cache" not in p.parts} == before  # no history, no profile
    if modules == ["matplotlib"]:
        assert client.run("import matplotlib\nmatplotlib.rcParams['axes.titlesize']").main["text/plain"] == "'large'"
    client.close()
    zygote.close()


def test_the_agents_half_imports_with_the_stdlib_alone(tmp_path: Path):
    code = (
        "import sys; before = set(sys.modules)\n"
        "from fumehood.agent import session, shells, python, rich, chart, wire\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names | {'fumehood'}])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
