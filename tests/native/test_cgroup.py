"""Control groups on the real kernel: what they bound, count, stop, and leave behind (M2-M4, H13, H15, H19, H21)."""

from __future__ import annotations

import mmap
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fumehood.errors import (
    CapacityExceeded,
    InvalidInput,
    InvalidTransition,
    ProtectionUnavailable,
    SandboxGone,
    SetupFailed,
)
from fumehood.model import MIB, Enforcement, Limits
from fumehood.runtime.host import cgroup_layout, cgroup_tree
from fumehood.runtime.host.cgroup import Group, Layout, probe, reconcile

pytestmark = pytest.mark.root

LIMITS = Limits(memory_bytes=64 * MIB, pids=16)
ENTER = "import os, sys, time\nfor d in sys.argv[1].split(','): os.write(int(d), b'0'); os.close(int(d))\n"
PAGE = mmap.PAGESIZE
DROP = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
HERE = probe()


@pytest.fixture
def instance() -> Iterator[str]:
    name = f"t{secrets.token_hex(6)}"
    yield name
    reconcile(HERE, name)
    assert not places(HERE, name)


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(group: Group, code: str, *args: str, before: str = "") -> subprocess.Popen[str]:
        with group.doors() as doors:
            argv = [sys.executable, "-c", before + ENTER + code, ",".join(map(str, doors)), *args]
            started.append(subprocess.Popen(argv, pass_fds=doors, text=True, stdout=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(10)
        assert process.stdout
        process.stdout.close()


def places(layout: Layout, *names: str) -> list[str]:
    return [path for place in layout.by_place() if Path(path := place.of(*names)).exists()]


def soon(condition: Callable[[], bool]) -> None:
    assert cgroup_tree.wait(condition, 10.0)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stdout.readline() == "ready\n"


def bounds(layout: Layout, *names: str) -> tuple[int, int]:
    """(memory, swap beyond it) as the kernel has them."""
    if layout.places["memory"].version == 2:
        return int(value(layout, "memory", *names, "memory.max")), int(value(layout, "memory", *names, "memory.swap.max"))
    memory = int(value(layout, "memory", *names, "memory.limit_in_bytes"))
    return memory, int(value(layout, "memory", *names, "memory.memsw.limit_in_bytes")) - memory


def throttle(layout: Layout, *names: str) -> list[str]:
    """The kernel's rules: [read, write]."""
    if layout.places["io"].version == 2:
        return [rule for rule in value(layout, "io", *names, "io.max").split() if "bps=" in rule]
    rules = [value(layout, "io", *names, f"blkio.throttle.{way}_bps_device") for way in ("read", "write")]
    return [f"{way}bps={rule.split()[1]}" for way, rule in zip("rw", rules, strict=True) if rule]


def value(layout: Layout, controller: str, *names: str) -> str:
    return Path(layout.places[controller].of(*names)).read_text().strip()


# --- what is bounded and counted -------------------------------------------------------------------------------------


def test_every_controller_of_this_host_is_found() -> None:
    assert set(HERE.places) == set(cgroup_layout.CONTROLLERS)
    assert HERE.missing == {}


def test_a_memory_hog_is_killed_and_counted_with_its_peak(instance: str, spawn: Any) -> None:
    with Group.create(HERE, instance, "hog1", LIMITS) as group:
        assert spawn(group, "bytearray(500 << 20)").wait(20) == -9
        stats = group.reading()
        assert stats.oom_kills == 1
        assert 0.9 * LIMITS.memory_bytes < stats.usage.peak_memory_bytes <= LIMITS.memory_bytes
        assert stats.memory_bytes < stats.usage.peak_memory_bytes


def test_forks_beyond_the_limit_are_refused_and_counted(instance: str, spawn: Any) -> None:
    code = """
kids = []
try:
    while len(kids) < 100:
        pid = os.fork()
        if pid == 0: time.sleep(60)
        kids.append(pid)
except BlockingIOError:
    print(len(kids), flush=True)
time.sleep(60)
"""
    with Group.create(HERE, instance, "bomb", LIMITS) as group:
        assert spawn(group, code).stdout.readline() == f"{LIMITS.pids - 1}\n"
        stats = group.reading()
        assert (stats.pids_refused, stats.pids, stats.usage.peak_pids) == (1, LIMITS.pids, LIMITS.pids)


@pytest.mark.may_skip("a host with cgroup.kill")
def test_after_a_kill_nothing_can_fork_and_that_is_not_counted_as_the_sandbox_s_doing(instance: str, spawn: Any) -> None:
    """What keeps a fork bomb from outrunning the kill (H15) is no `pids_limit` in the result (H21)."""
    if HERE.places["freezer"].version == 2:
        pytest.skip("cgroup.kill needs no such help")
    with Group.create(HERE, instance, "late", LIMITS) as group:
        group.kill()
        late = spawn(group, "try: os.fork()\nexcept BlockingIOError: print('refused', flush=True)")
        assert late.stdout.readline() == "refused\n"
        assert group.reading().pids_refused == 0


def test_buffers_of_tcp_sockets_are_bounded_too(instance: str, spawn: Any) -> None:
    """H15: v1 has a counter of its own for them, without a limit unless it is set. v2 ends whoever passes the one limit."""
    code = """
import socket
server = socket.create_server(("127.0.0.1", 0), backlog=128)
held = []
for _ in range(100):
    held.append(socket.create_connection(server.getsockname()))
    held.append(server.accept()[0])
    held[-2].setblocking(False)
    try:
        while True: held[-2].send(bytes(1 << 20))
    except BlockingIOError: pass
print("ready", flush=True)
time.sleep(60)
"""
    with Group.create(HERE, instance, "sock", LIMITS) as group:
        process = spawn(group, code)
        if HERE.places["memory"].version == 1:
            ready(process)
            charged = int(value(HERE, "memory", instance, "sock", "memory.kmem.tcp.usage_in_bytes"))
            assert MIB < charged < LIMITS.memory_bytes // 2
        else:
            assert process.stdout.readline() == "" and group.reading().oom_kills == 1
        assert group.reading().memory_bytes <= LIMITS.memory_bytes


def test_a_spinning_process_is_throttled_to_its_quota(instance: str, spawn: Any) -> None:
    with Group.create(HERE, instance, "spin", LIMITS.replace(cpus=0.2, cpu_weight=50)) as group:
        spawn(group, "while True: pass")
        soon(lambda: "nr_throttled 0" not in value(HERE, "cpu", instance, "spin", "cpu.stat"))
        assert group.reading().usage.cpu_s > 0
        file, weight = ("cpu.shares", "512") if HERE.places["cpu"].version == 1 else ("cpu.weight", "50")
        assert value(HERE, "cpu", instance, "spin", file) == weight


def test_direct_writes_are_accounted_and_the_throttle_is_in_the_kernel(instance: str, spawn: Any, tmp_path: Path) -> None:
    code = """
import mmap
fd = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
os.write(fd, mmap.mmap(-1, 1 << 20))
"""
    layout = probe(state_dir=str(tmp_path))
    limits = LIMITS.replace(io_read_bps=10 * MIB, io_write_bps=5 * MIB)
    with Group.create(layout, instance, "disk", limits) as group:
        assert throttle(layout, instance, "disk") == [f"rbps={10 * MIB}", f"wbps={5 * MIB}"]
        assert spawn(group, code, str(tmp_path / "file")).wait(20) == 0
        assert group.reading().usage.io_write_bytes >= 1 * MIB
        group.apply(LIMITS)
        assert throttle(layout, instance, "disk") == []


def test_a_directory_without_a_disk_has_no_device_to_throttle() -> None:
    assert cgroup_layout.whole_disk("/dev/shm") is None
    device = cgroup_layout.whole_disk("/tmp")
    assert device and not Path(f"/sys/dev/block/{device}/partition").exists()


# --- entering --------------------------------------------------------------------------------------------------------


def test_attach_moves_every_thread_into_every_controller(instance: str) -> None:
    code = "import threading, time\nt = threading.Thread(target=time.sleep, args=(60,))\nt.start(); print('ready', flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    ready(process)
    with Group.create(HERE, instance, "threads", LIMITS) as group:
        assert not group.holds(process.pid)
        group.attach(process.pid)
        assert group.holds(process.pid)
        assert group.reading().pids == 2
    assert process.wait(5) == -9
    assert process.stdout
    process.stdout.close()


def test_an_unprivileged_child_enters_by_the_doors_it_was_handed(instance: str, spawn: Any) -> None:
    with Group.create(HERE, instance, "doors", LIMITS) as group:
        process = spawn(group, "print('ready', flush=True); time.sleep(60)", before=DROP)
        ready(process)
        assert group.holds(process.pid)


def test_attaching_a_process_that_has_ended_says_so(instance: str) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with Group.create(HERE, instance, "late", LIMITS) as group, pytest.raises(SandboxGone):
        group.attach(process.pid)


# --- late binding ----------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(32 * MIB, 1 << 32), st.integers(0, 1 << 32))


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(sizes, min_size=1, max_size=6))
def test_any_sequence_of_memory_and_swap_limits_is_accepted_by_the_kernel(steps: list[tuple[int, int]]) -> None:
    instance = f"t{secrets.token_hex(6)}"
    try:
        with Group.create(HERE, instance, "grow", LIMITS) as group:
            for memory, swap in steps:
                group.apply(LIMITS.replace(memory_bytes=memory, swap_bytes=swap))
                whole, beyond = bounds(HERE, instance, "grow")
                assert whole == memory // PAGE * PAGE
                assert abs(beyond - swap) < PAGE  # v1 rounds the sum
    finally:
        reconcile(HERE, instance)


def test_shrinking_below_what_is_in_use_is_refused_and_changes_nothing(instance: str, spawn: Any) -> None:
    big = Limits(memory_bytes=256 * MIB, pids=16)
    with Group.create(HERE, instance, "full", big) as group:
        ready(spawn(group, "x = bytearray(b'x') * (100 << 20); print('ready', flush=True); time.sleep(60)"))
        with pytest.raises(CapacityExceeded) as refusal:
            group.apply(big.replace(memory_bytes=64 * MIB, pids=99))
        assert refusal.value.remediation
        assert group.limits == big
        assert bounds(HERE, instance, "full") == (256 * MIB, 0)
        assert value(HERE, "pids", instance, "full", "pids.max") == "16"
        assert group.reading().oom_kills == 0


# --- freezing and killing --------------------------------------------------------------------------------------------

COUNT = """
import mmap
fd = os.open(sys.argv[2], os.O_RDWR)
shared = mmap.mmap(fd, 8)
while True: shared[:8] = (int.from_bytes(shared[:8], 'little') + 1).to_bytes(8, 'little')
"""


def layouts(tmp_path: Path) -> dict[str, Layout]:
    """This host's own; its unified mount alone; and the v1 ones with the freezer of the unified one."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines(keepends=True)
    (tmp_path / "v2").write_text("".join(line for line in lines if "- cgroup2 " in line))
    (tmp_path / "hybrid").write_text("".join(line for line in lines if "/freezer" not in line))
    return {"v1": HERE} | {name: probe(mounts=str(tmp_path / name)) for name in ("v2", "hybrid")}


OTHERS = [pytest.param(v, marks=pytest.mark.may_skip("a host has one layout")) for v in ("v1", "v2", "hybrid")]


@pytest.fixture(params=OTHERS)
def layout(request: pytest.FixtureRequest, tmp_path: Path, instance: str) -> Iterator[Layout]:
    found = layouts(tmp_path)[request.param]
    if found.mode != request.param:
        pytest.skip(f"this host is {found.mode}, so {request.param} is not to be had")
    yield found
    reconcile(found, instance)


def test_a_frozen_sandbox_does_not_run_and_a_thawed_one_does(layout: Layout, instance: str, spawn: Any, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_bytes(bytes(8))
    with Group.create(layout, instance, "ice1", LIMITS) as group:
        spawn(group, COUNT, str(counter))
        soon(lambda: counter.read_bytes() != bytes(8))
        group.freeze()
        before = counter.read_bytes()
        time.sleep(0.1)
        assert counter.read_bytes() == before
        group.thaw()
        soon(lambda: counter.read_bytes() != before)
        assert group.reading().usage.cpu_s > 0


def test_kill_ends_frozen_processes_too_and_they_run_nothing_first(
    layout: Layout, instance: str, spawn: Any, tmp_path: Path
) -> None:
    counter = tmp_path / "counter"
    counter.write_bytes(bytes(8))
    with Group.create(layout, instance, "ice2", LIMITS) as group:
        process = spawn(group, COUNT, str(counter))
        soon(lambda: counter.read_bytes() != bytes(8))
        group.freeze()
        before = counter.read_bytes()
        group.kill()
        assert process.wait(5) == -9
        assert counter.read_bytes() == before


def test_kill_outruns_a_fork_bomb(layout: Layout, instance: str, spawn: Any) -> None:
    code = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.write(1, b'ready\\n')
end = time.monotonic() + 30
while time.monotonic() < end:
    try: os.fork()
    except OSError: pass
"""
    with Group.create(layout, instance, "bomb", LIMITS.replace(cpus=0.5)) as group:
        if "pids" not in layout.places:  # the unified mount here has no pids controller to bound the bomb
            code = code.replace("os.fork()", "os.fork() or os._exit(0)")
        ready(spawn(group, code))
        group.kill()
        group.remove()
    assert not places(layout, instance, "bomb")


def test_a_process_that_left_the_group_after_it_was_listed_is_not_killed(
    instance: str, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reused pid looks like to the killer: listed first, pinned, and then no member."""
    with Group.create(HERE, instance, "other", LIMITS) as group:
        process = spawn(group, "print('ready', flush=True); time.sleep(60)")
        ready(process)
        real = os.pidfd_open

        def leave(pid: int) -> int:
            for place in HERE.by_place():
                Path(place.base, "cgroup.procs").write_text(str(pid))
            return real(pid)

        monkeypatch.setattr(os, "pidfd_open", leave)
        assert cgroup_tree.signal_all(group._directories[0]) == 1
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)


# --- making and removing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["../etc", "a/b", "", "UPPER", "x" * 40, "a\nbc", ".."])
def test_a_name_that_could_leave_the_tree_is_refused(bad: str, instance: str) -> None:
    with pytest.raises(InvalidInput):
        Group.create(HERE, instance, bad, LIMITS)
    with pytest.raises(InvalidInput):
        Group.create(HERE, bad, "fine", LIMITS)
    with pytest.raises(InvalidInput):
        reconcile(HERE, bad)


def test_a_taken_name_is_refused_and_its_owner_is_left_alone(instance: str) -> None:
    with Group.create(HERE, instance, "taken", LIMITS) as group:
        with pytest.raises(InvalidInput):
            Group.create(HERE, instance, "taken", LIMITS)
        assert group.reading().oom_kills == 0
        assert len(places(HERE, instance, "taken")) == len(HERE.by_place())


def calls_until(patch: pytest.MonkeyPatch, owner: Any, name: str, turn: int) -> list[int]:
    """Let `owner.name` fail at its turn; the list grows with every call."""
    real, calls = getattr(owner, name), list[int]()

    def maybe(*args: Any, **named: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] == turn:
            raise PermissionError(13, "injected")
        return real(*args, **named)

    patch.setattr(owner, name, maybe)
    return calls


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "mkdir"), (cgroup_tree.Directory, "__init__"), (cgroup_tree.Directory, "write")],
    ids=["mkdir", "open", "write"],
)
def test_a_failure_at_any_step_of_create_leaves_no_directory_and_no_descriptor(owner: Any, name: str, instance: str) -> None:
    Group.create(HERE, instance, "warm", LIMITS).remove()
    limits = LIMITS.replace(cpu_weight=200, io_write_bps=MIB)
    with pytest.MonkeyPatch.context() as patch:
        calls = calls_until(patch, owner, name, turn=-1)
        Group.create(HERE, instance, "whole", limits).remove()
    assert calls
    descriptors = len(os.listdir("/proc/self/fd"))
    for turn in calls:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SetupFailed) as failure:
            calls_until(patch, owner, name, turn)
            Group.create(HERE, instance, "half", limits)
        assert "injected" in failure.value.cause
        assert not places(HERE, instance, "half")
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_group_in_use_is_not_removed_and_says_by_whom(instance: str, spawn: Any) -> None:
    with Group.create(HERE, instance, "busy", LIMITS) as group:
        process = spawn(group, "print('ready', flush=True); time.sleep(60)")
        ready(process)
        with pytest.raises(InvalidTransition) as refusal:
            group.remove(timeout_s=0.05)
        assert refusal.value.details["pids"] == [process.pid]


def test_an_unreaped_zombie_does_not_keep_a_group(instance: str, spawn: Any) -> None:
    with Group.create(HERE, instance, "zombie", LIMITS) as group:
        process = spawn(group, "print('ready', flush=True)")
        ready(process)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        group.remove()
        group.remove()
    assert not places(HERE, instance, "zombie")


def test_many_sandboxes_made_at_once_do_not_trip_over_the_first_one_s_parents(instance: str) -> None:
    failures: list[BaseException] = []

    def make(n: int) -> None:
        try:
            Group.create(HERE, instance, f"many{n}", LIMITS).remove()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=make, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_reconcile_ends_and_removes_whatever_a_killed_supervisor_left(instance: str) -> None:
    """H19: one sandbox running, one frozen, one half made when the supervisor was lost to SIGKILL."""
    code = f"""
import os, signal, time
from fumehood.model import Limits
from fumehood.runtime.host.cgroup import Group, probe
layout = probe()
for name in ("running", "frozen"):
    group = Group.create(layout, {instance!r}, name, Limits())
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(60)
    group.attach(pid)
    print(pid, flush=True)
group.freeze()
os.mkdir(next(iter(layout.by_place())).of({instance!r}, "half"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    lost = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert lost.stdout
    pids = [int(lost.stdout.readline()) for _ in range(2)]
    assert lost.wait(20) == -9
    lost.stdout.close()
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert reconcile(HERE, instance) == ("frozen", "half", "running")
    assert not places(HERE, instance)
    soon(lambda: not any(alive(pid) for pid in pids))
    assert reconcile(HERE, instance) == ()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- what is stated --------------------------------------------------------------------------------------------------


def test_protections_state_what_this_kernel_enforces(instance: str) -> None:
    with Group.create(HERE, instance, "stated", LIMITS) as group:
        states = {p.name: p.state for p in group.protections()}
    assert states.pop("block-io") is Enforcement.OFF
    assert states == dict.fromkeys(("cpu", "memory", "swap", "pids", "freezer"), Enforcement.ENFORCED)


def test_a_throttle_is_stated_as_degraded_where_v1_keeps_it_only_in_part(instance: str) -> None:
    with Group.create(HERE, instance, "stated", LIMITS.replace(io_write_bps=MIB)) as group:
        stated = {p.name: p for p in group.protections()}["block-io"]
    if HERE.places["io"].version == 2:
        assert stated.state is Enforcement.ENFORCED
    else:
        assert stated.state is Enforcement.DEGRADED and "page cache" in stated.detail and stated.fix


def test_a_controller_that_is_missing_is_off_with_reason_and_fix(instance: str) -> None:
    partial = replace(HERE, places={"pids": HERE.places["pids"]}, missing=dict.fromkeys(HERE.places, "because"))
    with Group.create(partial, instance, "partial", LIMITS) as group:
        stated = {p.name: p for p in group.protections()}
    assert stated.pop("pids").state is Enforcement.ENFORCED
    assert all(p.state is Enforcement.OFF and p.fix for p in stated.values())
    assert stated["memory"].detail == "because"


def test_a_host_without_any_cgroup_fails_closed_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("")
    layout = probe(mounts=str(tmp_path / "none"))
    assert layout.mode == "none"
    with pytest.raises(ProtectionUnavailable) as refusal:
        Group.create(layout, "inst", "sbox", LIMITS)
    assert "memory" in refusal.value.cause and "Delegate" in refusal.value.remediation


def test_an_ordinary_user_without_delegation_is_offered_nothing_here() -> None:
    code = "p = probe(); print(p.mode, *p.missing.values(), sep='\\n')"
    argv = [sys.executable, "-c", f"from fumehood.runtime.host.cgroup import probe\n{DROP}{code}"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "none"
    assert len(said) == 7 and all("uid 65534" in line for line in said[1:])
