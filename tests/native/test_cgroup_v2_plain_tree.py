"""Version 2's files against a plain directory laid out like cgroup2: no kernel answers here, only names and formats.

This machine's unified mount has no cpu, memory, io or pids controller. What it has (freeze, kill, processes, cpu.stat)
is tested for real in test_cgroup.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fumehood.errors import CapacityExceeded, SetupFailed
from fumehood.model import MIB, Enforcement, Limits
from fumehood.runtime.host import cgroup_v2
from fumehood.runtime.host.cgroup import Group, Layout, probe
from fumehood.runtime.host.cgroup_layout import settle, whole_disk

LIMITS = Limits(cpus=0.5, memory_bytes=64 * MIB, swap_bytes=MIB, pids=16, io_read_bps=10 * MIB, io_write_bps=0)
LEAF = {
    "cgroup.procs": "",
    "cgroup.type": "domain\n",
    "cgroup.controllers": "cpuset cpu io memory pids\n",
    "cgroup.subtree_control": "",
    "cpu.max": "max 100000\n",
    "cpu.weight": "100\n",
    "cpu.stat": "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\nnr_throttled 3\n",
    "memory.max": "max\n",
    "memory.swap.max": "max\n",
    "memory.current": "1048576\n",
    "memory.peak": "2097152\n",
    "memory.events": "low 0\nhigh 0\nmax 4\noom 1\noom_kill 1\noom_group_kill 0\n",
    "pids.max": "max\n",
    "pids.current": "3\n",
    "pids.peak": "7\n",
    "pids.events": "max 5\n",
    "io.max": "",
    "io.stat": "254:0 rbytes=10 wbytes=20 rios=1 wios=1 dbytes=0 dios=0\n8:0 rbytes=1 wbytes=2 rios=1 wios=1\n",
}
SYSTEM = {"cgroup.procs": "", "cgroup.controllers": "cpu io memory pids\n", "cgroup.subtree_control": ""}


def lay(directory: Path, files: dict[str, str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)
    return directory


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A root of nothing but v2, and a mkdir that fills a new directory as the kernel would."""
    root = lay(tmp_path / "cgroup", SYSTEM)
    real = os.mkdir

    def mkdir(path: str, *mode: int) -> None:
        real(path, *mode)
        lay(Path(path), LEAF)

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return found(tmp_path, root, "/")


def found(tmp_path: Path, root: Path, own: str) -> Layout:
    (tmp_path / "mountinfo").write_text(f"41 31 0:38 / {root} rw,relatime - cgroup2 cgroup2 rw\n")
    (tmp_path / "own").write_text(f"0::{own}\n")
    return probe(str(root), str(tmp_path / "mountinfo"), str(tmp_path / "own"), state_dir="/tmp")


def made(layout: Layout) -> Path:
    return Path(layout.places["pids"].of("inst", "sbox"))


def test_limits_go_to_the_files_that_the_manual_names(layout: Layout) -> None:
    Group.create(Layout(layout.places, {}, "254:0"), "inst", "sbox", LIMITS).close()
    wrote = {name: (made(layout) / name).read_text().split("\n")[0] for name in LEAF if name.endswith(".max")}
    assert wrote["cpu.max"] == "50000 100000"
    assert wrote["io.max"] == f"254:0 rbps={10 * MIB} wbps=max"
    assert {k: v[:8] for k, v in wrote.items() if k.startswith("memory")} == {
        "memory.max": "67108864",
        "memory.swap.max": "1048576",
    }
    assert wrote["pids.max"].startswith("16")


def test_controllers_are_handed_down_at_each_level_but_not_into_the_sandbox(layout: Layout) -> None:
    Group.create(layout, "inst", "sbox", LIMITS).close()
    levels = [made(layout).parents[2], made(layout).parents[1], made(layout).parent, made(layout)]
    asked = [(level / "cgroup.subtree_control").read_text() for level in levels]
    assert asked == ["+cpu +io +memory +pids"] * 3 + [""]


def test_a_reading_takes_every_figure_from_its_file(layout: Layout) -> None:
    group = Group.create(layout, "inst", "sbox", LIMITS)
    stats = group.reading()
    group.close()
    assert (stats.usage.cpu_s, stats.usage.peak_memory_bytes, stats.usage.peak_pids) == (1.5, 2097152, 7)
    assert (stats.usage.io_read_bytes, stats.usage.io_write_bytes) == (11, 22)
    assert (stats.memory_bytes, stats.pids, stats.oom_kills, stats.pids_refused) == (1048576, 3, 1, 5)


