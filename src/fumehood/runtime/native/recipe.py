"""The ordered recipe that turns a fresh clone of a zygote into PID 1 of a sandbox. Stdlib only.

Order is security here, and each place has its reason:
  1 report to the supervisor     it writes the id maps and hands us the doors of our cgroups
  2 cgroups, then our own uid    a mount of tmpfs or devpts needs mapped ids; every later file is the sandbox user's
  3 cgroup namespace             after 2, as it makes the present cgroup the root of the view
  4 host name, loopback          need capabilities that 7 takes
  5 mounts                       /proc last of them: it masks with what the root holds
  6 file rules                   on top of the mounts
  7 no_new_privs, capabilities   Landlock and seccomp need the first; nothing privileged comes after
  8 rlimits, Landlock            after 7, which they need or must not undo
  9 seccomp floor                last: the steps above need what it refuses
Only then does the agent read its first byte; nothing that a caller controls ran before (H8).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import struct
from base64 import b64decode
from collections.abc import Callable
from typing import Any, NoReturn

from fumehood.agent import serve as agent
from fumehood.agent import wire
from fumehood.runtime.native import capabilities, landlock, mounts, root, seccomp_install
from fumehood.runtime.native import syscalls as sc

NAMESPACES = sc.NEWUSER | sc.NEWPID | sc.NEWNS | sc.NEWNET | sc.NEWUTS | sc.NEWIPC  # the seventh, cgroup, is step 3
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def preload() -> None:
    """Touch in the zygote what every sandbox needs, so that no fork pays for it."""
    mounts.prepare()
    capabilities.current()
    json.loads(json.dumps({"a": 1.0}))
    struct.pack("16sH14x", b"lo", _IFF_UP)


def receive(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = channel.recv(size - len(data))
        if not chunk:
            os._exit(1)  # the supervisor gave up on us
        data += chunk
    return data


def run(channel: socket.socket, announce_fd: int, *, rootless: bool, map_self: Callable[[int, int], None]) -> NoReturn:
    step = "report"
    try:
        if rootless:
            map_self(root.UID, root.UID)
        channel.sendall(b"\0")
        size, doors, _flags, _address = socket.recv_fds(channel, 4, 16)
        plan = json.loads(receive(channel, int.from_bytes(size, "big")))
        for step, action in _steps(plan, channel, doors):
            _obey_test(step, plan)
            action()
        step = "agent"
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        policy = b64decode(plan["policy"])
        agent.serve(
            channel,
            home=root.HOME,
            confine=lambda: _confine(plan, policy, announce_fd),
            prestart=plan["prestart"],
            traceable="dumpable" in plan.get("without", ()),
        )
        os._exit(0)
    except BaseException as e:  # whatever it is, the supervisor hears of it and the process ends here
        failed = {"step": step, "errno": getattr(e, "errno", None), "message": f"{type(e).__name__}: {e}"[:2000]}
        try:
            channel.sendall(wire.encode_json(0, wire.HELLO, {"setup_failed": failed}))
        finally:
            os._exit(1)


def _obey_test(step: str, plan: dict[str, Any]) -> None:
    """Tests fail a step, or stand still at it while they kill the supervisor (H13, H19)."""
    if step == plan.get("fail_at"):
        raise OSError(errno.EIO, "asked to fail here by a test")
    if step == plan.get("pause_at"):
        os.write(2, f"paused at {step}\n".encode())
        signal.pause()


def _steps(plan: dict[str, Any], channel: socket.socket, doors: list[int]) -> list[tuple[str, Callable[[], object]]]:
    skip = frozenset(plan.get("without", ()))  # a test's switch: shows that each barrier is what stops its attack
    steps: list[tuple[str, Callable[[], object]]] = [
        ("cgroups", lambda: _enter(doors)),
        ("ids", _become_user),
        ("cgroup-namespace", lambda: sc.call(sc.UNSHARE, sc.NEWCGROUP)),
        ("hostname", lambda: _set_hostname(plan["hostname"])),
        ("loopback", _loopback_up),
        ("disk", lambda: _send_fd(channel, mounts.disk(plan["disk_bytes"], plan["inodes"], plan["shown"]))),
        ("terminals", mounts.terminals),
        ("proc", lambda: mounts.proc(plan["memory_bytes"])),
        ("file-rules", lambda: mounts.apply_rules(plan["writable"], plan["read_only"], plan["hidden"])),
        ("no-new-privs", capabilities.no_new_privs),
        ("capabilities", capabilities.drop_all),
        ("rlimits", lambda: _rlimits(plan["rlimits"])),
        ("landlock", lambda: landlock.restrict(tuple(plan["writable"]), tuple(plan["read_only"]))),
        ("seccomp-floor", lambda: seccomp_install.install(b64decode(plan["floor"]))),
    ]
    return [s for s in steps if s[0] not in skip]


def _enter(doors: list[int]) -> None:
    """By ourselves: a supervisor that moves us waits for an RCU grace period, 6 ms. Then it asks the kernel whether we did."""
    for door in doors:
        os.write(door, b"0")
        os.close(door)


def _become_user() -> None:
    # Not from uid 0, so no capability is lost here: they are step 7's to drop.
    os.setresgid(root.UID, root.UID, root.UID)
    os.setresuid(root.UID, root.UID, root.UID)
    os.chdir("/")
    os.setsid()


def _set_hostname(name: str) -> None:
    raw = name.encode()
    sc.call(sc.SETHOSTNAME, raw, len(raw))


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _send_fd(channel: socket.socket, fd: int) -> None:
    socket.send_fds(channel, [b"d"], [fd])
    os.close(fd)


def _rlimits(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _confine(plan: dict[str, Any], policy: bytes, announce_fd: int) -> None:
    """In every child of the agent, last thing before the caller's code. Closes `announce_fd` in that child."""
    without = plan.get("without", ())
    if not {"landlock", "separate"} & set(without):
        landlock.separate()  # before the listener makes this process dumpable, while it has no filter yet
    if "seccomp-policy" not in without:
        seccomp_install.install_with_listener(policy, announce_fd)
