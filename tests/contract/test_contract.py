"""What a user may rely on whatever the tier: M11's last three places, as guarantees."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fumehood import AsyncSandbox, Sandbox
from fumehood.agent.wire import MAX_JSON_ITEMS
from fumehood.errors import FileFault, InvalidInput, InvalidTransition, NotFound, SandboxGone

Where = dict[str, Any]  # keyword arguments that say where a sandbox runs


def until(done: Callable[[], bool], patience_s: float = 20) -> None:
    deadline = time.monotonic() + patience_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_last_expression_is_the_text_and_state_is_kept(box: Sandbox) -> None:
    assert box.run("x = 20").status == "ok"
    result = box.run("x + 1")
    assert (result.status, result.text, result.exit_code) == ("ok", "21", 0)


def test_output_and_error_streams_are_told_apart(box: Sandbox) -> None:
    result = box.run("import sys; print('out'); print('err', file=sys.stderr)")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


def test_output_of_child_processes_is_captured_in_order(box: Sandbox) -> None:
    result = box.run("import subprocess\nprint('a', flush=True)\nsubprocess.run(['echo', 'b'])\nprint('c')")
    assert result.stdout == "a\nb\nc\n"


def test_a_failing_program_is_a_result_with_its_traceback(box: Sandbox) -> None:
    result = box.run("def f():\n    return 1 / 0\nf()")
    assert result.status == "error" and result.error is not None
    assert result.error.name == "ZeroDivisionError" and "in f" in result.error.traceback


def test_a_syntax_error_is_a_result(box: Sandbox) -> None:
    result = box.run("def (:")
    assert result.status == "error" and result.error is not None and result.error.name == "SyntaxError"


def test_empty_code_is_ok(box: Sandbox) -> None:
    assert box.run("").status == "ok"


def test_exit_codes_of_programs_are_theirs(box: Sandbox) -> None:
    assert box.exec(["sh", "-c", "exit 7"]).exit_code == 7
    assert box.exec("exit 3").status == "error"
    assert box.exec("true").status == "ok"


def test_a_program_that_dies_of_a_signal_says_which(box: Sandbox) -> None:
    result = box.exec("kill -SEGV $$")
    assert result.status == "error" and "signal 11" in result.cause


def test_stdin_reaches_the_program(box: Sandbox) -> None:
    assert box.exec(["tr", "a-z", "A-Z"], stdin=b"quiet").stdout == "QUIET"


def test_a_missing_program_is_a_typed_error(box: Sandbox) -> None:
    with pytest.raises((NotFound, InvalidInput)):
        box.exec(["no-such-program-here"])


def test_env_of_sandbox_and_of_run_reach_code_and_only_these(where: Where) -> None:
    with Sandbox(**where, env={"TOKEN": "sandbox"}) as box:
        code = "import os; print(os.environ.get('TOKEN'), os.environ.get('CALL'), 'PYTHONPATH' in os.environ)"
        assert box.run(code, env={"CALL": "run"}).stdout == "sandbox run False\n"
        assert box.run(code).stdout == "sandbox None False\n"
        assert box.exec("echo $TOKEN $CALL", env={"CALL": "c"}).stdout == "sandbox c\n"


def test_output_streams_to_the_callback_before_the_end(box: Sandbox) -> None:
    seen: list[tuple[str, float]] = []
    started = time.monotonic()
    box.run(
        "import time\nprint('first')\ntime.sleep(0.5)\nprint('second')", on_stdout=lambda t: seen.append((t, time.monotonic()))
    )
    assert "".join(t for t, _ in seen) == "first\nsecond\n"
    assert seen[0][1] - started < seen[-1][1] - started - 0.3


def test_a_deadline_ends_the_run_and_the_sandbox_lives(box: Sandbox) -> None:
    started = time.monotonic()
    result = box.run("while True: pass", timeout_s=0.5)
    elapsed = time.monotonic() - started
    assert result.status == "timeout" and "0.5 s" in result.cause
    assert 0.5 <= elapsed < 0.5 + 0.25  # H17: the stated deadline, not twice of it
    assert box.run("1 + 1").text == "2"


def test_a_deadline_ends_a_program_that_ignores_signals(box: Sandbox) -> None:
    result = box.exec("trap '' TERM INT HUP; while :; do sleep 0.05; done", timeout_s=2)
    assert result.status == "timeout"
    assert box.exec("echo alive").stdout == "alive\n"


def test_a_longer_timeout_than_the_sandbox_allows_is_refused(where: Where) -> None:
    with Sandbox(**where, limits={"timeout_s": 2}) as box, pytest.raises(InvalidInput):
        box.run("1", timeout_s=3)


def test_output_is_truncated_at_the_limit_and_marked(where: Where) -> None:
    with Sandbox(**where, limits={"output_bytes": 1000}) as box:
        result = box.run("print('x' * 5000)")
        assert result.status == "ok" and result.stdout_truncated and len(result.stdout) == 1000


def test_an_output_flood_is_ended_and_named(where: Where) -> None:
    with Sandbox(**where, limits={"output_kill_bytes": 1 << 20}) as box:
        assert box.run("while True: print('y' * 1000)").status == "output_limit"
        assert box.exec("yes").status == "output_limit"


def test_a_line_without_end_is_captured_up_to_the_limit(box: Sandbox) -> None:
    result = box.exec("head -c 3000000 /dev/zero | tr '\\0' z")
    assert result.stdout_truncated and len(result.stdout) == 1 << 20


def test_contexts_are_separate_and_can_be_restarted_and_removed(box: Sandbox) -> None:
    a, b = box.contexts.create(), box.contexts.create()
    box.run("v = 'a'", context=a.id)
    assert box.run("'v' in globals()", context=b.id).text == "False"
    box.contexts.restart(a.id)
    assert box.run("'v' in globals()", context=a.id).text == "False"
    assert {a.id, b.id} <= {c.id for c in box.contexts.list()}
    box.contexts.remove(b.id)
    with pytest.raises(NotFound):
        box.run("1", context=b.id)


def test_bash_contexts_keep_variables_and_directory(box: Sandbox) -> None:
    box.run("cd /tmp; word=kept", language="bash")
    assert box.run("echo $word $PWD", language="bash").stdout.startswith("kept ")


def test_an_unknown_language_is_a_typed_error(box: Sandbox) -> None:
    with pytest.raises(InvalidInput):
        box.run("1", language="cobol")


def test_an_interrupt_ends_the_run_and_keeps_the_state(box: Sandbox) -> None:
    context = box.contexts.create()
    box.run("kept = 1", context=context.id)
    threading.Timer(0.3, lambda: box.contexts.interrupt(context.id)).start()
    result = box.run("import time; time.sleep(20)", context=context.id)
    assert result.status == "error" and result.error is not None and result.error.name == "KeyboardInterrupt"
    assert box.run("kept", context=context.id).text == "1"


def test_files_round_trip_stream_and_list(box: Sandbox, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    box.files.write("a/b.bin", data)
    assert box.files.read("a/b.bin") == data
    assert [e.path.rsplit("/", 1)[1] for e in box.files.list("a")] == ["b.bin"]
    box.files.move("a/b.bin", "c.bin")
    assert box.files.exists("c.bin") and not box.files.exists("a/b.bin")
    box.files.download("c.bin", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    box.files.upload(tmp_path, "up")
    assert box.files.read("up/out") == data
    box.files.remove("c.bin")
    with pytest.raises(NotFound):
        box.files.read("c.bin")


def test_file_names_that_are_not_utf8_survive(box: Sandbox) -> None:
    box.run("import os; open(b'caf\\xe9\\n', 'w').write('x')")
    entry = next(e for e in box.files.list() if e.name.startswith("caf"))
    assert entry.name == "caf\udce9\n" and box.files.read(entry.path) == b"x"


def test_bad_paths_are_typed_errors(box: Sandbox) -> None:
    for bad in ("", "a\0b"):
        with pytest.raises(InvalidInput):
            box.files.read(bad)
    with pytest.raises((FileFault, InvalidInput)):
        box.files.read("/")


def test_a_watcher_sees_an_upload_as_three_events(box: Sandbox) -> None:
    watch = box.files.watch("~")
    box.files.write("new.txt", "hello")
    seen = [next(iter(watch)).change for _ in range(3)]
    watch.close()
    assert seen == ["create", "chmod", "write"]


def test_changes_are_reported(box: Sandbox) -> None:
    box.files.write("old.txt", "1")
    result = box.run("open('new.txt', 'w').write('12'); open('old.txt', 'a').write('2')")
    kinds = {c.path.rsplit("/", 1)[1]: c.kind for c in result.changes}
    assert kinds == {"new.txt": "created", "old.txt": "modified"}


def test_checkpoint_and_rollback_restore_variables_and_files(box: Sandbox) -> None:
    box.run("v = 'before'; open('f.txt', 'w').write('before')")
    mark = box.checkpoint()
    for _ in range(2):  # a checkpoint can be gone back to many times
        box.run("v = 'after'; open('f.txt', 'w').write('after')")
        box.rollback(mark)
        assert box.run("v, open('f.txt').read()").text == "('before', 'before')"


def test_background_processes_stream_take_input_and_signals(box: Sandbox) -> None:
    cat = box.start(["cat"])
    cat.write(b"ping\n")
    assert next(iter(cat)) == ("stdout", b"ping\n")
    assert cat.pid in [p["pid"] for p in box.processes()]
    cat.close_stdin()
    assert cat.wait().exit_code == 0
    sleeper = box.start(["sleep", "60"])
    sleeper.signal(signal.SIGTERM)
    assert sleeper.wait().signal == signal.SIGTERM


def test_a_terminal_has_a_size_and_can_be_resized(box: Sandbox) -> None:
    shell = box.start(["bash", "-c", "stty size; read; stty size"], pty=(30, 90))
    seen = next(iter(shell))[1]
    shell.resize(40, 100)
    shell.write(b"\n")
    seen += b"".join(data for _, data in shell)
    assert b"30 90" in seen and b"40 100" in seen


def test_a_program_finds_the_packages_that_code_finds(box: Sandbox) -> None:
    found = box.run("import IPython; IPython.__version__").text
    assert found and box.exec("python -c 'import IPython; print(repr(IPython.__version__))'").stdout.strip() == found


def test_pause_stops_the_code_and_resume_continues_it(box: Sandbox) -> None:
    ticker = box.start(["bash", "-c", "while :; do echo >> ~/n; sleep 0.01; done"])
    until(lambda: box.files.exists("n"))
    box.pause()
    with pytest.raises(InvalidTransition):
        box.pause()
    with pytest.raises(InvalidTransition, match="paused"):
        box.run("1")
    frozen = box.stats().usage.cpu_s
    time.sleep(0.3)
    assert box.stats().usage.cpu_s == pytest.approx(frozen, abs=0.02)
    box.resume()
    before = box.files.stat("n").size
    until(lambda: box.files.stat("n").size > before)
    ticker.signal(signal.SIGKILL)


def test_after_kill_every_call_says_that_it_is_gone(box: Sandbox) -> None:
    box.kill()
    with pytest.raises(SandboxGone):
        box.run("1")
    with pytest.raises(SandboxGone):
        box.files.read("x")


def test_a_sandbox_that_is_killed_ends_the_run_with_its_cause(box: Sandbox) -> None:
    threading.Timer(0.3, box.kill).start()
    result = box.run("import time; time.sleep(20)")
    assert result.status == "killed" and result.cause


def test_usage_is_the_hosts_own_measure(box: Sandbox) -> None:
    result = box.run("from time import process_time as cpu_s\nuntil = cpu_s() + 0.3\nwhile cpu_s() < until: pass")
    assert 0.1 < result.usage.cpu_s < 2 and result.usage.wall_s >= 0.1
    assert result.usage.peak_memory_bytes > 1 << 20


def test_rich_results_come_by_mime_type(box: Sandbox) -> None:
    result = box.run("from IPython.display import HTML, display\ndisplay(HTML('<b>x</b>'))\n{'k': 1}")
    assert result.results[0].data["text/html"] == "<b>x</b>" and not result.results[0].is_main_result
    assert result.results[-1].is_main_result and result.results[-1].data["application/json"] == {"k": 1}


def test_code_that_is_too_large_or_has_a_nul_is_refused_and_nothing_is_lost(box: Sandbox) -> None:
    box.run("kept = 1")
    for bad in ("#" * (10 << 20), "a\0b"):
        with pytest.raises(InvalidInput):
            box.run(bad)
    assert box.run("kept").text == "1"


def test_a_sandbox_reports_each_protection(box: Sandbox) -> None:
    assert box.protections and all(p.state in ("enforced", "degraded", "off") for p in box.protections)


def test_threads_may_share_a_sandbox(box: Sandbox) -> None:
    found: list[str | None] = []
    contexts = [box.contexts.create() for _ in range(4)]
    threads = [
        threading.Thread(target=lambda c=c, n=n: found.append(box.run(f"{n} * {n}", context=c.id).text))
        for n, c in enumerate(contexts)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(map(str, found)) == ["0", "1", "4", "9"]


async def test_async_sandboxes_run_at_once_and_cancel(where: Where) -> None:
    async with AsyncSandbox(**where) as a, AsyncSandbox(**where) as b:
        results = await asyncio.gather(a.run("1"), b.run("2"))
        assert [r.text for r in results] == ["1", "2"]
        running = asyncio.create_task(a.run("import time; time.sleep(30)"))
        await asyncio.sleep(0.3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await a.run("3")).text == "3"


async def test_async_callbacks_may_be_coroutines(where: Where) -> None:
    seen: list[str] = []

    async def note(text: str) -> None:
        await asyncio.sleep(0)
        seen.append(text)

    async with AsyncSandbox(**where) as box:
        await box.run("print('hello')", on_stdout=note)
    assert "".join(seen) == "hello\n"


def test_closing_twice_is_harmless(where: Where) -> None:
    box = Sandbox(**where).open()
    box.close()
    box.close()
    with pytest.raises(InvalidTransition):
        box.run("1")


def test_its_lifetime_ends_a_sandbox(where: Where) -> None:
    with Sandbox(**where, limits={"lifetime_s": 1, "timeout_s": 1}) as box:
        time.sleep(1.3)
        with pytest.raises(SandboxGone):
            box.run("1")


def test_extend_moves_the_end_both_ways_and_metadata_is_kept(where: Where) -> None:
    with Sandbox(**where, limits={"lifetime_s": 1, "timeout_s": 1}, metadata={"job": "7"}) as box:
        box.extend(600)
        time.sleep(1.2)
        assert box.run("1").text == "1" and box.metadata == {"job": "7"}
        with pytest.raises(InvalidInput):
            box.extend(float("inf"))
        box.extend(0.2)
        time.sleep(0.6)
        with pytest.raises(SandboxGone):
            box.run("1")


def test_a_list_too_long_to_parse_cheaply_is_left_out_as_data_and_the_sandbox_lives(box: Sandbox) -> None:
    result = box.run(f"list(range({MAX_JSON_ITEMS}))")
    assert result.status == "ok" and "application/json" not in result.results[-1].data
    assert box.run("1 + 1").text == "2"
