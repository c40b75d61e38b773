"""What runs under load. Each program prints the nonce of its request, which has to come back to its own caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Hostile(NamedTuple):
    """`ends`: the statuses that are this attack's containment; anything else is unexpected.

    One that goes on for ever has a short time; one that a limit ends has as long as a busy machine may need to get there.
    """

    code: str
    ends: frozenset[str]
    timeout_s: float = 5.0


# The nonce goes first and is flushed: what follows may take the interpreter along.
_FIRST = "import sys; sys.stdout.write({nonce!r} + '\\n'); sys.stdout.flush()\n"
HOSTILE_LIMITS: Mapping[str, Any] = {
    "memory_bytes": 96 << 20,
    "pids": 32,
    "disk_bytes": 8 << 20,
    "output_bytes": 64 << 10,
    "output_kill_bytes": 1 << 20,
    "cpus": 0.5,
}
HOSTILE: Mapping[str, Hostile] = {
    "fork bomb": Hostile(
        "import os\nwhile True: os.fork()", frozenset({"pids_limit", "oom", "timeout", "error", "killed"}), 1.0
    ),
    "memory hog": Hostile("hoard = []\nwhile True: hoard.append(bytearray(8 << 20))", frozenset({"oom", "error"})),
    "disk fill": Hostile(
        "with open('/home/user/fill', 'wb') as f:\n    while True: f.write(bytes(1 << 20))", frozenset({"disk_full", "error"})
    ),
    "flood": Hostile("while True: sys.stdout.write('x' * 65536)", frozenset({"output_limit"})),
    "spin": Hostile("while True: pass", frozenset({"timeout"}), 1.0),
    "mount": Hostile(
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None): raise OSError(ctypes.get_errno(), 'mount')",
        frozenset({"error", "syscall_refused"}),
    ),
}


def hostile(name: str, nonce: str) -> str:
    return _FIRST.format(nonce=nonce) + HOSTILE[name].code


def say(nonce: str) -> str:
    return f"print({nonce!r})"


def remember(nonce: str) -> str:
    """The first run of a session: what every later one is told by."""
    return f"mine, turns = {nonce!r}, 0\nprint(mine)"


RECALL = "turns += 1\nprint(mine, turns)"


def tick(nonce: str, times: int, pause_s: float) -> str:
    """Output over a while, for a stream to carry."""
    return f"import time\nfor n in range({times}):\n    print({nonce!r}, n, flush=True)\n    time.sleep({pause_s})"


def linger(nonce: str) -> str:
    """A program that is still at work when its caller hangs up or its sandbox is killed."""
    return f"import time\nprint({nonce!r}, flush=True)\ntime.sleep(20)"
