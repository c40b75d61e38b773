"""Resource attacks in a machine: each ends by its own limit with its own status, and the machine and the host go on (H15, H21).

A machine of Firecracker's on a host of the kvm_pvm kind takes a millisecond or more for a page and half a second for a fork, so
of the ways to use up memory it meets one; they differ in the guest's kernel alone, which under QEMU meets them all.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest
from hostile import LIMITS, MOST, PRELUDE, words

from fumehood import Sandbox
from fumehood.errors import SandboxGone
from fumehood.execution import STOP_GRACE_S
from fumehood.model import MIB
from fumehood.runtime.microvm.driver import EMULATED
from fumehood.runtime.microvm.places import OVERHEAD_BYTES

pytestmark = [pytest.mark.microvm, pytest.mark.root]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def bomb(tier: str) -> Iterator[Sandbox]:
    """One for all: after each attack the next one finds it working, and what was before the first is still there."""
    with Sandbox(tier=tier, url="", limits={**MOST, "lifetime_s": 3000}) as sandbox:
        sandbox.files.write("kept", "from before")
        yield sandbox


@pytest.fixture(autouse=True)
def goes_on(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "bomb" in request.fixturenames:
        box: Sandbox = request.getfixturevalue("bomb")
        assert box.run("open('kept').read()").text == "'from before'"


HOARDS = {
    "anonymous": "kept = bytearray(48 << 20)\nkept[::4096] = b'x' * (len(kept) >> 12)",
    "memfd": "fd = os.memfd_create('x')\nfor _ in range(48): os.write(fd, bytes(1 << 20))",
    "shm": "n = syscall(29, 0, 48 << 20, 0o1600)\nat = syscall(30, n, 0, 0); syscall(31, n, 0, 0); ctypes.memset(at, 1, 1<<25)",
    "pipes": """
import fcntl
kept = []
for _ in range(24):
    kept.append(os.pipe()); fcntl.fcntl(kept[-1][1], 1031, 1 << 20)
    try:
        while os.set_blocking(kept[-1][1], False) is None: os.write(kept[-1][1], bytes(65536))
    except BlockingIOError: pass
for _ in range(24): kept.append(bytearray(b'x') * (1 << 20))""",
}


def test_a_memory_bomb_ends_as_oom_with_its_limit_and_costs_only_its_process(bomb: Sandbox, tier: str) -> None:
    for name in HOARDS if tier == "qemu" else ("anonymous",):
        result = bomb.run(PRELUDE + HOARDS[name] + "\nprint('through')")
        assert result.status == "oom" and str(MOST["memory_bytes"]) in result.cause and "through" not in result.stdout, name
        assert result.usage.peak_memory_bytes <= machine_bytes(bomb) + OVERHEAD_BYTES


def machine_bytes(box: Sandbox) -> int:
    return box.live.handle.origin.machine.memory_bytes  # pyright: ignore


# By a shell: Python's traceback of a failure costs ten times what the attack does.
FORKS = "trap 'kill -9 $kept' EXIT; for n in $(seq 40); do sleep 60 & kept=\"$kept $!\"; echo $n; done"
FILES = "n=0; while : > /tmp/i$n; do n=$((n + 1)); done"
BYTES = "dd if=/dev/zero of=/tmp/big bs=64k; for d in /dev/shm /home/user; do echo x > $d/x || echo full; done; exit 1"
THREADS = """
go = threading.Event()
try:
    for _ in range(40): threading.Thread(target=go.wait).start()
finally:
    print(threading.active_count()); go.set()
"""


def test_a_bomb_of_processes_is_bounded_and_named(bomb: Sandbox) -> None:
    result = bomb.exec(["sh", "-c", FORKS])
    assert result.status == "pids_limit" and str(MOST["pids"]) in result.cause, result
    assert 2 <= len(result.stdout.split()) <= MOST["pids"] and result.usage.peak_pids <= MOST["pids"] + 1


def test_a_bomb_of_threads_is_bounded_and_named(bomb: Sandbox) -> None:
    result = bomb.run(PRELUDE + THREADS)
    assert result.status == "pids_limit" and str(MOST["pids"]) in result.cause, result
    assert 2 <= int(result.stdout) <= MOST["pids"]


def test_a_full_disk_is_one_for_all_that_can_be_written_and_is_named(bomb: Sandbox) -> None:
    result = bomb.exec(["sh", "-c", BYTES])
    assert result.status == "disk_full" and str(MOST["disk_bytes"]) in result.cause, result
    assert result.stdout.split() == ["full"] * 2
    assert words(bomb, "for p in ('/tmp/big', '/dev/shm/x', '/home/user/x'): os.remove(p)\nwrite('/tmp/x'); print('room')") == [
        "room"
    ]


def test_a_million_files_are_few_and_named(bomb: Sandbox) -> None:
    result = bomb.exec(["sh", "-c", FILES])
    assert result.status == "disk_full" and f"{MOST['inodes']} inodes" in result.cause, result
    assert 10 < len(bomb.files.list("/tmp")) < MOST["inodes"]
    assert words(bomb, "for n in os.listdir('/tmp'): os.remove(f'/tmp/{n}')\nwrite('/tmp/x'); print('room')") == ["room"]


def test_descriptors_are_bounded(bomb: Sandbox) -> None:
    code = "kept = []\nattempt(lambda: [kept.append(os.dup(0)) for _ in range(200)])\nfor fd in kept: os.close(fd)"
    assert words(bomb, code) == ["EMFILE"]


def answers(box: Sandbox) -> None:
    """Or is gone: one that does not stop at once, as on a busy machine, takes its sandbox along (H17)."""
    with contextlib.suppress(SandboxGone):
        assert box.run("6 * 7").text == "42"


def test_a_flood_of_output_is_ended_and_named_and_little_of_it_is_kept(tier: str) -> None:
    with Sandbox(tier=tier, url="", limits={**MOST, "output_kill_bytes": MIB}) as box:
        result = box.run("import os\nwhile True: os.write(1, bytes(65536))")
        assert result.status == "output_limit" and str(MIB) in result.cause and len(result.stdout) <= MIB
        answers(box)


def test_a_loop_without_end_that_hears_no_signal_ends_at_its_deadline(tier: str) -> None:
    code = "for n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass"
    with Sandbox(tier=tier, url="", limits=MOST) as box:
        assert box.run(PRELUDE + code, timeout_s=1).status == "timeout"
        answers(box)


STARVED = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        while True: pass
while True: pass
"""


