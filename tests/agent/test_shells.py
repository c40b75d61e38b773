"""bash and node contexts in real sessions (M4: state between runs; H5, H8)."""

from __future__ import annotations

import os
import select
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fumehood.agent import session as session_module

from .session_driver import Client, Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote([])
    yield made
    made.close()


@pytest.fixture
def bash(zygote: Zygote, tmp_path: Path) -> Iterator[Client]:
    client = zygote.session(tmp_path, "bash")
    yield client
    client.close()


@pytest.fixture
def node(zygote: Zygote, tmp_path: Path) -> Iterator[Client]:
    if shutil.which("node") is None:
        pytest.skip("node is not on PATH: javascript contexts are not offered")
    client = zygote.session(tmp_path, "javascript")
    yield client
    client.close()


def test_languages_are_those_whose_program_is_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert session_module.languages() == ["python"]
    (tmp_path / "node").write_text("#!/bin/sh\n")
    (tmp_path / "node").chmod(0o755)
    assert session_module.languages() == ["python", "javascript"]


def test_bash_keeps_variables_functions_and_directory(bash: Client):
    bash.run("x=5; f() { echo in f; }; cd /usr; declare -A m=([k]=v)")
    answer = bash.run("echo $x ${m[k]}; f; pwd")
    assert (answer.stdout, answer.stderr) == ("5 v\nin f\n/usr\n", "")
    assert answer.end == {"ok": {"execution_count": 2, "outcome": "ok", "exit_code": 0}}


@pytest.mark.parametrize(("code", "status"), [("false", 1), ("(exit 7)", 7), ("if then", 2), ("no-such-program", 127)])
def test_a_failing_bash_run_has_its_exit_code_and_bash_lives_on(bash: Client, code: str, status: int):
    bash.run("x=1")
    answer = bash.run(code)
    assert (answer.outcome, answer.end["ok"]["exit_code"], answer.error["value"]) == ("error", status, str(status))
    assert bash.run("echo $x").stdout == "1\n"


@pytest.mark.parametrize(("code", "status"), [("exit 3", 3), ("set -e; false; echo no", 1), ("kill -9 $$", 137)])
def test_a_bash_that_ends_gives_its_code_and_the_next_run_a_fresh_one(bash: Client, code: str, status: int):
    bash.run("x=1")
    answer = bash.run(code)
    assert (answer.end["ok"]["exit_code"], answer.stdout) == (status, "")
    assert bash.run("echo [$x]; pwd").stdout.startswith("[]\n/")


def test_a_command_that_reads_stdin_gets_nothing_and_not_our_next_line(bash: Client):
    assert bash.run('cat; read y; echo "[$y]"; cat <<EOF\nhere\nEOF\n# comment').stdout == "[]\nhere\n"
    assert bash.run("echo next").stdout == "next\n"


def test_bash_output_streams_live_and_special_characters_survive(bash: Client):
    answer = bash.run("echo 'go'; sleep 300", interrupt_at="go")
    assert answer.outcome == "interrupted"
    assert bash.run("echo \"a'b\" 'c\"d' '$x' '!!' é \\\\").stdout == "a'b c\"d $x !! é \\\n"


@pytest.mark.parametrize(
    "code",
    [
        "sleep 0.1; echo go; sleep 3002",
        "echo go; while :; do :; done",
        "echo go; sleep 3002 | cat",
        "echo go; (sleep 3002; echo NO)",
    ],
)
def test_an_interrupt_ends_the_bash_run_and_what_it_started(bash: Client, code: str):
    bash.run("sleep 0.2")
    answer = bash.run(f"{code}; echo NEXT", interrupt_at="go")
    assert answer.outcome == "interrupted"
    assert answer.error["name"] == "KeyboardInterrupt"
    assert "NEXT" not in answer.stdout
    after = bash.run("echo alive; pgrep -f 'sleep 300[2]' | wc -l")
    assert after.stdout == "alive\n0\n"


def test_a_program_killed_by_a_signal_makes_no_noise_about_terminals(bash: Client):
    assert bash.run("yes | head -1").stderr == ""


def test_bash_env_is_set_for_the_run_and_restored_after_it(bash: Client):
    bash.run("export HAD=old")
    assert bash.run('echo "$HAD|$NEW"; HAD=2', {"HAD": "a'b", "NEW": "c d"}).stdout == "a'b|c d\n"
    assert bash.run('echo "$HAD|${NEW-unset}"').stdout == "old|unset\n"


def test_bash_gives_programs_no_descriptor_of_ours_h5(bash: Client):
    assert bash.run("ls /proc/self/fd | wc -l").stdout == "4\n"  # 0-2 and the listing


