"""The watchdog against real processes in real pid namespaces (M2-M4, H15, H21)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fumehood.errors import NotFound, SetupFailed
from fumehood.model import MIB, Enforcement, Limits, Usage
from fumehood.runtime.base import Stats
from fumehood.runtime.host import watchdog
from fumehood.runtime.host.accounting import WatchAccount
from fumehood.runtime.host.cgroup_tree import wait
from fumehood.runtime.host.watchdog import Watch, verdict

LIMITS = Limits(memory_bytes=64 * MIB, pids=16)
Box = Callable[..., tuple[int, subprocess.Popen[str]]]


@pytest.fixture
def box() -> Iterator[Box]:
    """Start a program as init of a new pid namespace: (its host pid, the process that waits for it)."""
    started: list[subprocess.Popen[str]] = []

    def start(*argv: str) -> tuple[int, subprocess.Popen[str]]:
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        command = ["unshare", *user, "--pid", "--fork", "--kill-child", *argv]
        started.append(process := subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True))
        return init_of(process.pid), process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def init_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    assert wait(lambda: bool(children.read_text()), 10)
    init = int(children.read_text())
    assert wait(lambda: Path(f"/proc/{init}/cmdline").read_bytes()[:7] != b"unshare", 10)
    return init


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", "import os, sys, time, threading\n" + code


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


SAY = "print('ready', flush=True); time.sleep(60)\n"


def test_every_task_of_the_sandbox_is_counted_and_no_other(box: Box) -> None:
    code = f"""
if os.fork() == 0:           # a daemon: its parent goes, it stays
    os.setsid()
    if os.fork(): os._exit(0)
    threading.Thread(target=time.sleep, args=(60,)).start()
    {SAY}
os.wait()
time.sleep(60)
"""
    init, process = box(*python(code))
    neighbour, other = box(*python(SAY))
    line(process), line(other)
    watch = Watch(init, LIMITS)
    assert wait(lambda: watch.sample().pids == 3, 10)  # the daemon's parent may take a moment to be gone
    assert Watch(neighbour, LIMITS).sample().pids == 1


def test_a_nested_pid_namespace_does_not_hide_a_process(box: Box) -> None:
    init, process = box("sh", "-c", f"unshare --user --pid --fork --kill-child {sys.executable} -c 'print(1, flush=True); "
                        "import time; time.sleep(60)'; :")  # fmt: skip
    line(process)
    assert Watch(init, LIMITS).sample().pids == 3


def test_processes_whose_namespace_may_not_be_read_are_found_by_descent(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    init, process = box(*python(f"if os.fork() == 0: time.sleep(60)\n{SAY}"))
    line(process)
    monkeypatch.setattr(watchdog, "_namespace", lambda pid: "")  # as EACCES gives it
    assert Watch(init, LIMITS).sample().pids == 2


def test_memory_shared_by_forks_is_counted_once(box: Box) -> None:
    code = f"""
shared = b'x' * (64 << 20)
for _ in range(3):
    if os.fork() == 0: time.sleep(60)
{SAY}
"""
    init, process = box(*python(code))
    line(process)
    assert 64 * MIB < Watch(init, LIMITS).sample().memory_bytes < 128 * MIB


def test_a_memory_hog_gets_the_verdict_oom_and_its_peak_stays(box: Box) -> None:
    init, process = box(*python("x = b'x' * (100 << 20); print('big', flush=True); sys.stdin.readline(); del x\n" + SAY))
    watch = Watch(init, LIMITS)
    line(process)
    stats = watch.sample()
    assert verdict(stats, LIMITS) == "oom"
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()
    line(process)
    later = watch.sample()
    assert verdict(later, LIMITS) is None
    assert later.usage.peak_memory_bytes == stats.memory_bytes > 100 * MIB


def test_too_many_tasks_get_the_verdict_pids_limit(box: Box) -> None:
    init, process = box(*python("for _ in range(16):\n  if os.fork() == 0: time.sleep(60)\n" + SAY))
    line(process)
    stats = Watch(init, LIMITS).sample()
    assert stats.pids == 17
    assert verdict(stats, LIMITS.replace(memory_bytes=1 << 30)) == "pids_limit"


def test_cpu_time_and_io_of_processes_that_ended_still_count(box: Box, tmp_path: Path) -> None:
    code = f"""