def test_a_kernel_without_peak_files_still_gives_the_peak_it_was_seen_at(layout: Layout) -> None:
    group = Group.create(layout, "inst", "sbox", LIMITS)
    (made(layout) / "pids.peak").unlink()
    assert group.reading().usage.peak_pids == 3
    (made(layout) / "pids.current").write_text("1\n")
    assert (group.reading().pids, group.reading().usage.peak_pids) == (1, 3)
    group.close()


def test_a_kernel_that_does_not_count_swap_is_stated_as_degraded(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LEAF, "memory.swap.max")
    group = Group.create(layout, "inst", "sbox", LIMITS)
    states = {p.name: p.state for p in group.protections()}
    group.close()
    assert (states["swap"], states["memory"]) == (Enforcement.DEGRADED, Enforcement.ENFORCED)


def test_a_limit_file_that_must_be_there_and_is_not_fails_closed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """H13."""
    monkeypatch.delitem(LEAF, "memory.max")
    removed: list[str] = []
    monkeypatch.setattr(os, "rmdir", removed.append)  # a plain directory full of files can't be removed by rmdir
    with pytest.raises(SetupFailed, match=r"memory\.max"):
        Group.create(layout, "inst", "sbox", LIMITS)
    assert removed == [str(made(layout))]


def test_shrinking_asks_for_reclaim_instead_of_the_oom_killer(layout: Layout) -> None:
    group = Group.create(layout, "inst", "sbox", LIMITS)
    (made(layout) / "memory.current").write_text(f"{60 * MIB}\n")
    with pytest.raises(CapacityExceeded):  # no memory.reclaim: a kernel before 5.19
        group.apply(LIMITS.replace(memory_bytes=40 * MIB))
    assert (made(layout) / "memory.max").read_text().startswith("67108864")
    (made(layout) / "memory.reclaim").write_text("")
    group.apply(LIMITS.replace(memory_bytes=40 * MIB))
    assert (made(layout) / "memory.reclaim").read_text() == str(20 * MIB)
    assert (made(layout) / "memory.max").read_text().startswith(str(40 * MIB))
    group.close()


def test_cgroup_kill_is_used_where_there_is_one(layout: Layout) -> None:
    group = Group.create(layout, "inst", "sbox", LIMITS)
    (made(layout) / "cgroup.freeze").write_text("")
    (made(layout) / "cgroup.kill").write_text("")
    group.kill()
    assert (made(layout) / "cgroup.kill").read_text() == "1"
    assert (made(layout) / "pids.max").read_text().startswith("16"), "no need to stop forks"
    group.close()


def test_controllers_that_are_not_offered_are_missing_with_a_reason(tmp_path: Path) -> None:
    root = lay(tmp_path / "cgroup", SYSTEM | {"cgroup.controllers": "memory pids\n"})
    layout = found(tmp_path, root, "/")
    assert set(layout.places) == {"memory", "pids"} | cgroup_v2.CORE
    assert layout.missing["cpu"] == f"{root} does not offer cpu"


def test_an_ordinary_user_builds_in_the_nearest_delegated_group_that_holds_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = lay(tmp_path / "cgroup", SYSTEM)
    for below, procs in (("user", ""), ("user/app", ""), ("user/app/run.scope", "4711\n")):
        lay(root / below, LEAF | {"cgroup.procs": procs})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert found(tmp_path, root, "/user/app/run.scope").places["memory"].base == str(root / "user/app")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found(tmp_path, root, "/user/app/run.scope").places["memory"].base == str(root)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A service's group that systemd delegated, which holds us."""
    root = lay(tmp_path / "cgroup", SYSTEM)
    lay(root / "system.slice", LEAF)
    unit = lay(root / "system.slice/fumehood.service", LEAF | {"cgroup.procs": "4711\n"})
    os.setxattr(unit, "user.delegate", b"1")
    return unit