def test_bash_and_node_run_no_startup_file_h8(tmp_path: Path):
    ran = tmp_path / "ran"
    for name in (".bashrc", ".bash_profile", ".profile", "env"):
        (tmp_path / name).write_text(f"echo {name} >> {ran}\n")
    (tmp_path / "pre.js").write_text(f"require('fs').writeFileSync({str(ran)!r}, 'js')\n")
    env = {
        "HOME": str(tmp_path),
        "BASH_ENV": str(tmp_path / "env"),
        "ENV": str(tmp_path / "env"),
        "PROMPT_COMMAND": f"touch {ran}",
        "BASH_FUNC_echo%%": f"() {{ touch {ran}; }}",
        "NODE_OPTIONS": f"--require {tmp_path}/pre.js",
    }
    zygote = Zygote([], env)
    for language in [name for name in session_module.languages() if name != "python"]:
        client = zygote.session(tmp_path, language)
        assert client.run({"bash": "echo 1", "javascript": "1"}[language]).outcome == "ok"
        assert not ran.exists()
        client.close()
    zygote.close()


def test_shell_contexts_refuse_a_checkpoint_and_live_on(bash: Client, node: Client):
    for client, code in ((bash, "echo 1"), (node, "1")):
        assert client.request({"verb": "checkpoint"}).end["error"]["code"] == "unsupported"
        assert client.run(code).outcome == "ok"


def test_a_shell_dies_with_its_session(bash: Client):
    pid = int(bash.run("echo $$").stdout)
    pidfd = os.pidfd_open(pid)
    os.kill(bash.pid, 9)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def test_node_keeps_const_let_functions_and_classes(node: Client):
    node.run("const a = 1; let b = {z: 1}; function f() { return a } class K {}; var v = 2")
    assert node.run("[a + f(), b.z, typeof K, v]").main["text/plain"] == "[ 2, 1, 'function', 2 ]"
    assert node.run("const a = 5; a").main["text/plain"] == "5"  # as in a notebook, a cell can be run again


def test_node_shows_the_last_value_and_console_goes_to_the_streams(node: Client):
    answer = node.run("console.log('out'); console.error('err'); ({a: [1]})")
    assert (answer.stdout, answer.stderr) == ("out\n", "err\n")
    assert answer.main == {"text/plain": "{ a: [ 1 ] }", "application/json": {"a": [1]}}
    assert node.run("undefined").results == []
    assert [node.run(c).main["text/plain"] for c in ("'s'", "NaN", "5n", "null", "-0")] == ["'s'", "NaN", "5n", "null", "-0"]


def test_node_awaits_at_top_level_and_imports(node: Client):
    assert node.run("const t = await new Promise(r => setTimeout(() => r(7), 5)); t").main["text/plain"] == "7"
    code = "import fs, { sep as s } from 'path';\nimport * as os from 'node:os';\n[typeof fs.join, s, os.EOL]"
    assert node.run(code).main["application/json"] == ["function", "/", "\n"]
    assert node.run("(await import('node:path')).sep + require('path').sep").main["text/plain"] == "'//'"


@pytest.mark.parametrize(
    ("code", "name", "value"),
    [
        ("throw new TypeError('bad')", "TypeError", "bad"),
        ("await Promise.reject(new Error('no'))", "Error", "no"),
        ("nope", "ReferenceError", "nope is not defined"),
        ("function(", "SyntaxError", "Function statements require a function name"),
        ("throw 5", "Uncaught", "5"),
    ],
)
def test_a_node_error_has_name_value_and_no_frame_of_ours(node: Client, code: str, name: str, value: str):
    answer = node.run(code)
    assert (answer.outcome, answer.error["name"], answer.error["value"]) == ("error", name, value)
    assert "Session.post" not in answer.error["traceback"]
    assert node.run("1").main["text/plain"] == "1"


def test_process_exit_gives_its_code_and_the_next_run_a_fresh_node(node: Client):
    node.run("var x = 1")
    assert node.run("process.exit(4)").end["ok"]["exit_code"] == 4
    assert node.run("typeof x").main["text/plain"] == "'undefined'"


def test_an_error_between_runs_is_on_stderr_and_node_lives_on(node: Client):
    first = node.run("setTimeout(() => { throw new Error('later') }, 5); null")
    then = node.run("await new Promise(r => setTimeout(r, 50)); 1")
    assert "Uncaught Error: later" in first.stderr + then.stderr
    assert then.main["text/plain"] == "1"


@pytest.mark.parametrize("code", ["while (true) {}", "await new Promise(() => {})"])
def test_an_interrupt_ends_the_node_run_and_the_state_stays(node: Client, code: str):
    answer = node.run(f"let keep = 3; console.log('go'); {code}", interrupt_at="go")
    assert (answer.outcome, answer.error["name"]) == ("interrupted", "KeyboardInterrupt")
    assert node.run("keep").main["text/plain"] == "3"


def test_node_env_is_set_for_the_run_and_restored_after_it(node: Client):
    assert node.run("process.env.NEW", {"NEW": "a'b"}).main["text/plain"] == '"a\'b"'
    assert node.run("process.env.NEW").results == []
