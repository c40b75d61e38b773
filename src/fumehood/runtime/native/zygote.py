"""The zygote: one process per template that holds the root and the imports; a sandbox is a fork of it. Stdlib only.

Started by builder.py inside the template's root, unprivileged. It preloads, then answers each request for a sandbox by
one clone() with the new namespaces (recipe.py). It holds no secret, listens to its supervisor only, and stays
single-threaded.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import NoReturn

from fumehood.runtime.native import heap, recipe
from fumehood.runtime.native import syscalls as sc
from fumehood.runtime.native.builder import map_self, read_order


def main(control_fd: int) -> NoReturn:
    """Preload, then one message = one sandbox. Ends with the supervisor's end of the socket."""
    control = socket.socket(fileno=control_fd)
    order = read_order(control)
    os.environ.update(order["environ"])
    from fumehood.agent import python as executor

    os.set_inheritable(control_fd, False)
    os.umask(0o022)
    os.chdir("/")
    executor.preload(tuple(order["template"]["preload"]))
    recipe.preload()
    heap.move_to_memfd()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: the supervisor watches each sandbox by pidfd
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the caller to handle
    control.send(json.dumps({"ready": os.getpid()}).encode())
    while True:
        request, fds, _flags, _address = socket.recv_fds(control, 64, 2)
        if not request:
            os._exit(0)
        _spawn(control, *fds, rootless=order["uid"] is None, flags=recipe.NAMESPACES & ~order["keep"])


def _spawn(control: socket.socket, channel_fd: int, announce_fd: int, *, rootless: bool, flags: int) -> None:
    """Answers only when clone() failed: a child that lives reports on its own channel."""
    try:
        pid = sc.clone(flags)
    except OSError as e:
        control.send(json.dumps({"failed": f"clone: {e}"}).encode())
    else:
        if pid == 0:
            control.close()
            recipe.run(socket.socket(fileno=channel_fd), announce_fd, rootless=rootless, map_self=map_self)
    os.close(channel_fd)
    os.close(announce_fd)
