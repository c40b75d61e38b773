"""The zygote: one process per template that holds the root and the imports; a sandbox is a fork of it. Stdlib only.

Two programs in one file, each a fresh exec with a clean environment:

1. `build` runs in the host's view: makes the namespaces, builds the root, pivots into it, becomes unprivileged, then
   execs 2. with the template's own Python, so that nothing of the host's process image is left to leak.
2. `serve` preloads, then answers each request for a sandbox by one clone() with the new namespaces (recipe.py).

It holds no secret, listens to its supervisor only, and stays single-threaded. It is PID 1 of a pid namespace, so that
its end, for whatever reason, is the end of every sandbox made from it: nothing outlives a killed supervisor (H19).
"""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any, NoReturn

from fumehood.runtime.native import recipe, root
from fumehood.runtime.native import syscalls as sc

_LOADER = "import sys; sys.path.insert(0, {path!r}); from fumehood.runtime.native import zygote; zygote.{entry}({fd})"
_PYTHONS = ("/usr/local/bin/python3", "/usr/bin/python3", "/opt/venv/bin/python3", "/bin/python3")


def command(python: str, path: str, entry: str, control_fd: int) -> list[str]:
    # -I: no environment, no user site, no current directory (H8). `build` needs no site-packages at all.
    loader = _LOADER.format(path=path, entry=entry, fd=control_fd)
    return [python, "-I", *(["-S"] if entry == "build" else []), "-B", "-c", loader]


def _die_with_parent() -> None:
    parent = os.getppid()
    sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _fail(control: socket.socket, message: str) -> NoReturn:
    control.send(json.dumps({"failed": message}).encode())
    os._exit(1)


def _map_self(uid: int, gid: int) -> None:
    """One id mapped by ourselves, as an unprivileged user may (user_namespaces(7)); setgroups has to go first."""
    for name, line in (("setgroups", "deny"), ("uid_map", f"{root.UID} {uid} 1"), ("gid_map", f"{root.UID} {gid} 1")):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(fd, line.encode())
        os.close(fd)


def build(control_fd: int) -> None:
    """Program 1. The order is forced: ids before mounts (rootless), fork before /proc, uid drop last before exec."""
    control = socket.socket(fileno=control_fd)
    order: dict[str, Any] = json.loads(control.recv(1 << 16))
    rootless = order["uid"] is None
    _die_with_parent()
    uid, gid = os.getuid(), os.getgid()
    sc.call(sc.UNSHARE, sc.NEWNS | sc.NEWPID | sc.NEWIPC | sc.NEWUTS | (sc.NEWUSER if rootless else 0))
    if rootless:
        _map_self(uid, gid)
    pid = os.fork()
    if pid:  # stays outside, as the parent whose death takes the pid namespace along
        control.close()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    _die_with_parent()
    sc.call(sc.UNSHARE, sc.NEWNET)  # a zygote has no network either; after fork, so that the waiter keeps nothing of it
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
    os.set_inheritable(control_fd, True)
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": root.HOME, "LANG": "C.UTF-8", "FUMEHOOD_ORDER": json.dumps(order)}
    os.execve(python, command(python, f"{root.SUPPORT}/lib", "serve", control_fd), env)


def serve(control_fd: int) -> NoReturn:
    """Program 2: preload, then one message = one sandbox. Ends with the supervisor's end of the socket."""
    order: dict[str, Any] = json.loads(os.environ.pop("FUMEHOOD_ORDER"))
    os.environ.update(order["environ"])
    from fumehood.agent import python as executor

    control = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    os.umask(0o022)
    os.chdir("/")
    executor.preload(tuple(order["template"]["preload"]))
    recipe.preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: the supervisor watches each sandbox by pidfd
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the caller to handle
    control.send(json.dumps({"ready": os.getpid()}).encode())
    while True:
        request, fds, _flags, _address = socket.recv_fds(control, 64, 1)
        if not request:
            os._exit(0)
        _spawn(control, fds[0], rootless=order["uid"] is None)


def _spawn(control: socket.socket, channel_fd: int, *, rootless: bool) -> None:
    """Answers only when clone() failed: a child that lives reports on its own channel."""
    try:
        pid = sc.clone(recipe.NAMESPACES)
    except OSError as e:
        control.send(json.dumps({"failed": f"clone: {e}"}).encode())
    else:
        if pid == 0:
            control.close()
            recipe.run(socket.socket(fileno=channel_fd), rootless=rootless, map_self=_map_self)
    os.close(channel_fd)
