"""Resource attacks (H15): a typed outcome for each, a neighbour that still answers, and nothing left afterwards."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from attack import PRELUDE, descendants, native, open_descriptors, pid_of, processes, until

from fumehood import Sandbox
from fumehood.errors import FumehoodError, InvalidInput
from fumehood.model import MIB

pytestmark = pytest.mark.rootless
LIMITS = {"memory_bytes": 96 * MIB, "pids": 32, "disk_bytes": 16 * MIB, "inodes": 512, "open_files": 128, "timeout_s": 3}
ROOT = os.geteuid() == 0


def rss() -> int:
    """Of this process, the supervisor, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def bomb(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A small sandbox to attack in. Afterwards: the neighbour answers, the supervisor has not grown, nothing is left."""
    with Sandbox(tier="native") as neighbour:
        neighbour.run("1")
        descriptors, memory = open_descriptors(), rss()
        box = Sandbox(tier="native", limits=LIMITS | getattr(request, "param", {})).open()
        agent = pid_of(box)
        try:
            yield box
            assert neighbour.run("6 * 7").text == "42"
            assert rss() - memory < 64 * MIB
            below = descendants(agent) if agent in processes() else {agent}
            uid = processes().get(agent)
        finally:
            box.close()
        alive = processes()
        assert not below & alive.keys()
        assert uid is None or not ROOT or uid not in alive.values()
        until(lambda: len(open_descriptors()) <= len(descriptors), f"left: {open_descriptors()}; before: {descriptors}")
        assert _groups(native()._instance.name) <= 1
        assert neighbour.run("6 * 7").text == "42"


def _groups(instance: str) -> int:
    """How many sandboxes have a memory cgroup under this supervisor's name; the neighbour's is one."""
    place = native()._layout.places.get("memory")
    return len([p for p in Path(place.of(instance)).iterdir() if p.is_dir()]) if place else 0


def test_a_fork_bomb_is_stopped_at_the_pids_limit(bomb: Sandbox) -> None:
    result = bomb.run(PRELUDE + "while True: os.fork() or time.sleep(60)")
    assert result.status in ("pids_limit", "timeout")
    assert bomb.stats().usage.peak_pids <= LIMITS["pids"] + 1


def test_a_shells_fork_bomb_ends_with_its_deadline(bomb: Sandbox) -> None:
    result = bomb.exec("f() { f | f & f; }; f", timeout_s=1)
    assert result.status in ("pids_limit", "timeout", "killed")


def test_a_thread_bomb_is_stopped_at_the_pids_limit(bomb: Sandbox) -> None:
    code = "while True: threading.Thread(target=time.sleep, args=(30,), daemon=True).start()"
    assert bomb.run(PRELUDE + code).status == "pids_limit"


def test_anonymous_memory_is_stopped_at_the_memory_limit(bomb: Sandbox) -> None:
    code = "a = []\nwhile True: a.append(bytearray(b'x') * (1 << 20))"
    assert bomb.exec(["python3", "-c", code]).status == "oom"


def test_files_on_tmpfs_are_stopped_at_the_disk_limit(bomb: Sandbox) -> None:
    for place in ("/tmp", "/dev/shm", "/home/user"):
        assert bomb.exec(f"head -c 40000000 /dev/zero > {place}/f").status == "disk_full"
        bomb.exec(f"rm {place}/f")


def test_a_memfd_does_not_escape_the_memory_limit(bomb: Sandbox) -> None:
    """As root it is charged to the cgroup; a user's watchdog could not see it, so there it is refused."""
    code = "fd = os.memfd_create('x')\nfor _ in range(200): os.write(fd, bytes(1 << 20))\nprint('through')"
    result = bomb.exec(["python3", "-c", PRELUDE + code])
    assert "through" not in result.stdout and result.status in ("oom", "syscall_refused"), result


@pytest.mark.parametrize("bomb", [{"timeout_s": 30}], indirect=True)  # on an emulated processor it takes some
def test_pipes_and_sockets_do_not_escape_the_descriptor_and_memory_limits(bomb: Sandbox) -> None:
    """Each pipe holds 64 KiB (1 MiB if asked), each socket pair its two buffers: bounded by RLIMIT_NOFILE, and charged."""
    code = """
import fcntl
kept = []
def fill():
    while True:
        r, w = os.pipe(); kept.append((r, w)); os.set_blocking(w, False)
        try: fcntl.fcntl(w, 1031, 1 << 20)
        except OSError: pass
        try:
            while True: os.write(w, bytes(65536))
        except BlockingIOError: pass
attempt(fill)
for r, w in kept: os.close(r); os.close(w)
kept = []
def flood():
    while True:
        a, b = socket.socketpair(); kept.append((a, b)); a.setblocking(False)
        try:
            while True: a.send(bytes(65536))
        except BlockingIOError: pass
attempt(flood)
"""
    result = bomb.exec(["python3", "-c", PRELUDE + code])
    assert result.status == "oom" or result.stdout.split() == ["EMFILE", "EMFILE"], result
    if ROOT:
        assert result.usage.peak_memory_bytes <= LIMITS["memory_bytes"]


def test_descriptors_are_bounded(bomb: Sandbox) -> None:
    assert bomb.run(PRELUDE + "k = []\nattempt(lambda: [k.append(os.dup(0)) for _ in range(500)])").stdout == "EMFILE\n"


def test_inodes_are_bounded_and_listing_them_is_too(bomb: Sandbox) -> None:
    assert bomb.exec("i=0; while : > ~/f$i; do i=$((i+1)); done; exit 1").status == "disk_full"
    assert 100 < len(bomb.files.list("~")) <= LIMITS["inodes"]


def test_inotify_watches_are_bounded_by_the_descriptor_limit_and_end_with_the_sandbox(bomb: Sandbox) -> None:
    assert bomb.run(PRELUDE + "attempt(lambda: [syscall(294, 0) for _ in range(500)])").stdout == "EMFILE\n"


def test_a_gigabyte_of_output_is_ended_and_costs_the_host_nothing(bomb: Sandbox) -> None:
    result = bomb.exec("head -c 1073741824 /dev/zero", timeout_s=3)
    assert result.status in ("output_limit", "timeout") and len(result.stdout) <= MIB


def test_a_line_without_end_is_kept_up_to_the_limit(bomb: Sandbox) -> None:
    result = bomb.run("import sys\nfor _ in range(20): sys.stdout.write('z' * (1 << 20))")
    assert result.stdout_truncated and len(result.stdout) <= MIB


def test_a_terabyte_of_holes_cannot_be_pulled_onto_the_host(bomb: Sandbox, tmp_path: Path) -> None:
    """H12: read() and download() stop at their limit; no half file stays."""
    bomb.run("import os\nopen('big', 'w').close(); os.truncate('big', 1 << 40)")
    for pull in (
        lambda: bomb.files.read("big", limit_bytes=8 * MIB),
        lambda: bomb.files.download("big", tmp_path / "big", limit_bytes=8 * MIB),
    ):
        with pytest.raises(InvalidInput):
            pull()
    assert list(tmp_path.iterdir()) == []


def test_a_zip_bomb_meets_the_limits_of_memory_and_disk(bomb: Sandbox) -> None:
    code = """
import zipfile
with zipfile.ZipFile('b.zip', 'w', zipfile.ZIP_DEFLATED) as z, z.open('b', 'w') as f:
    for _ in range(64): f.write(bytes(1 << 20))
zipfile.ZipFile('b.zip').extractall('/tmp/out')
"""
    assert bomb.run(code).status == "disk_full"


def test_a_spinning_cpu_ends_at_the_deadline(bomb: Sandbox) -> None:
    result = bomb.exec("while :; do :; done", timeout_s=0.7)
    assert result.status == "timeout" and result.usage.cpu_s < 2


def test_the_agent_can_be_neither_stopped_nor_killed_from_inside(bomb: Sandbox) -> None:
    """H16: PID 1 has no handler for these, so the kernel drops them (pid_namespaces(7))."""
    for number in ("STOP", "KILL", "TERM", "INT", "QUIT", "HUP", "SEGV", "USR1", "TSTP", "PIPE"):
        bomb.exec(f"kill -{number} 1; kill -{number} -1; true", timeout_s=2)
        assert bomb.exec("echo alive", timeout_s=2).stdout == "alive\n", number


def test_a_program_that_ignores_every_signal_still_ends(bomb: Sandbox) -> None:
    code = "for n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)"
    assert bomb.exec(["python3", "-c", PRELUDE + code], timeout_s=0.5).status == "timeout"
    assert bomb.run(PRELUDE + code.replace("60", "30"), timeout_s=0.5).status == "timeout"


def test_daemons_that_outlive_their_run_end_with_the_sandbox(bomb: Sandbox) -> None:
    bomb.exec("for i in 1 2 3; do setsid nohup sleep 300 </dev/null >/dev/null 2>&1 & done")
    assert len(descendants(pid_of(bomb))) >= 4


def test_an_orphan_that_holds_stdout_does_not_hold_the_result(bomb: Sandbox) -> None:
    result = bomb.exec("setsid sleep 300 & echo done")
    assert result.status == "ok" and result.stdout == "done\n"


def test_a_flood_that_nobody_reads_does_not_grow_the_host(bomb: Sandbox) -> None:
    """Frames of one byte: what they cost the host, not what they carry, is what counts."""
    memory = rss()
    code = "import os\nfor _ in range(10**9): os.write(1, b'x'); os.write(2, b'y')"
    bomb.start(["python3", "-c", code])
    with suppress(FumehoodError):  # the channel is its author's to block
        bomb.exec("sleep 2", timeout_s=2.5)
    assert rss() - memory < 64 * MIB
