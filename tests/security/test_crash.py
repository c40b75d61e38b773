"""Nothing stays behind: not after a step that fails, not after `kill -9` of a supervisor, not after a zygote's death (H19)."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attack import descendants, native, open_descriptors, processes, switched, until

from fumehood import Sandbox
from fumehood.errors import PolicyError, SandboxGone, SetupFailed

pytestmark = pytest.mark.rootless
STEPS = (
    *("cgroups", "ids", "cgroup-namespace", "hostname", "loopback", "disk", "terminals", "proc", "file-rules"),
    *("no-new-privs", "capabilities", "rlimits", "landlock", "seccomp-floor"),
)
# The supervisor that dies: a process of its own that uses the SDK as any other would.
SUPERVISOR = """
import sys, threading, time
from fumehood import Sandbox
from fumehood.client.calls import block_on
from fumehood.client.engine import Engine
from fumehood.model import Template
def warm():
    engine = Engine.of_this_process()
    async def work():
        await engine.supervisor.runtime('native').warm(Template())
    block_on(engine, work())
    return engine.supervisor.runtime('native')
def stand_at(step):
    warm().switches = {'pause_at': step}
    threading.Thread(target=Sandbox(tier='native').open, daemon=True).start()
"""


def cgroups(instance: str) -> list[str]:
    """Every cgroup directory, in any hierarchy, that has the instance's name."""
    found = subprocess.run(["find", "/sys/fs/cgroup", "-type", "d", "-name", f"*{instance}*"], capture_output=True, text=True)
    return found.stdout.split()


