"""PID 1 of the lane's guest: a host with cgroup v2 alone, delegated as systemd would. Runs pytest and reports. Only stdlib.

It reads /checkout/order.json: `clock_s`, and `runs`: a list of {"name": "tester" or "root", "argv": arguments of pytest}.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

TESTER, UID = "tester", 1001
END = "=== lane: end"
CHECKOUT, GROUPS = Path("/checkout"), Path("/sys/fs/cgroup")
# A user's manager is delegated to by the system's; its scope is marked by the former, which may set user.* attributes only.
_MANAGER = GROUPS / f"user.slice/user-{UID}.slice/user@{UID}.service"
_SCOPE = _MANAGER / "app.slice/lane.scope"
_SERVICE = GROUPS / "system.slice/fumehood.service"
# (uid, home, the delegated group, which the process starts in)
RUNNERS: dict[str, tuple[int, str, Path]] = {TESTER: (UID, f"/home/{TESTER}", _SCOPE), "root": (0, "/root", _SERVICE)}
_DELEGATED_FILES = ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads")
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_MS_NOSUID_NODEV, _MS_BIND = 2 | 4, 4096
_RB_AUTOBOOT = 0x01234567
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    if _libc.mount(source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def _mount_all() -> None:
    for name in ("pts", "shm"):
        os.makedirs(f"/dev/{name}", exist_ok=True)
    _mount("devpts", "/dev/pts", "devpts", 2, "gid=5,mode=620,ptmxmode=666")
    _mount("shm", "/dev/shm", "tmpfs", _MS_NOSUID_NODEV, "mode=1777")
    _mount("run", "/run", "tmpfs", _MS_NOSUID_NODEV, "mode=755")
    _mount("cgroup2", str(GROUPS), "cgroup2", _MS_NOSUID_NODEV, "nsdelegate,memory_recursiveprot")
    for name, to in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        os.symlink(f"/proc/self/fd{to}", f"/dev/{name}")
    os.mkdir("/run/scratch")
    _mount(_disk("scratch"), "/run/scratch", "ext4", _MS_NOSUID_NODEV)
    for name, mode in {"tmp": 0o1777, "home": 0o755, "root": 0o700, "var": 0o755}.items():
        os.mkdir(f"/run/scratch/{name}")
        os.chmod(f"/run/scratch/{name}", mode)
        _mount(f"/run/scratch/{name}", f"/{name}", flags=_MS_BIND)
    os.mkdir("/var/lib")
    os.mkdir(f"/home/{TESTER}", 0o700)
    os.chown(f"/home/{TESTER}", UID, UID)


def _disk(serial: str) -> str:
    return next(f"/dev/{p.parent.name}" for p in Path("/sys/block").glob("vd*/serial") if p.read_text().strip() == serial)


def _hand_down(group: Path) -> None:
    (group / "cgroup.subtree_control").write_text("+cpu +io +memory +pids")


def _make_groups() -> None:
    (GROUPS / "init.scope").mkdir()
    (GROUPS / "init.scope/cgroup.procs").write_text("1")
    for group in (_MANAGER, _SERVICE):
        group.mkdir(parents=True)
        for above in reversed(group.relative_to(GROUPS).parents):
            _hand_down(GROUPS / above)
        os.setxattr(group, "trusted.delegate", b"1")
    for name in _DELEGATED_FILES:
        os.chown(_MANAGER / name, UID, UID)
    os.seteuid(UID)
    _SCOPE.mkdir(parents=True)
    for above in (_MANAGER, _SCOPE.parent):
        _hand_down(above)
    os.setxattr(_SCOPE, "user.delegate", b"1")
    os.seteuid(0)


def _settle_machine(clock_s: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, clock_s)
    socket.sethostname("v2-lane-machine")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
    switch = Path("/proc/sys/kernel/unprivileged_userns_clone")  # Debian's
    if switch.exists():
        switch.write_text("1")


def _run(run: dict[str, Any], report: int) -> None:
    name, junit = run["name"], Path(f"/tmp/{run['name']}.xml")
    argv = [sys.executable, "-m", "pytest", *run["argv"], f"--junitxml={junit}"]
    child = os.fork()
    if child == 0:
        _become(name, argv, report)
    while (ended := os.wait())[0] != child:  # PID 1 has everybody's orphans
        pass
    results = junit.read_bytes() if junit.exists() else b""
    head = f"\n=== lane: run {name} {os.waitstatus_to_exitcode(ended[1])} {len(results)}\n"
    os.write(report, head.encode())
    _write_all(report, results)


def _become(name: str, argv: list[str], report: int) -> NoReturn:
    try:
        uid, home, group = RUNNERS[name]
        (group / "cgroup.procs").write_text(str(os.getpid()))
        for fd in (1, 2):
            os.dup2(report, fd)
        os.setsid()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        os.chdir(CHECKOUT)
        os.execve(argv[0], argv, _environment(home, group))
    except OSError as e:
        os.write(report, f"{e!r}\n".encode())
    os._exit(99)


def _environment(home: str, group: Path) -> dict[str, str]:
    return {
        "HOME": home,
        "LANG": "C.UTF-8",
        "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin",
        "PYTHONPATH": ":".join(str(CHECKOUT / part) for part in ("src", "tests", "tests/security")),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/hypothesis",
        "CI": "true",  # a skip that is not accepted is a failure (tests/conftest.py)
        "LANE_DELEGATED": str(group),
        "FUMEHOOD_AGENT_TIMEOUT_S": "60",  # everything is emulated
        "FUMEHOOD_ZYGOTE_START_TIMEOUT_S": "180",
    }


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data[: 1 << 14]) :]


def main() -> None:
    order = json.loads((CHECKOUT / "order.json").read_text())
    _mount_all()
    _make_groups()
    _settle_machine(order["clock_s"])
    port = next(p.parent.name for p in Path("/sys/class/virtio-ports").glob("*/name") if p.read_text() == "lane.report\n")
    report = os.open(f"/dev/{port}", os.O_WRONLY)
    for run in order["runs"]:
        _run(run, report)
    os.write(report, f"{END}\n".encode())
    os.sync()
    _libc.reboot(_RB_AUTOBOOT)  # under -no-reboot the machine's end


if __name__ == "__main__":
    main()
