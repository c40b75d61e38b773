"""What an escape attempt may use. This source is put in front of each attempt and runs inside the sandbox: stdlib only.

An attempt says HELD with the reason when a barrier stopped it, and BREACH when it got through. Saying neither proves
nothing, and counts as a failure.
"""

import ctypes
import errno
import gc
import glob
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = [
    "CANARY", "HOST", "breach", "child", "connects", "ctypes", "denied", "errno", "gc", "glob", "held", "int80", "mmap",
    "os", "outcome", "re", "refused", "resource", "say", "shutil", "signal", "socket", "stat", "struct", "subprocess",
    "sys", "syscall", "tempfile", "threading", "time", "unreadable",
]  # fmt: skip

HOST: dict[str, Any] = globals().get("HOST", {})  # public facts of the host, put in front by the runner
CANARY = rb"fumehood-canary-[0-9a-f]{32}"  # what a secret of the host looks like
_NO = {"EPERM", "EACCES", "ENOSYS", "EROFS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "SIGSYS"}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def say(word: str, what: str) -> None:
    # Straight to the descriptor: a forked child must neither lose nor repeat what Python had buffered.
    os.write(1, f"{word} {what}\n".encode(errors="replace"))


def held(why: str) -> None:
    say("HELD", why)


def breach(what: str) -> None:
    say("BREACH", what)


def syscall(number: int, *args: Any) -> str:
    """`ok` or the name of the errno."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    if _libc.syscall(ctypes.c_long(number), *words) >= 0:
        return "ok"
    return errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))


def outcome(what: str, answer: str, *also: str) -> None:
    """Held only by a permission error: EINVAL, EFAULT or EBADF would mean that the kernel had begun to listen."""
    (held if answer in _NO or answer in also else breach)(f"{what}: {answer}")


def refused(what: str, number: int, *args: Any) -> None:
    outcome(what, syscall(number, *args))


def denied(what: str, act: Callable[..., Any], *args: Any, also: tuple[str, ...] = ()) -> None:
    """The same for a Python call that raises OSError."""
    try:
        act(*args)
    except OSError as e:
        outcome(what, errno.errorcode.get(e.errno or 0, str(e)), *also)
    else:
        breach(f"{what}: it worked")


def unreadable(*paths: str) -> None:
    """No path may give a byte; whatever can be read is printed, so that the host may look for its secrets."""
    for path in paths:
        try:
            with open(path, "rb") as f:
                data = f.read(4096)
        except OSError as e:
            held(f"{path}: {errno.errorcode.get(e.errno or 0)}")
        else:
            (breach if data else held)(f"{path}: {len(data)} bytes")  # none: /dev/null is bound over it


def child(act: Callable[[], Any], seconds: float = 5.0) -> str:
    """Run `act` in a forked child. `ok`, `exit n`, or the name of the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(int(seconds) + 1)
            act()
            os._exit(0)
        except BaseException as e:
            say("child", repr(e))
            os._exit(70)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "ok" if code == 0 else f"exit {code}" if code > 0 else signal.Signals(-code).name


def int80(number: int, *args: int) -> int:
    """A system call through the 32-bit entry: machine code in a fresh executable page. The raw answer, -errno if bad.

    push rbx; mov eax,edi; mov ebx,esi; xchg rdx,rcx; int 0x80; pop rbx; cdqe; ret
    """
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("53 89f8 89f3 4887ca cd80 5b 4898 c3"))
    enter = ctypes.CFUNCTYPE(*[ctypes.c_long] * 5)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return enter(number, *(*args, 0, 0, 0)[:3])


def connects(what: str, family: int, kind: int, address: Any, payload: bytes = b"GET / HTTP/1.0\r\n\r\n") -> None:
    """Held if no packet can leave. Silence until the deadline is a breach: it means that one did."""
    with socket.socket(family, kind) as s:
        s.settimeout(2)
        try:
            if kind == socket.SOCK_DGRAM:
                s.sendto(payload, address)
                return breach(f"{what}: a datagram left")
            s.connect(address)
        except OSError as e:
            unreachable = ("ENETUNREACH", "EHOSTUNREACH", "EADDRNOTAVAIL", "ECONNREFUSED", "ENOENT")
            return outcome(what, errno.errorcode.get(e.errno or 0, "no answer"), *unreachable)
        breach(f"{what}: connected")
        say("seen", repr(s.recv(200)))