def supervisor(run_dir: Path, code: str) -> subprocess.Popen[bytes]:
    run_dir.mkdir(0o700, exist_ok=True)
    environ = os.environ | {"FUMEHOOD_RUN_DIR": str(run_dir), "FUMEHOOD_AGENT_TIMEOUT_S": "60"}
    argv = [sys.executable, "-c", SUPERVISOR + code]
    return subprocess.Popen(argv, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def logs(run_dir: Path) -> str:
    return "".join(path.read_text() for path in run_dir.glob("instances/*/*.log"))


def next_supervisor_finds_nothing(run_dir: Path, below: set[int]) -> None:
    (instance,) = [d.name for d in (run_dir / "instances").iterdir()]
    until(lambda: not below & processes().keys(), f"alive: {below & processes().keys()}")
    code = "with Sandbox(tier='native') as box: print(box.run('6 * 7').text)"
    after = supervisor(run_dir, code)
    assert after.communicate(timeout=9)[0] == b"42\n"
    assert list((run_dir / "instances").iterdir()) == [] and cgroups(instance) == []
    assert str(run_dir) not in Path("/proc/self/mountinfo").read_text()


def test_a_supervisor_that_is_killed_while_a_sandbox_stands_at_each_step_leaves_nothing(tmp_path: Path) -> None:
    """H19: `kill -9`; the processes die with it, the next supervisor removes cgroups and directories."""
    run_dir = tmp_path / "run"
    dying = supervisor(run_dir, "for line in sys.stdin: stand_at(line.strip())")
    assert dying.stdin is not None
    for step in STEPS:
        dying.stdin.write(f"{step}\n".encode())
        dying.stdin.flush()
        until(lambda step=step: f"paused at {step}\n" in logs(run_dir), f"none ever stood at {step}")
    below = descendants(dying.pid) - {dying.pid}
    assert len(below) >= 2 + len(STEPS)  # the waiter, the zygote, the sandboxes
    dying.kill()
    dying.communicate()
    next_supervisor_finds_nothing(run_dir, below)


@pytest.mark.parametrize("delay_s", [0.02, 0.15, 0.3])
def test_a_supervisor_that_is_killed_while_it_builds_a_zygote_leaves_nothing(delay_s: float, tmp_path: Path) -> None:
    """H19"""
    run_dir = tmp_path / "run"
    dying = supervisor(run_dir, "Sandbox(tier='native').open(); time.sleep(60)")
    until(lambda: list(run_dir.glob("instances/*/root")), "no instance")
    time.sleep(delay_s)
    below = descendants(dying.pid) - {dying.pid}
    dying.kill()
    dying.communicate()
    next_supervisor_finds_nothing(run_dir, below)


def test_a_supervisor_that_is_killed_while_code_runs_leaves_nothing(tmp_path: Path) -> None:
    """H19: daemons with their own sessions included."""
    run_dir = tmp_path / "run"
    code = "box = Sandbox(tier='native').open()\n"
    code += "box.start('setsid sleep 77 & sleep 60'); time.sleep(0.3)\nprint('up', flush=True); sys.stdin.read()"
    dying = supervisor(run_dir, code)
    assert dying.stdout is not None and dying.stdout.readline() == b"up\n"
    below = descendants(dying.pid) - {dying.pid}
    assert len(below) >= 5
    dying.kill()
    dying.communicate()
    next_supervisor_finds_nothing(run_dir, below)


def test_a_live_supervisors_sandboxes_are_left_alone_by_the_next(tmp_path: Path) -> None:
    """H19: reconciliation takes what no lock holds, and only that."""
    run_dir = tmp_path / "run"
    first = supervisor(
        run_dir, "box = Sandbox(tier='native').open(); print('up', flush=True); sys.stdin.read()\nprint(box.run('1').text)"
    )
    assert first.stdout is not None and first.stdout.readline() == b"up\n"
    second = supervisor(run_dir, "with Sandbox(tier='native') as box: print(box.run('2').text)")
    assert second.communicate(timeout=9)[0] == b"2\n"
    assert len(list((run_dir / "instances").iterdir())) == 1
    assert first.communicate(b"go", timeout=9)[0] == b"1\n"


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_nothing_and_names_itself(step: str) -> None:
    """H13, H19: uid and descriptors given back, processes and cgroups gone."""
    with Sandbox(tier="native"):
        pass
    runtime = native()
    uids = runtime._uids
    before = (len(open_descriptors()), cgroups(runtime._instance.name + "/s"), sorted(uids._free) if uids else [])
    running = len(descendants(os.getpid()))  # the zygote's spare clone is another one after each creation
    raised = PolicyError if step == "file-rules" else SetupFailed
    with switched(fail_at=step), pytest.raises(raised) as e, Sandbox(tier="native"):
        pass
    assert step in str(e.value) and "asked to fail" in str(e.value)
    until(lambda: len(open_descriptors()) <= before[0], f"descriptors are left: {open_descriptors()}")
    assert (sorted(uids._free) if uids else []) == before[2]
    until(lambda: len(descendants(os.getpid())) <= running, "a process is left")
    left = {
        Path(p).name
        for c in cgroups(runtime._instance.name)
        for p in os.listdir(c)
        if p.startswith("s") and Path(c, p).is_dir()
    }
    assert not left
    with Sandbox(tier="native") as box:
        assert box.run("1").ok


def test_a_killed_zygote_ends_its_sandboxes_tells_its_callers_and_is_rebuilt() -> None:
    """H18, H19"""
    with Sandbox(tier="native") as box:
        zygote = native()._zygotes[box.spec.template]
        below = descendants(zygote._process.pid)
        threading.Timer(0.4, zygote._process.kill).start()
        result = box.exec("sleep 20")
        assert result.status == "killed" and result.cause
        with pytest.raises(SandboxGone):
            box.run("1")
    until(lambda: not (below - {zygote._process.pid}) & processes().keys(), "sandboxes outlived their zygote")
    with Sandbox(tier="native") as box:
        assert box.run("2").text == "2"


def test_a_creation_right_after_its_zygotes_death_gets_a_new_one() -> None:
    """H18: without a moment for the supervisor to notice."""
    with Sandbox(tier="native") as box:
        zygote = native()._zygotes[box.spec.template]
        below = descendants(zygote._process.pid)
        os.kill(zygote._process.pid, signal.SIGKILL)
        until(lambda: not (below - {zygote._process.pid}) & processes().keys(), "sandboxes outlived their zygote")
        with Sandbox(tier="native") as after:
            assert after.run("3").text == "3"