if os.fork() == 0:
    while time.process_time() < 0.3: pass
    import mmap
    fd = os.open({str(tmp_path / "file")!r}, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    os.write(fd, mmap.mmap(-1, 1 << 20))
    os._exit(0)
os.wait()
{SAY}
"""
    init, process = box(*python(code))
    watch = Watch(init, LIMITS)
    line(process)
    stats = watch.sample()
    assert stats.pids == 1
    assert stats.usage.cpu_s >= 0.28  # ticks of 10 ms
    assert stats.usage.io_write_bytes >= 1 * MIB


def test_samples_never_fail_and_never_go_back_while_processes_come_and_go(box: Box) -> None:
    code = """
while True:
    if os.fork() == 0:
        os.fork()
        os._exit(0)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: pass
"""
    init, _ = box(*python(code))
    watch = Watch(init, LIMITS)
    samples = [watch.sample() for _ in range(60)]
    assert all(sample.pids >= 1 for sample in samples)
    spent = [sample.usage.cpu_s for sample in samples]
    assert spent == sorted(spent) and spent[-1] > 0


@pytest.mark.parametrize("reading", ["_memory", "_io", "_namespace"])
def test_a_process_that_vanishes_in_the_middle_of_a_sample_is_left_out(
    reading: str, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, process = box(*python(SAY))
    line(process)
    watch = Watch(init, LIMITS)
    real = getattr(watchdog, reading)

    def vanish(pid: int, *rest: object) -> object:
        if pid == init and process.poll() is None:
            os.kill(init, signal.SIGKILL)
            process.wait()  # reaps it
            assert not Path(f"/proc/{init}").exists()
        return real(pid, *rest)

    monkeypatch.setattr(watchdog, reading, vanish)
    watch.sample()
    assert watch.sample().pids == 0


def test_a_process_killed_between_open_and_read_is_as_gone_as_one_never_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel answers ESRCH to the read of a file that was opened in time."""
    process = subprocess.Popen(["sleep", "60"])
    real = open

    def late(path: str, **how: str) -> object:
        stream = real(path, **how)
        process.kill()
        process.wait()
        return stream

    monkeypatch.setattr(watchdog, "open", late, raising=False)
    assert watchdog._read(process.pid, "smaps_rollup") == ""


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_signal_reaches_every_process_of_the_sandbox(box: Box) -> None:
    init, process = box(*python(f"if os.fork() == 0: time.sleep(60)\n{SAY}"))
    line(process)
    watch = Watch(init, LIMITS)
    watch.signal_all(signal.SIGSTOP)
    members = list(watch._members())
    assert len(members) == 2
    assert wait(lambda: all(state(pid) == "T" for pid in members), 10)
    watch.signal_all(signal.SIGCONT)
    assert wait(lambda: all(state(pid) == "S" for pid in members), 10)


def test_a_signal_does_not_reach_whoever_has_a_member_s_number_now(box: Box) -> None:
    init, process = box(*python(SAY))
    line(process)
    member = Watch(init, LIMITS)._members()[init]
    other = subprocess.Popen(["sleep", "60"])
    watchdog._signal(other.pid, replace(member, started=member.started - 1), signal.SIGKILL)
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.2)
    other.kill()
    other.wait()


def test_an_ended_sandbox_keeps_its_usage_and_shows_nothing_alive(box: Box) -> None:
    init, process = box(*python(SAY))
    line(process)
    watch = Watch(init, LIMITS)
    before = watch.sample()
    os.kill(init, signal.SIGKILL)
    process.wait()
    after = watch.sample()
    assert (after.pids, after.memory_bytes) == (0, 0)
    assert after.usage == before.usage and before.usage.peak_memory_bytes > 0


def test_another_process_under_the_watched_number_is_not_taken_for_the_sandbox(box: Box) -> None:
    init, _ = box(*python(SAY))
    watch = Watch(init, LIMITS)
    watch.pid = os.getpid()
    assert watch.sample().pids == 0


def test_watching_what_has_ended_says_so() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(NotFound) as refusal:
        Watch(process.pid, LIMITS)
    assert refusal.value.remediation


def test_a_program_s_name_can_not_forge_its_figures(box: Box, tmp_path: Path) -> None:
    forged = tmp_path / "a) R 1 (b"
    shutil.copy("/bin/sleep", forged)
    init, process = box("sh", "-c", f"'{forged}' 60 & echo ready; wait")
    line(process)
    assert Watch(init, LIMITS).sample().pids == 2


@pytest.mark.root
def test_an_ordinary_user_can_watch_his_own_sandbox_and_only_that() -> None:
    code = """
import os, subprocess, sys
from fumehood.model import Limits
from fumehood.runtime.host.cgroup_tree import wait
from fumehood.runtime.host.watchdog import Watch
os.setgroups([]); os.setgid(65534); os.setuid(65534)
argv = ["unshare", "--user", "--pid", "--fork", "--kill-child", "sh", "-c", "sleep 60 & sleep 60 & echo ready; wait"]
process = subprocess.Popen(argv, stdout=subprocess.PIPE)
process.stdout.readline()
init = int(open(f"/proc/{process.pid}/task/{process.pid}/children").read())
watch = Watch(init, Limits())
stats = watch.sample()
print(stats.pids, stats.memory_bytes > 0, stats.memory_bytes < 20 << 20)
process.kill()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["3", "True", "True"], done.stderr


def stats(memory: int, pids: int) -> Stats:
    return Stats(Usage(), memory, pids, oom_kills=0, pids_refused=0)


@given(memory=st.integers(0, 1 << 40), swap=st.integers(0, 1 << 40), used=st.integers(0, 1 << 42), pids=st.integers(0, 99))
def test_the_verdict_is_oom_exactly_above_memory_and_swap(memory: int, swap: int, used: int, pids: int) -> None:
    limits = Limits(memory_bytes=memory + 32 * MIB, swap_bytes=swap, pids=64)
    over = used > limits.memory_bytes + swap
    assert verdict(stats(used, pids), limits) == ("oom" if over else "pids_limit" if pids > 64 else None)


def test_nothing_that_is_only_watched_is_stated_as_enforced() -> None:
    stated = watchdog.protections()
    assert {p.name for p in stated} == {"cpu", "memory", "swap", "pids", "block-io", "freezer"}
    assert all(p.state is not Enforcement.ENFORCED and p.detail and p.fix for p in stated)


def test_a_sandbox_that_ended_while_it_was_set_up_is_a_set_up_that_failed():
    """Who made it then asks its channel for its last words: a step of the recipe may have failed."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    with pytest.raises(SetupFailed):
        WatchAccount(Limits()).entered(dead.pid)