@pytest.mark.root
def test_root_builds_in_the_unit_that_was_delegated_to_it_and_not_in_another_users(tmp_path: Path, unit: Path) -> None:
    """The unit's limits and its end are then also the sandboxes'."""
    root, inside = unit.parents[1], lay(unit / "supervisor", LEAF | {"cgroup.procs": "4711\n"})
    (unit / "cgroup.procs").write_text("")
    own = f"/{inside.relative_to(root)}"
    assert found(tmp_path, root, own).places["memory"].base == str(unit)
    os.chown(unit, 1000, 1000)
    assert found(tmp_path, root, own).places["memory"].base == str(root)
    os.chown(unit, 0, 0)
    os.removexattr(unit, "user.delegate")
    assert found(tmp_path, root, own).places["memory"].base == str(root)


def test_a_delegated_group_that_holds_us_is_left_for_one_below_it(tmp_path: Path, unit: Path) -> None:
    settled(tmp_path, unit)
    assert (unit / "supervisor/cgroup.procs").read_text() == "4711"


@pytest.mark.parametrize("lacks", ["mark", "memory", "process"])
def test_a_group_is_not_left_without_need(tmp_path: Path, unit: Path, lacks: str) -> None:
    """Other programs' groups, a hybrid host's, and one that can hand controllers down as it is."""
    if lacks == "mark":
        os.removexattr(unit, "user.delegate")
    else:
        file, rest = {"memory": ("cgroup.controllers", "pids\n"), "process": ("cgroup.procs", "")}[lacks]
        (unit / file).write_text(rest)
    settled(tmp_path, unit)
    assert not (unit / "supervisor").exists()


def settled(tmp_path: Path, unit: Path) -> None:
    root = unit.parents[1]
    (tmp_path / "mountinfo").write_text(f"41 31 0:38 / {root} rw,relatime - cgroup2 cgroup2 rw\n")
    (tmp_path / "own").write_text(f"0::/{unit.relative_to(root)}\n")
    settle(str(root), str(tmp_path / "mountinfo"), str(tmp_path / "own"))


def test_a_device_without_counts_does_not_spoil_the_others(layout: Layout) -> None:
    """Linux 5.x: such devices' numbers stand in front of the next line's."""
    group = Group.create(layout, "inst", "sbox", LIMITS)
    (made(layout) / "io.stat").write_text("7:1 7:0 254:0 rbytes=10 wbytes=20 rios=1 wios=1 dbytes=0 dios=0\n8:16 \n")
    assert (group.reading().usage.io_read_bytes, group.reading().usage.io_write_bytes) == (10, 20)
    group.close()


def test_a_kernel_without_a_peak_of_memory_still_gives_the_one_it_was_seen_at(layout: Layout) -> None:
    group = Group.create(layout, "inst", "sbox", LIMITS)
    (made(layout) / "memory.peak").unlink()
    assert group.reading().usage.peak_memory_bytes == 1048576
    (made(layout) / "memory.current").write_text("4096\n")
    assert (group.reading().memory_bytes, group.reading().usage.peak_memory_bytes) == (4096, 1048576)
    group.close()


def test_a_group_path_from_outside_our_namespace_is_not_followed(tmp_path: Path) -> None:
    lay(tmp_path / "other", LEAF)
    root = lay(tmp_path / "cgroup", SYSTEM)
    assert found(tmp_path, root, "/../other").places["memory"].base == str(root)


def test_controllers_mounted_together_share_one_directory(tmp_path: Path) -> None:
    point = lay(tmp_path / "cg roup" / "cpu,cpuacct", {"cgroup.procs": ""})
    escaped = str(point).replace(" ", "\\040")
    (tmp_path / "mountinfo").write_text(f"32 31 0:29 / {escaped} rw - cgroup cgroup rw,cpu,cpuacct\n")
    layout = probe(str(tmp_path), str(tmp_path / "mountinfo"))
    assert layout.by_place() == {layout.places["cpu"]: ["cpu", "cpuacct"]}
    assert layout.places["cpu"].base == str(point)


def test_a_partition_is_throttled_by_its_disk(tmp_path: Path) -> None:
    """A plain tree like /sys/dev/block, where the disk under tmp_path is a partition of another one."""
    number = os.stat(tmp_path).st_dev
    disk = lay(tmp_path / "devices" / "sda", {"dev": "8:0\n"})
    part = lay(disk / "sda1", {"dev": "8:1\n", "partition": "1\n"})
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(part)
    assert whole_disk(str(tmp_path), blocks=str(tmp_path / "block")) == "8:0"
