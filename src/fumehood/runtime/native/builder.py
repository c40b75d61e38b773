"""Program 1 of a zygote: builds the template's root, then execs program 2 (zygote.py) inside it. Stdlib only.

It runs in the host's view, with the supervisor's powers, and reads one order from its supervisor. The exec at its end
leaves nothing of the host's process image to leak. What it becomes is PID 1 of a pid namespace, so that its end, for
whatever reason, is the end of every sandbox made from it: nothing outlives a killed supervisor (H19).
"""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any, NoReturn

from fumehood.runtime.native import root
from fumehood.runtime.native import syscalls as sc

_LOADER = "import sys; sys.path.insert(0, {path!r}); from fumehood.runtime.native import {entry}; {entry}.main({fd})"
_PYTHONS = ("/usr/local/bin/python3", "/usr/bin/python3", "/opt/venv/bin/python3", "/bin/python3")


def command(python: str, path: str, entry: str, control_fd: int) -> list[str]:
    # -I: no environment, no user site, no current directory (H8). `build` needs no site-packages at all.
    loader = _LOADER.format(path=path, entry=entry, fd=control_fd)
    return [python, "-I", *(["-S"] if entry == "builder" else []), "-B", "-c", loader]


def _die_with_parent() -> None:
    parent = os.getppid()
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _fail(control: socket.socket, message: str) -> NoReturn:
    control.send(json.dumps({"failed": message}).encode())
    os._exit(1)


def read_order(control: socket.socket) -> dict[str, Any]:
    """The supervisor sends it once for each program: an environment or argument would show in every sandbox's /proc."""
    return json.loads(control.recv(1 << 16))


def map_self(uid: int, gid: int) -> None:
    """One id mapped by ourselves, as an unprivileged user may (user_namespaces(7)); setgroups has to go first."""
    for name, line in (("setgroups", "deny"), ("uid_map", f"{root.UID} {uid} 1"), ("gid_map", f"{root.UID} {gid} 1")):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(fd, line.encode())
        os.close(fd)


def main(control_fd: int) -> None:
    """The order is forced: ids before mounts (rootless), fork before /proc, uid drop last before exec."""
    control = socket.socket(fileno=control_fd)
    order = read_order(control)
    rootless = order["uid"] is None
    os.umask(0o022)  # sandboxes of other uids walk the root built below; a caller's 077 would shut them out of it
    _die_with_parent()
    uid, gid = os.getuid(), os.getgid()
    sc.call(sc.UNSHARE, sc.NEWNS | sc.NEWPID | sc.NEWIPC | sc.NEWUTS | (sc.NEWUSER if rootless else 0))
    if rootless:
        map_self(uid, gid)
    pid = os.fork()
    if pid:  # stays outside, as the parent whose death takes the pid namespace along
        control.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    _die_with_parent()
    # A zygote has no network either; after fork, so that the waiter keeps nothing of it.
    sc.call(sc.UNSHARE, sc.NEWNET & ~order["keep"])
    try:
        root.build(order["scratch"], order["package"], order["template"], order["prefixes"])
    except OSError as e:
        _fail(control, f"building the root: {e}")
    if not rootless:
        os.setgroups([])
        os.setresgid(order["uid"], order["uid"], order["uid"])
        os.setresuid(order["uid"], order["uid"], order["uid"])
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of credentials cleared it (prctl(2))
    python = order["python"] or next((p for p in _PYTHONS if os.path.exists(p)), None)
    if python is None:
        control.send(
            json.dumps({"failed": "the image has no Python 3 where one is looked for: " + ", ".join(_PYTHONS)}).encode()
        )
        os._exit(1)
    control.send(json.dumps({"built": True}).encode())
    os.set_inheritable(control_fd, True)
    # The template's own Python first: a program finds the packages that code in a context finds.
    path = dict.fromkeys((os.path.dirname(python), "/usr/local/bin", "/usr/bin", "/bin"))
    env = {"PATH": ":".join(path), "HOME": root.HOME, "LANG": "C.UTF-8"}
    os.execve(python, command(python, f"{root.SUPPORT}/lib", "zygote", control_fd), env)
