"""/proc and /sys as a sandbox may read them (H23): a golden list, and a search for what only the host knows."""

import os
import re
import socket
from pathlib import Path

import pytest
from attack import words

from fumehood import Sandbox

pytestmark = pytest.mark.rootless
GOLDEN = Path(__file__).with_name("proc_readable.txt")
# Every file of /proc and /sys that gives at least one byte; process numbers are written N.
WALK = r"""
import json, re
def walk():
    seen, found = set(), {}
    for top in ('/proc', '/sys'):
        for where, dirs, files in os.walk(top):
            dirs[:] = [d for d in dirs if not (d.isdigit() and d != str(os.getpid())) and d not in ('self', 'thread-self')]
            for name in files:
                path = f'{where}/{name}'
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                    data = os.read(fd, 1 << 16)
                    os.close(fd)
                except OSError:
                    continue
                if data:
                    found[re.sub(r'/\d+(?=/|$)', '/N', path)] = data.decode(errors='replace')
    return found
"""


def test_what_can_be_read_is_exactly_the_golden_list(box: Sandbox) -> None:
    """H23: an addition of a newer kernel shows up here as a failure, not as a leak; `task/` repeats its process."""
    seen = set(words(box, WALK + "print(*walk(), sep='\\n')"))
    golden = set(GOLDEN.read_text().split())
    assert {p for p in seen if not p.startswith("/proc/N/")} == {p for p in golden if not p.startswith("/proc/N/")}
    assert seen <= golden, sorted(seen - golden)


def test_sys_is_empty(box: Sandbox) -> None:
    """H23"""
    assert words(box, "print(os.listdir('/sys'))") == ["[]"]


def test_a_walk_finds_no_fact_of_the_host(box: Sandbox) -> None:
    """H23: names, boot, command lines, devices, processes, mounts that are not the template's."""
    box.run("import json")
    result = box.run("import os\n" + WALK + "print(json.dumps(walk()))")
    assert result.error is None
    text = result.stdout
    secrets = {
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        Path("/proc/cmdline").read_text().strip(),
        Path("/proc/version").read_text().split("(", 1)[-1].split(")")[0],
        socket.gethostname(),
        str(Path.cwd() / "tests"),
    }
    if Path("/etc/machine-id").exists():
        secrets.add(Path("/etc/machine-id").read_text().strip())
    assert [s for s in secrets if len(s) > 3 and s in text] == []


def test_only_its_own_processes_are_there(box: Sandbox) -> None:
    """H24: host pids are unknown inside; kill(2) reaches none."""
    seen = [int(w) for w in words(box, "print(*(p for p in os.listdir('/proc') if p.isdigit()))")]
    assert 1 in seen and len(seen) <= 3
    assert words(box, f"attempt(os.kill, {os.getpid()}, 0)") in (["ESRCH"], ["EPERM"])


def test_mounts_are_the_templates_and_its_own_and_all_but_its_own_are_read_only(box: Sandbox) -> None:
    """H6, H23: each mount point, its options, and no source directory of the host outside the template."""
    lines = [line.split(" - ") for line in box.exec("cat /proc/self/mountinfo").stdout.splitlines()]
    own = re.compile(r"/(tmp|home/user|dev/shm|dev/pts|proc)(/.*)?")
    for left, right in lines:
        point, options = left.split()[4], left.split()[5].split(",")
        # A device node is rw and has no bits that exec could use; its owner is not mapped inside.
        assert "nosuid" in options or point.startswith("/dev/"), left
        assert "ro" in options or own.fullmatch(point) or point.startswith("/dev/"), left
        assert right.split()[0] not in ("cgroup", "cgroup2", "sysfs", "debugfs", "securityfs", "mqueue"), right


def test_no_descriptor_but_three_reaches_user_code(box: Sandbox) -> None:
    """H5, H16: neither a program nor a context inherits one (a context has its own control socket)."""
    assert box.exec(["python3", "-c", "import os; print(*sorted(os.listdir('/proc/self/fd')))"]).stdout.split() == list("0123")
    links = "['/proc/self/fd/' + f for f in os.listdir('/proc/self/fd')]"
    found = words(box, f"print(*(os.readlink(f).split(':')[0] for f in {links} if os.path.exists(f)))")
    assert set(found) <= {"/dev/null", "pipe", "socket"} and found.count("socket") <= 1, found


def test_the_environment_holds_nothing_of_the_hosts(box: Sandbox) -> None:
    """H8, H23"""
    os.environ["FUMEHOOD_TEST_CANARY"] = "canary-of-the-host"
    try:
        with Sandbox(tier="native") as fresh:
            assert "canary" not in fresh.exec("env; cat /proc/self/environ /proc/1/environ 2>/dev/null").stdout
    finally:
        del os.environ["FUMEHOOD_TEST_CANARY"]
    names = set(box.exec("env").stdout.replace("=", " ").split()[::2])
    assert not names & {"LD_PRELOAD", "PYTHONPATH", "PYTHONSTARTUP", "SUDO_USER", "SSH_AUTH_SOCK"}
