"""The native tier on a host with cgroup v2 alone: run by init.py as each of RUNNERS, never by this host's own pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack import native, pid_of, until

from fumehood import Sandbox
from fumehood.client.calls import block_on
from fumehood.client.engine import Engine
from fumehood.model import MIB, Enforcement
from fumehood.runtime.host import cgroup_v2
from fumehood.runtime.host.cgroup_layout import CONTROLLERS, probe

pytestmark = pytest.mark.rootless
DELEGATED = Path(os.environ["LANE_DELEGATED"])
LIMITS = {"memory_bytes": 96 * MIB, "swap_bytes": MIB, "pids": 24, "cpus": 0.5}


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(tier="native", limits={**LIMITS, "lifetime_s": 600}) as sandbox:
        yield sandbox


def group_of(box: Sandbox) -> Path:
    (line,) = Path(f"/proc/{pid_of(box)}/cgroup").read_text().splitlines()
    return Path("/sys/fs/cgroup", line.removeprefix("0::/"))


def value(box: Sandbox, file: str) -> str:
    return (group_of(box) / file).read_text().strip()


def count(box: Sandbox, file: str, key: str) -> int:
    return int(dict(line.split() for line in value(box, file).splitlines())[key])


def test_there_is_no_other_hierarchy() -> None:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert {line.split(" - ")[1].split()[0] for line in lines if "cgroup" in line} == {"cgroup2"}


def test_every_controller_is_used_below_the_group_that_was_delegated(box: Sandbox) -> None:
    layout = native()._layout
    assert {name: (place.version, place.base) for name, place in layout.places.items()} == dict.fromkeys(
        CONTROLLERS, (2, str(DELEGATED))
    )
    assert group_of(box) == DELEGATED / "fumehood" / native()._instance.name / box.id


def test_the_supervisor_has_left_the_group_that_it_was_started_in(box: Sandbox) -> None:
    """A group that holds processes can't hand controllers down; a second look changes nothing."""
    assert Path("/proc/self/cgroup").read_text().strip() == f"0::/{DELEGATED.relative_to('/sys/fs/cgroup')}/supervisor"
    assert (DELEGATED / "cgroup.procs").read_text() == ""
    assert probe().places == native()._layout.places


def test_the_limits_are_the_kernels_and_are_stated_as_enforced(box: Sandbox) -> None:
    """H13."""
    wanted = {
        "memory.max": str(96 * MIB),
        "memory.swap.max": str(MIB),
        "pids.max": "24",
        "cpu.max": "50000 100000",
    }
    assert {file: value(box, file) for file in wanted} == wanted
    stated = {p.name: (p.state, p.detail) for p in box.protections}
    names = ("cpu", "memory", "swap", "pids", "freezer")
    assert {name: stated[name] for name in names} == dict.fromkeys(names, (Enforcement.ENFORCED, "cgroup v2"))


def test_a_throttle_is_in_the_kernel_and_stated_as_enforced() -> None:
    with Sandbox(tier="native", limits={"io_write_bps": 5 * MIB}) as box:
        assert f"wbps={5 * MIB}" in value(box, "io.max")
        assert {p.name: p.state for p in box.protections}["block-io"] is Enforcement.ENFORCED


def test_a_pause_is_the_kernels_freezer(box: Sandbox) -> None:
    """M4."""
    box.pause()
    assert (value(box, "cgroup.freeze"), count(box, "cgroup.events", "frozen")) == ("1", 1)
    box.resume()
    assert value(box, "cgroup.freeze") == "0"
    assert box.run("6 * 7").text == "42"


def test_usage_is_what_the_kernel_counted(box: Sandbox) -> None:
    """M2: read while nothing runs."""
    box.pause()
    stats = box.stats()
    assert stats.usage.peak_memory_bytes == int(value(box, "memory.peak"))
    assert stats.memory_bytes == pytest.approx(
        int(value(box, "memory.current")), abs=MIB
    )  # pages charged in advance come and go
    assert stats.pids == int(value(box, "pids.current")) > 0
    assert round(stats.usage.cpu_s * 1e6) == count(box, "cpu.stat", "usage_usec")
    box.resume()


def test_memory_over_the_limit_is_told_by_the_kernels_event() -> None:
    """H15, H21."""
    with Sandbox(tier="native", limits={"memory_bytes": 64 * MIB}) as box:
        result = box.exec(["python3", "-c", "a = [bytearray(b'x') * (1 << 20) for _ in range(400)]"])
        assert result.status == "oom" and count(box, "memory.events", "oom_kill") == box.stats().oom_kills > 0


def test_forks_over_the_limit_are_refused_by_the_group_which_can_be_widened() -> None:
    """H15: an rlimit beside it would refuse first, be in no count, and stay."""
    code = "import subprocess\nkept = [subprocess.Popen(['sleep', '60']) for _ in range(24)]"
    with Sandbox(tier="native", limits={"pids": 16}) as box:
        assert box.run(code).status == "pids_limit"
        assert count(box, "pids.events", "max") == box.stats().pids_refused > 0
        block_on(Engine.of_this_process(), box.live.handle.limit(box.spec.limits.replace(pids=64)))
        assert box.run(code).status == "ok"


def test_the_end_is_cgroup_kill_and_leaves_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """H15, H19."""
    killed: list[tuple[str, bool]] = []
    real = cgroup_v2.kill

    def kill(core: cgroup_v2.Directory) -> bool:
        killed.append((core.path, real(core)))
        return killed[-1][1]

    monkeypatch.setattr(cgroup_v2, "kill", kill)
    with Sandbox(tier="native") as box:
        group = group_of(box)
        box.start("setsid sleep 300 & sleep 300")
        until(lambda: len((group / "cgroup.procs").read_text().split()) >= 3, "the daemon did not start")
    assert (str(group), True) in killed
    assert not group.exists()


SUPERVISOR = """
import sys
from fumehood import Sandbox
with Sandbox(tier="native") as box:
    box.start("setsid sleep 300 & sleep 300")
    print(box.id, flush=True)
    sys.stdin.read()
"""


def supervisor(run_dir: Path) -> subprocess.Popen[str]:
    environ = os.environ | {"FUMEHOOD_RUN_DIR": str(run_dir)}
    argv = [sys.executable, "-c", SUPERVISOR]
    return subprocess.Popen(argv, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def groups(instance: str) -> list[str]:
    """The sandboxes of an instance that have one."""
    return sorted(p.name for p in (DELEGATED / "fumehood" / instance).glob("*/"))


def test_the_group_that_a_killed_supervisor_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """H19."""
    (tmp_path / "run").mkdir(0o700)
    with supervisor(tmp_path / "run") as lost:
        assert lost.stdout is not None
        box = lost.stdout.readline().strip()
        (instance,) = os.listdir(tmp_path / "run/instances")
        assert groups(instance) == [box]
        lost.kill()
    assert groups(instance) == [box]
    with supervisor(tmp_path / "run") as following:
        assert following.stdout is not None
        assert following.stdout.readline()
        assert not (DELEGATED / "fumehood" / instance).exists()
        following.communicate("", timeout=60)
