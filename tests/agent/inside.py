"""Runs an agent in a process of its own: `inside.py CHANNEL_FD HOME [--init [--disk BYTES]] [--prestart LANGUAGE]`.

It has no capabilities, since permissions mean nothing to a full root. --init makes it a real PID 1 with its own /proc;
--disk gives it a /tmp, with HOME in it, of that size.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import socket

from fumehood.agent import python
from fumehood.agent.serve import serve
from fumehood.runtime.native import capabilities
from fumehood.runtime.native import syscalls as sc

PR_SET_NO_NEW_PRIVS = 38


def confine() -> None:
    """A real barrier that user code can be asked about (NoNewPrivs in /proc/self/status)."""
    if ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("prctl")


def refuse() -> None:
    raise OSError("refused to confine")


def become_init() -> None:
    """Goes on in a child that is PID 1; this process waits for it."""
    root = os.geteuid() == 0
    waiting, mapped = os.pipe()
    pid = sc.clone((0 if root else sc.NEWUSER) | sc.NEWPID | sc.NEWNS)
    if pid:
        if not root:
            for name, line in (("setgroups", "deny"), ("uid_map", "1000 %d 1"), ("gid_map", "1000 %d 1")):
                with open(f"/proc/{pid}/{name}", "w") as file:
                    file.write(line % os.getuid() if "%" in line else line)
        os.write(mapped, b"x")
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    os.read(waiting, 1)
    sc.mount("", "/", flags=sc.MS_REC | sc.MS_PRIVATE)
    sc.mount("proc", "/proc", "proc")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("channel", type=int)
    parser.add_argument("home")
    parser.add_argument("--init", action="store_true")
    parser.add_argument("--disk", type=int)
    parser.add_argument("--preload", action="store_true", help="as a zygote does, so that sessions start fast")
    parser.add_argument("--open-files", type=int)
    parser.add_argument("--fail-confine", action="store_true")
    parser.add_argument("--prestart", action="append", default=[])
    args = parser.parse_args()
    if args.init:
        become_init()
    if args.disk:
        sc.mount("tmpfs", "/tmp", "tmpfs", data=f"size={args.disk}")
        os.mkdir(args.home)
    capabilities.drop_all()
    if args.preload:
        python.preload(())
    if args.open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (args.open_files, args.open_files))
    last_step = refuse if args.fail_confine else confine
    serve(socket.socket(fileno=args.channel), home=args.home, confine=last_step, prestart=args.prestart)
