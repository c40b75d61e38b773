"""The official SDKs, unmodified and synchronous, against our server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from e2b_code_interpreter import Sandbox
from e2b_server import Server, eventually

from e2b import (
    CommandExitException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)

pytestmark = pytest.mark.rootless
Make = Callable[..., Sandbox]


# -- code
def test_variables_stay_between_runs_and_the_last_expression_is_the_text(box: Sandbox) -> None:
    box.run_code("kept = 41")
    run = box.run_code("print('said')\nkept + 1")
    assert (run.text, "".join(run.logs.stdout), run.error) == ("42", "said\n", None)
    assert run.execution_count is not None


def test_a_string_is_shown_without_its_quotes(box: Sandbox) -> None:
    assert box.run_code("'plain'").text == "plain"


def test_output_and_results_arrive_through_callbacks_while_the_code_runs(box: Sandbox) -> None:
    heard: list[str] = []

    def on_stdout(message: Any) -> None:
        heard.append(message.line)
        box.files.write("heard", "")  # the code waits for it

    code = """
        import os, sys, time
        print('one', flush=True)
        until = time.monotonic() + 20
        while not os.path.exists('/home/user/heard') and time.monotonic() < until:
            time.sleep(0.01)
        print('two' if os.path.exists('/home/user/heard') else 'late', file=sys.stderr)
        3
    """
    run = box.run_code(
        code,
        on_stdout=on_stdout,
        on_stderr=lambda message: heard.append(message.line),
        on_result=lambda result: heard.append(result.text or ""),
    )
    assert "".join(heard) == "one\ntwo\n3"
    assert "".join(run.logs.stderr) == "two\n"


def test_an_exception_is_an_error_with_its_traceback(box: Sandbox) -> None:
    error = box.run_code("1/0").error
    assert error is not None and error.name == "ZeroDivisionError" and "1/0" in error.traceback


def test_env_vars_hold_for_one_run_and_those_of_the_sandbox_for_all(make: Make) -> None:
    sandbox = make(envs={"OF_ALL": "a"})
    assert sandbox.run_code("import os\nos.environ['OF_ALL'] + os.environ['OF_ONE']", envs={"OF_ONE": "b"}).text == "ab"
    assert sandbox.run_code("os.environ.get('OF_ONE')").text is None
    assert sandbox.commands.run("echo $OF_ALL").stdout == "a\n"


def test_contexts_have_names_of_their_own_and_can_be_restarted_and_removed(box: Sandbox) -> None:
    context = box.create_code_context(cwd="/tmp")
    box.run_code("own = 1", context=context)
    assert box.run_code("import os\nos.getcwd()", context=context).text == "/tmp"
    assert box.run_code("own").error.name == "NameError"  # pyright: ignore[reportOptionalMemberAccess]
    box.restart_code_context(context)
    assert box.run_code("own", context=context).error.name == "NameError"  # pyright: ignore[reportOptionalMemberAccess]
    assert context.id in [c.id for c in box.list_code_contexts()]
    box.remove_code_context(context)
    with pytest.raises(NotFoundException):
        box.run_code("1", context=context)


def test_bash_and_a_language_that_is_not_there(box: Sandbox) -> None:
    assert "".join(box.run_code("echo $((6 * 7))", language="bash").logs.stdout) == "42\n"
    with pytest.raises(SandboxException, match="not supported"):
        box.run_code("1", language="cobol")


def test_a_run_that_its_client_gave_up_is_stopped_and_the_context_goes_on(make: Make) -> None:
    sandbox = make()
    with pytest.raises(TimeoutException):
        sandbox.run_code("import time\ntime.sleep(60)", timeout=0.3)
    assert sandbox.run_code("7", request_timeout=30).text == "7"


def test_a_kill_during_a_run_is_an_error_and_never_half_a_result(make: Make) -> None:
    sandbox = make()
    threading.Timer(0.5, sandbox.kill).start()
    with pytest.raises((TimeoutException, SandboxException)):
        sandbox.run_code("print('begun', flush=True)\nimport time\ntime.sleep(30)")


@pytest.mark.data
def test_a_figure_comes_with_its_picture_and_its_chart_and_a_frame_with_its_data(make: Make) -> None:
    sandbox = make(template="code-interpreter-v1")
    run = sandbox.run_code(
        "import matplotlib.pyplot as plt\nplt.bar(['a', 'b'], [1, 2])\nplt.title('T')\nplt.ylabel('y (m)')\nplt.show()"
    )
    (result,) = [r for r in run.results if r.png]
    chart = result.chart
    assert chart is not None and chart.type.value == "bar" and chart.title == "T"
    assert [(e.label, e.value) for e in chart.elements] == [("a", 1), ("b", 2)]  # pyright: ignore[reportAttributeAccessIssue]
    frame = sandbox.run_code("import pandas as pd\npd.DataFrame({'n': [1, 2]})").results[0]
    assert frame.data == {"n": [1, 2]} and "<table" in (frame.html or "")


# -- commands
def test_a_command_in_the_foreground(box: Sandbox) -> None:
    done = box.commands.run("cd /tmp; pwd; echo no >&2; echo $WORD", envs={"WORD": "w"}, cwd="/")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "/tmp\nw\n", "no\n")
    with pytest.raises(CommandExitException) as failed:
        box.commands.run("exit 3")
    assert failed.value.exit_code == 3
    with pytest.raises(InvalidArgumentException, match="does not exist"):
        box.commands.run("true", cwd="/nowhere")


def test_a_command_in_the_background_is_listed_fed_followed_twice_and_killed(box: Sandbox) -> None:
    started = box.commands.run("cat; echo over", background=True, stdin=True)
    assert started.pid in [p.pid for p in box.commands.list()]
    assert box.commands.run(f"kill -0 {started.pid}").exit_code == 0
    second = box.commands.connect(started.pid)
    box.commands.send_stdin(started.pid, "line\n")
    box.commands.close_stdin(started.pid)
    assert started.wait().stdout == "line\nover\n"
    assert second.wait().stdout.endswith("over\n")
    assert not box.commands.kill(started.pid)
    sleeper = box.commands.run("sleep 60", background=True)
    assert box.commands.kill(sleeper.pid)
    with pytest.raises(CommandExitException) as ended:
        sleeper.wait()
    assert ended.value.exit_code == -1 and "killed" in (ended.value.error or "")


def test_input_can_be_streamed(box: Sandbox) -> None:
    started = box.commands.run("wc -c", background=True, stdin=True)
    box.commands.stream_input(started.pid, iter([b"x" * 100_000] * 3))
    box.commands.close_stdin(started.pid)
    assert started.wait().stdout.strip() == "300000"


def test_a_command_ends_with_its_timeout_and_all_that_it_started(box: Sandbox) -> None:
    with pytest.raises(TimeoutException):
        box.commands.run("sleep 61.5 & sleep 61.5", timeout=0.5)
    eventually(lambda: "61.5" not in box.commands.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout)


def test_a_client_that_leaves_does_not_end_the_command(box: Sandbox) -> None:
    started = box.commands.run("sleep 0.6; echo $((40 + 2)) > left.txt", background=True)
    started.disconnect()
    assert eventually(lambda: box.files.exists("left.txt") and box.files.read("left.txt")) == "42\n"


# -- files
def test_files_are_written_read_listed_renamed_and_removed(box: Sandbox) -> None:
    written = box.files.write("dir/näme.txt", "tëxt")
    assert written.path == "/home/user/dir/näme.txt"
    assert box.files.read("dir/näme.txt") == "tëxt"
    info = box.files.get_info("dir/näme.txt")
    assert (info.type, info.size, info.permissions, info.owner) == (FileType.FILE, 5, "-rw-r--r--", "user")
    assert [e.name for e in box.files.list("dir")] == ["näme.txt"]
    assert box.files.make_dir("dir/sub") and not box.files.make_dir("dir/sub")
    assert [e.path for e in box.files.list(".", depth=2) if e.path.startswith("/home/user/dir/")] == [
        "/home/user/dir/näme.txt",
        "/home/user/dir/sub",
    ]
    assert box.files.rename("dir/näme.txt", "dir/sub/b").path == "/home/user/dir/sub/b"
    box.files.remove("dir")
    assert not box.files.exists("dir/sub/b")
    with pytest.raises(NotFoundException):
        box.files.read("dir/sub/b")
    with pytest.raises(InvalidArgumentException):
        box.files.read("/tmp")


@pytest.mark.parametrize("how", [{}, {"use_octet_stream": True}, {"gzip": True}])
def test_large_binary_files_come_back_as_they_were(box: Sandbox, how: dict[str, Any]) -> None:
    data = bytes(range(256)) * 12_000
    box.files.write("big.bin", data, **how)
    assert bytes(box.files.read("big.bin", format="bytes")) == data
    assert b"".join(box.files.read("big.bin", format="stream")) == data
    box.files.write("big.bin", b"short", **how)
    assert box.files.read("big.bin") == "short"
    box.files.remove("big.bin")


def test_several_files_in_one_request_and_empty_ones(box: Sandbox) -> None:
    written = box.files.write_files([{"path": f"many/{n}", "data": "x" * n} for n in range(4)])
    assert [w.path for w in written] == [f"/home/user/many/{n}" for n in range(4)]
    assert [e.size for e in box.files.list("many")] == [0, 1, 2, 3]


def test_a_link_is_told_from_what_it_points_to(box: Sandbox) -> None:
    box.commands.run("echo 1 > real; ln -sf real link")
    link = box.files.get_info("link")
    assert (link.type, link.symlink_target) == (FileType.SYMLINK, "/home/user/real")


def test_a_watched_directory_tells_what_happened_in_it(box: Sandbox) -> None:
    box.files.make_dir("seen")
    watch = box.files.watch_dir("seen", recursive=True, include_entry=True)
    box.files.write("seen/new.txt", "x")
    events = watch.get_new_events()
    assert [(e.name, e.type) for e in events] == [
        ("new.txt", FilesystemEventType.CREATE),
        ("new.txt", FilesystemEventType.CHMOD),
        ("new.txt", FilesystemEventType.WRITE),
    ]
    assert events[0].entry is not None and events[0].entry.path == "/home/user/seen/new.txt"
    box.files.rename("seen/new.txt", "seen/other.txt")
    assert [e.type for e in watch.get_new_events()] == [FilesystemEventType.RENAME, FilesystemEventType.CREATE]
    watch.stop()
    with pytest.raises(NotFoundException):
        box.files.watch_dir("nowhere")


def test_metadata_of_files_is_refused_with_the_reason(box: Sandbox) -> None:
    with pytest.raises(SandboxException, match="metadata is not kept"):
        box.files.write("m.txt", "x", metadata={"a": "b"})


# -- terminals
def test_a_terminal_takes_input_and_sizes_and_is_killed(box: Sandbox) -> None:
    from e2b import PtySize

    terminal, seen = box.pty.create(PtySize(rows=24, cols=80)), bytearray()
    box.pty.resize(terminal.pid, PtySize(rows=33, cols=101))
    box.pty.send_stdin(terminal.pid, b"stty size; echo do''ne; exit\n")
    terminal.wait(on_pty=seen.extend)
    assert b"33 101" in seen and b"done" in seen
    other = box.pty.create(PtySize(rows=24, cols=80))
    assert box.pty.kill(other.pid)


# -- life
def test_pause_stops_everything_and_connect_goes_on_where_it_was(make: Make, server: Server) -> None:
    sandbox = make()
    sandbox.run_code("kept = 1")
    sleeper = sandbox.commands.run("sleep 100", background=True)
    assert sandbox.pause() and not sandbox.pause()
    assert sandbox.get_info().state is SandboxState.PAUSED
    assert not sandbox.is_running()
    again = Sandbox.connect(sandbox.sandbox_id, **server.options())
    assert again.run_code("kept").text == "1"
    assert sleeper.pid in [p.pid for p in again.commands.list()]
    assert again.is_running()


def test_a_paused_sandbox_with_auto_resume_wakes_for_traffic(make: Make) -> None:
    sandbox = make(lifecycle={"on_timeout": "pause", "auto_resume": True})
    sandbox.pause()
    assert sandbox.commands.run("echo up").stdout == "up\n"


def test_expiry_kills_or_pauses_as_it_was_asked(make: Make) -> None:
    killed, paused = make(timeout=1), make(timeout=1, lifecycle={"on_timeout": "pause"})
    eventually(lambda: not killed.is_running() and not paused.is_running())
    assert paused.get_info().state is SandboxState.PAUSED
    with pytest.raises(NotFoundException):
        killed.get_info()
    assert not killed.kill()


def test_set_timeout_moves_the_end_both_ways(make: Make) -> None:
    sandbox = make(timeout=100)
    sandbox.set_timeout(1_000)
    left_s = sandbox.get_info().end_at.timestamp() - time.time()
    assert 990 < left_s <= 1_000
    connected = sandbox.connect(timeout=10)
    assert connected.get_info().end_at.timestamp() - time.time() > 900, "connecting never shortens a lease"
    sandbox.set_timeout(0)
    eventually(lambda: not sandbox.is_running())


def test_lists_are_filtered_by_metadata_and_come_in_pages(make: Make, server: Server) -> None:
    mark = {"tést": "a b&c=%"}
    ids = [make(metadata=mark).sandbox_id for _ in range(3)]
    make()
    pages = Sandbox.list(query=SandboxQuery(metadata=mark), limit=2, **server.options())
    first = pages.next_items()
    assert len(first) == 2 and pages.has_next
    second = pages.next_items()
    assert [s.sandbox_id for s in first + second] == ids[::-1] and not pages.has_next
    assert first[0].metadata == mark
    templates = [
        Sandbox.list(query=SandboxQuery(metadata=mark, template=name), **server.options()).next_items()
        for name in ("python", "code-interpreter-v1")
    ]
    assert [len(found) for found in templates] == [3, 0]


def test_metrics_are_the_hosts_own_figures(make: Make) -> None:
    sandbox = make()
    sandbox.files.write("ballast", b"x" * (3 << 20))
    sandbox.run_code("sum(range(10**6))")
    (metric,) = sandbox.get_metrics()
    assert metric.mem_total == 512 << 20 and 0 < metric.mem_used < metric.mem_total
    assert 3 << 20 <= metric.disk_used < metric.disk_total == 256 << 20
    assert metric.cpu_used_pct > 0


def test_what_cannot_be_done_here_says_so(make: Make, server: Server) -> None:
    sandbox = make()
    with pytest.raises(SandboxException, match="snapshots of memory"):
        sandbox.create_snapshot()
    with pytest.raises(SandboxException, match="snapshots of memory"):
        sandbox.fork()
    with pytest.raises(SandboxException, match="without the memory"):
        sandbox.create_snapshot(mode="filesystem")
    assert sandbox.list_snapshots().next_items() == [] and not sandbox.list_snapshots(name="any").next_items()
    for name in ("p0123456789abcdef", "p0123456789abcdef:default", "no/such:v1", "python"):
        assert not Sandbox.delete_snapshot(name, **server.options())
    with pytest.raises(SandboxException, match="template 'nothing' not found"):
        make(template="nothing")
    with pytest.raises(SandboxException, match="timeout must be"):
        make(timeout=10**9)