def test_a_deadline_is_not_stretched_by_who_competes_for_the_processor(tier: str) -> None:
    """H17: the agent is patient with a session that gets none, the host is not."""
    with Sandbox(tier=tier, url="", limits=MOST) as box:
        began = time.monotonic()
        result = box.run(PRELUDE + STARVED, timeout_s=6)
        assert result.status == "timeout" and time.monotonic() - began < 6 + STOP_GRACE_S * EMULATED.grace + 1.0


def test_what_a_monitor_may_use_of_the_host_is_bounded_whatever_its_guest_does(tier: str) -> None:
    """Memory, threads, processor time: by the kernel's own account of a guest that spins."""
    with Sandbox(tier=tier, url="", limits={**MOST, "cpus": 0.2}) as box:
        pid = box.live.handle.machine.pid  # pyright: ignore
        groups = hostile.groups(pid)
        most, swapping = machine_bytes(box) + OVERHEAD_BYTES, ("memory.memsw.limit_in_bytes", "memory.swap.max")
        assert number(groups, "memory", "memory.limit_in_bytes", "memory.max") == most
        assert all(number(groups, "memory", name) in (most, 0) for name in swapping if exists(groups, "memory", name))
        assert number(groups, "pids", "pids.max") == 32
        quota = [int(word) for word in text(groups, "cpu", "cpu.cfs_quota_us", "cpu.max").split()]
        period = quota[1] if len(quota) > 1 else number(groups, "cpu", "cpu.cfs_period_us")
        assert quota[0] / period == 0.2
        assert box.run("while True: pass", timeout_s=1).status == "timeout"
        throttled = dict(line.split() for line in text(groups, "cpu", "cpu.stat").splitlines())
        assert int(throttled["nr_throttled"]) > 0


def _file(groups: dict[str, Path], controller: str, names: tuple[str, ...]) -> Path:
    directory = groups.get(controller) or groups[""]
    return next((directory / name for name in names if (directory / name).exists()), directory / names[0])


def exists(groups: dict[str, Path], controller: str, name: str) -> bool:
    return _file(groups, controller, (name,)).exists()


def text(groups: dict[str, Path], controller: str, *names: str) -> str:
    return _file(groups, controller, names).read_text()


def number(groups: dict[str, Path], controller: str, *names: str) -> int:
    return int(text(groups, controller, *names))


def test_a_flood_that_nobody_reads_stands_still_and_grows_neither_host_nor_monitor(tier: str) -> None:
    with Sandbox(tier=tier, url="", limits=MOST) as box:
        link, before = box.live.link, rss_bytes()
        box.start(["cat", "/dev/zero"])
        until = time.monotonic() + PATIENCE_S
        while link._space.is_set():
            assert time.monotonic() < until, "it never filled what the host keeps of it"
            time.sleep(0.05)
        assert sum(stream.buffered_bytes for stream in link._streams.values()) < 9 * MIB
        assert rss_bytes() - before < 64 * MIB
        assert box.live.handle.stats().memory_bytes <= machine_bytes(box) + OVERHEAD_BYTES


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_disk_is_read_no_faster_than_the_policy_says(tier: str) -> None:
    """H21: by the monitor, which a golden snapshot gave another limit, or none."""
    code = """
import time
began, size = time.monotonic(), 0
for name in os.listdir('/usr/lib/python3.11'):  # sources, of which the guest has read the compiled form only
    if name.endswith('.py') and size < 3 << 20:
        with open('/usr/lib/python3.11/' + name, 'rb') as source: size += len(source.read())
print(size, time.monotonic() - began)
"""
    with Sandbox(tier=tier, url="", limits={**LIMITS, "io_read_bps": MIB // 2}) as box:
        size, took_s = words(box, code)
    assert int(size) >= 3 * MIB and float(took_s) > 4, took_s  # 6 s, but for what was read ahead or comes at once
