"""H6, H16, H24: what Landlock alone holds, even for root, with no mount and no filter in the way."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cell import in_child

from fumehood.runtime.native import capabilities, landlock


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("home/work", "home/kept", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("before")
    return tmp_path


def attempt(action: Callable[[], Any]) -> int:
    """0, or the errno."""
    try:
        action()
    except OSError as e:
        return e.errno or -1
    return 0


def restricted(place: Path, probe: Callable[[], Any], on: bool = True, **rules: Any) -> Any:
    def body() -> Any:
        capabilities.no_new_privs()
        if on:
            landlock.restrict(**({"writable": [str(place / "home")]} | rules))
        return probe()

    return in_child(body).report


def changes(where: Path) -> dict[str, Callable[[], Any]]:
    def swap() -> None:
        (where / "new").write_text("")
        (where / "new").rename(where / "moved")

    return {
        "write": lambda: (where / "file").write_text("after"),
        "truncate": lambda: os.truncate(where / "file", 0),
        "create": lambda: (where / "created").write_text(""),
        "mkdir": lambda: (where / "dir").mkdir(),
        "symlink": lambda: (where / "link").symlink_to("file"),
        "fifo": lambda: os.mkfifo(where / "fifo"),
        "socket": lambda: socket.socket(socket.AF_UNIX).bind(str(where / "sock")),
        "rename": swap,
        "unlink": lambda: (where / "file").unlink(),
    }


@pytest.mark.parametrize("change", list(changes(Path())))
def test_nothing_outside_the_writable_paths_can_be_changed(place: Path, change: str) -> None:
    outside, inside = changes(place / "outside")[change], changes(place / "home/work")[change]
    report = restricted(place, lambda: [attempt(outside), attempt(inside)])
    assert report == [errno.EACCES, 0]
    assert (place / "outside/file").read_text() == "before"
    assert restricted(place, lambda: attempt(outside), on=False) == 0, "without the barrier it must work"


def test_everything_can_still_be_read_and_run(place: Path) -> None:
    assert restricted(place, lambda: [(place / "outside/file").read_text(), subprocess.call(["/bin/true"])]) == ["before", 0]


@pytest.mark.root
def test_device_nodes_cannot_be_made_even_where_one_may_write(place: Path) -> None:
    def make() -> None:
        os.mknod(place / "home/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))

    assert restricted(place, lambda: attempt(make)) == errno.EACCES
    assert restricted(place, lambda: attempt(make), on=False) == 0


@pytest.mark.parametrize("name", ["null", "zero", "full", "random", "urandom"])
def test_the_harmless_devices_can_be_opened_for_writing(place: Path, name: str) -> None:
    assert restricted(place, lambda: attempt(lambda: os.open(f"/dev/{name}", os.O_RDWR))) == 0


def test_a_terminal_of_ones_own_works(place: Path) -> None:
    def probe() -> str:
        master, slave = os.openpty()
        os.write(slave, b"hi")
        return os.read(master, 8).decode() + str(os.get_terminal_size(slave).columns)

    assert restricted(place, probe) == "hi0"


def test_execution_can_be_bound_to_some_paths(place: Path) -> None:
    script = place / "home/run"
    script.write_bytes(Path("/bin/true").read_bytes())
    script.chmod(0o755)

    def run() -> int:
        return attempt(lambda: subprocess.call([str(script)]))

    assert restricted(place, run, execute=["/usr", "/lib", "/lib64", "/bin"]) == errno.EACCES
    assert restricted(place, run) == 0


def test_read_only_beats_writable_whichever_is_nested(place: Path) -> None:
    home, kept, work = (str(place / n) for n in ("home", "home/kept", "home/work"))
    assert landlock.split([work], [home]) == ([], [])
    assert landlock.split([home], [kept]) == ([home], [kept]), "Landlock can't subtract, so a mount has to"
    assert landlock.split([home], ["/etc", home + "x"]) == ([home], [])
    report = restricted(place, lambda: attempt(lambda: (place / "home/work/new").touch()), writable=[work], read_only=[home])
    assert report == errno.EACCES


def test_read_only_paths_that_need_a_mount_are_named(place: Path) -> None:
    def body() -> Any:
        capabilities.no_new_privs()
        return landlock.restrict([str(place / "home")], [str(place / "home/kept"), "/etc"])

    assert in_child(body).report == [landlock.abi(), [str(place / "home/kept")]]


def test_a_writable_path_that_is_missing_is_an_error_and_nothing_is_left_open(place: Path) -> None:
    def probe() -> list[int]:
        before = len(os.listdir("/proc/self/fd"))
        code = attempt(lambda: landlock.restrict([str(place / "gone")]))
        return [code, len(os.listdir("/proc/self/fd")) - before]

    assert restricted(place, probe, on=False) == [errno.ENOENT, 0]


def agent_and_user_code(probe: Callable[[int], Any], on: bool = True) -> Any:
    """`probe` gets the pid of an "agent" that stays outside of its domain. Neither has a capability (CAP_PERFMON alone
    opens /proc/<pid>/maps and environ past Landlock)."""
    agent = os.fork()
    if agent == 0:
        try:
            capabilities.no_new_privs()
            capabilities.drop_all()
            abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            abstract.bind(f"\0fumehood-{os.getpid()}")
            time.sleep(30)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 10
    while f"@fumehood-{agent}" not in Path("/proc/net/unix").read_text() and time.monotonic() < deadline:
        time.sleep(0.001)
    try:
        return restricted(Path("/tmp"), lambda: (capabilities.drop_all(), probe(agent))[1], on=on, writable=["/tmp"])
    finally:
        os.kill(agent, signal.SIGKILL)
        os.waitpid(agent, 0)


REACHES: dict[str, Callable[[int], Any]] = {
    "signal": lambda pid: os.kill(pid, 0),
    "memory": lambda pid: os.open(f"/proc/{pid}/mem", os.O_RDONLY),
    "environment": lambda pid: Path(f"/proc/{pid}/environ").read_bytes(),
    "descriptors": lambda pid: os.open(f"/proc/{pid}/fd/0", os.O_RDONLY),
    "abstract socket": lambda pid: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", f"\0fumehood-{pid}"),
}


@pytest.mark.parametrize("reach", REACHES)
def test_user_code_cannot_reach_the_agent(reach: str) -> None:
    """H16: same uid, same pid namespace: the domain is what stands between."""
    assert agent_and_user_code(lambda pid: attempt(lambda: REACHES[reach](pid))) in (errno.EPERM, errno.EACCES)
    assert agent_and_user_code(lambda pid: attempt(lambda: REACHES[reach](pid)), on=False) == 0


def test_the_agent_can_still_signal_user_code_and_user_code_its_own_children() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            capabilities.no_new_privs()
            landlock.restrict(["/tmp"])
            child = os.fork()
            if child == 0:
                time.sleep(30)
            os.kill(child, signal.SIGKILL)
            os.write(writer, b"%d" % os.waitpid(child, 0)[1])
            time.sleep(30)
        finally:
            os._exit(0)
    assert int(os.read(reader, 8)) == signal.SIGKILL
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == signal.SIGTERM
    os.close(reader)
    os.close(writer)
