import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fumehood import __version__
from fumehood.cli.run import parse_duration, parse_size
from fumehood.errors import InvalidInput

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_output_is_streamed_and_the_last_expression_shown_as_in_a_notebook(fumehood: Run) -> None:
    done = fumehood("run", "-c", "import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n42\n", "err\n")


@pytest.mark.parametrize(
    ("code", "options", "expected"),
    [
        ("pass", [], 0),
        ("1 / 0", [], 1),
        ("raise SystemExit(7)", [], 7),
        ("import time; time.sleep(60)", ["--timeout", "0.5"], 124),
        ("x = b'x' * (400 << 20)", ["--memory", "200M"], 137),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", [], 137),
    ],
)
def test_the_exit_code_says_how_it_ended(fumehood: Run, code: str, options: list[str], expected: int) -> None:  # H21
    done = fumehood("run", "-c", code, *options)
    assert done.returncode == expected, done.stderr


def test_a_failing_program_shows_its_traceback_and_not_ours(fumehood: Run) -> None:
    done = fumehood("run", "-c", "def f():\n    return 1 / 0\nf()")
    assert "ZeroDivisionError" in done.stderr
    assert "fumehood" not in done.stderr


def test_a_timeout_is_explained_with_its_deadline(fumehood: Run) -> None:
    done = fumehood("run", "-c", "while True: pass", "--timeout", "0.5")
    assert done.stderr.startswith("error: the program ended as timeout\ncause: ")
    assert "help: allow more with --timeout" in done.stderr


def test_a_refused_connection_is_not_blamed_on_the_policy(fumehood: Run) -> None:
    done = fumehood("run", "-c", "import socket; socket.create_connection(('1.1.1.1', 80), timeout=3)")
    assert done.returncode == 126
    assert "no network in this generation; bring data in with --in" in done.stderr and "--policy" not in done.stderr


def test_json_is_one_result_object_and_nothing_else(fumehood: Run) -> None:
    done = fumehood("run", "--json", "-c", "print('hello')\n1 + 1")
    result = json.loads(done.stdout)
    assert (result["status"], result["stdout"], result["exit"]) == ("ok", "hello\n", 0)
    assert [r["data"]["text/plain"] for r in result["results"]] == ["2"]
    assert {p["name"] for p in result["protections"]}
    assert done.stderr == ""


def test_json_carries_a_failure_of_our_own_too(fumehood: Run) -> None:
    done = fumehood("run", "--json", "-c", "1", "--policy", "no-such-preset")
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "invalid_policy")


@pytest.mark.parametrize(
    "args",
    [
        ["run"],
        ["run", "-c", "1", "file.py"],
        ["run", "no-such-file.py"],
        ["run", "-c", "1", "--memory", "lots"],
        ["run", "-c", "1", "--memory", "1"],
        ["run", "-c", "1", "--env", "novalue"],
        ["run", "-c", "1", "--in", "no-such-file"],
        ["run", "-c", "1", "--out", "/dev/null/x"],
        ["run", "-c", "1", "--policy", "no-such-preset"],
        ["run", "-c", "1", "--cpus", "abc"],
        ["run", "-c", "1", "--timeout", "90q"],
        ["run", "-c", "1", "--tier", "no-such-tier"],
        ["run", "-c", "1", "--no-such-option"],
        ["no-such-verb"],
        ["demo", "no-such-demo"],
    ],
)
def test_bad_input_is_one_error_with_help_and_no_traceback(fumehood: Run, args: list[str]) -> None:
    done = fumehood(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "\ncause: " in done.stderr and "\nhelp: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_program_comes_from_a_file_or_standard_input_in_its_language(fumehood: Run, tmp_path: Path) -> None:
    (tmp_path / "hello.sh").write_text("echo from $0; exit 3")
    assert fumehood("run", "hello.sh").returncode == 3
    assert fumehood("run", "-", stdin="print('piped')").stdout == "piped\n"
    assert fumehood("run", "--language", "bash", "-c", "echo $((6*7))").stdout == "42\n"


def test_another_language_is_not_taken_for_python_unless_that_is_said(fumehood: Run, tmp_path: Path) -> None:
    (tmp_path / "x.rb").write_text("print(1)")
    (tmp_path / "x").write_text("print(2)")
    refused = fumehood("run", "x.rb")
    assert (refused.returncode, refused.stdout) == (2, "") and ".rb is Ruby" in refused.stderr
    assert fumehood("run", "--language", "python", "x.rb").stdout == "1\n"
    assert fumehood("run", "x").stdout == "2\n"


def test_the_version_is_the_packages(fumehood: Run) -> None:
    assert fumehood("--version").stdout == f"fumehood {__version__}\n"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("0.5", 0.5), ("5m", 300), ("250ms", 0.25)])
