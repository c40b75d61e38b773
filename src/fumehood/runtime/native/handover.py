"""What passes between the supervisor and a fresh clone until its agent speaks: id maps, the plan, its last words."""

from __future__ import annotations

import json
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from fumehood.errors import FumehoodError, SetupFailed
from fumehood.model import Limits
from fumehood.runtime.link import setup_failure
from fumehood.runtime.native.root import UID


@contextmanager
def step(what: str) -> Generator[None]:
    try:
        yield
    except OSError as e:
        raise SetupFailed(f"can't {what}", cause=str(e), remediation="try again; if it stays, run `fumehood doctor`") from e


def last_words(channel: socket.socket) -> FumehoodError:
    try:
        return setup_failure(channel.recv(8192))
    except BlockingIOError:
        return SetupFailed("the sandbox is not in its cgroups", remediation="run `fumehood doctor`")


def send_plan(channel: socket.socket, plan: dict[str, Any], doors: list[int], timeout_s: float) -> None:
    data = json.dumps(plan).encode()
    channel.settimeout(timeout_s)
    socket.send_fds(channel, [len(data).to_bytes(4, "big")], doors)
    channel.sendall(data)
    channel.setblocking(False)


def rlimits(limits: Limits, *, grouped: bool) -> dict[str, int]:
    values = {"RLIMIT_NOFILE": limits.open_files, "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_MEMLOCK": 1 << 16}
    # Counted per user namespace since Linux 5.14, so it bounds this sandbox alone. Beside a cgroup with the same limit it would
    # be the one that refuses, and the cgroup, which counts refusals and can be set anew, would hear of none.
    return values if grouped else values | {"RLIMIT_NPROC": limits.pids}


def write_maps(pid: int, uid: int) -> None:
    """Only a real root may map an id that is not its own; the child could not do this itself (user_namespaces(7))."""
    for name in ("uid_map", "gid_map"):
        with step(f"write the {name}"), open(f"/proc/{pid}/{name}", "w") as f:
            f.write(f"{UID} {uid} 1")