def test_a_timeout_is_written_as_in_a_policy(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_a_bad_seccomp_profile_and_a_contradiction_name_their_file(fumehood: Run, tmp_path: Path) -> None:  # M6
    (tmp_path / "calls.json").write_text('{"defaultAction": "SCMP_ACT_NONE", "syscalls": []}')
    (tmp_path / "calls.toml").write_text('extends = "default"\nseccomp = "calls.json"\n')
    (tmp_path / "times.toml").write_text('[limits]\ntimeout_s = "10s"\nlifetime_s = "5s"\n')
    bad = fumehood("run", "-c", "1", "--policy", "calls.toml")
    assert bad.returncode == 2 and str(tmp_path / "calls.json") in bad.stderr and "object" not in bad.stderr
    assert f"error: {tmp_path / 'times.toml'}: " in fumehood("run", "-c", "1", "--policy", "times.toml").stderr


def test_caches_below_hidden_directories_stay_inside_without_a_word(fumehood: Run, tmp_path: Path) -> None:
    code = "import os\nos.makedirs('.cache/a')\nfor p in ('.cache/a/b', 'made'):\n    open(p, 'w').close()"
    done = fumehood("run", "-c", code, "--out", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["made"]


def test_a_picture_that_is_none_is_a_note(fumehood: Run) -> None:
    code = "from IPython.display import display\ndisplay({'image/png': 'x'}, raw=True)"
    done = fumehood("run", "-c", code, "--out", "out")
    assert done.returncode == 0 and "note: figure 1 was not copied out" in done.stderr


def test_env_reaches_the_program_and_the_hosts_own_does_not(fumehood: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "host-only")
    done = fumehood("run", "--env", "A=b=c", "-c", "import os; print(os.environ['A'], os.environ.get('API_KEY'))")
    assert done.stdout == "b=c None\n"


def test_files_go_in_and_changed_ones_and_figures_come_out(fumehood: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "n.txt").write_text("20")
    (tmp_path / "data" / "key").symlink_to("/etc/hostname")
    (tmp_path / "one.txt").write_text("1")
    code = (
        "import base64, os\nfrom IPython.display import Image, display\n"
        "n = int(open('data/n.txt').read()) + int(open('one.txt').read())\n"
        "os.makedirs('made/deep')\nopen('made/deep/sum.txt', 'w').write(str(n))\nopen('.envrc', 'w').write('x')\n"
        "os.symlink('/etc/passwd', 'loot')\n"
        "display(Image(base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')))"
    )
    done = fumehood("run", "-c", code, "--in", "data", "--in", "one.txt", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/made/deep/sum.txt").read_text() == "21"
    assert (tmp_path / "out/figure-1.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out/.envrc").exists()  # H12
    assert not (tmp_path / "out/loot").is_symlink()
    assert "not copied in" in done.stderr and "key" in done.stderr
    assert not (tmp_path / "out/data").exists()  # unchanged


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_no_process_of_the_sandbox_behind(command: list[str], number: int, code: int) -> None:
    mark = f"86399.{time.monotonic_ns()}"
    program = f"import subprocess\nprint('started', flush=True)\nsubprocess.run(['sleep', '{mark}'])"
    process = subprocess.Popen([*command, "run", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    _wait_until_named(mark)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in stderr) == (code, False), stderr
    assert not _named(mark)


def _named(mark: str) -> list[Path]:
    found: list[Path] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"sleep\0" + mark.encode()):
                found.append(path)
        except OSError:
            continue
    return found


def _wait_until_named(mark: str) -> None:
    deadline = time.monotonic() + 10
    while not _named(mark):
        assert time.monotonic() < deadline, "the program never started"
        time.sleep(0.02)


def test_a_reader_that_leaves_does_not_break_the_run(command: list[str]) -> None:
    line = shlex.join([*command, "run", "-c", "for i in range(99999): print(i)"]) + " | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 0)


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("2 kb", 2048), ("1T", 1 << 40)]
)
def test_sizes_are_read_in_powers_of_two(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1e9", "9" * 40, "1MM", "\uff11M\0"])
def test_a_size_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_size(text)
