"""What hostile programs of these tests start with, and how a test takes a barrier away. Programs run inside: stdlib only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from fumehood import Sandbox
from fumehood.client.calls import block_on
from fumehood.client.engine import Engine
from fumehood.model import Mount, Template
from fumehood.runtime.native.driver import NativeRuntime

# `attempt` prints one word for each try: "through" or the name of the errno that stopped it.
PRELUDE = """
import ctypes, errno, mmap, os, signal, socket, stat, struct, subprocess, sys, threading, time
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
def syscall(number, *args):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    answer = _libc.syscall(ctypes.c_long(number), *words)
    if answer < 0:
        raise OSError(ctypes.get_errno(), 'syscall')
    return answer
def attempt(act, *args, **more):
    try:
        act(*args, **more)
    except OSError as e:
        word = errno.errorcode.get(e.errno, repr(e))
    else:
        word = 'through'
    print(word, flush=True)
    return word
def write(path, data='x'):
    with open(path, 'w') as f:
        f.write(data)
def read(path):
    with open(path, 'rb') as f:
        return f.read(1 << 20)
"""
# What stops most attacks before the barrier that a test is about.
FILTERS = ("seccomp-policy", "seccomp-floor")
INSIDE = "/data/shared"  # where a test shows a directory of the host
Words = list[str]


def words(box: Sandbox, code: str, **more: Any) -> Words:
    """What the attack printed; a traceback is the test's own mistake."""
    result = box.run(PRELUDE + code, **more)
    assert result.error is None, result.error
    return result.stdout.split()


def native() -> NativeRuntime:
    runtime = Engine.of_this_process().supervisor.runtime("native")
    assert isinstance(runtime, NativeRuntime)
    return runtime


@contextmanager
def switched(**switches: Any) -> Generator[NativeRuntime]:
    runtime = native()
    before, runtime.switches = runtime.switches, switches
    try:
        yield runtime
    finally:
        runtime.switches = before


@contextmanager
def opened(without: tuple[str, ...] = (), keep: int = 0, **more: Any) -> Generator[Sandbox]:
    with switched(without=list(without), keep=keep), Sandbox(tier="native", **more) as box:
        yield box


@contextmanager
def template(name: str, *mounts: Mount) -> Generator[Template]:
    """A template whose zygote ends with the test: the mounts are the test's own directories."""
    wanted = Template(name, mounts=mounts)
    yield wanted
    runtime = native()
    if (zygote := runtime._zygotes.pop(wanted, None)) is not None:
        block_on(Engine.of_this_process(), zygote.aclose())


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 8
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def processes() -> Mapping[int, int]:
    """Host pid -> host uid of every process there is."""
    found: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            found[int(name)] = os.stat(f"/proc/{name}").st_uid
        except FileNotFoundError:
            continue
    return found


def open_descriptors() -> list[str]:
    """What this process has open, by kind: numbers are reused, so they say nothing."""
    found: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}").split("[")[0])
        except FileNotFoundError:
            continue  # the listing's own
    return sorted(found)


def pid_of(box: Sandbox) -> int:
    """The agent's host pid, through the pidfd that the supervisor holds."""
    fd = box.live.handle._pidfd  # type: ignore[attr-defined]
    with open(f"/proc/self/fdinfo/{fd}") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Pid:"))


def descendants(pid: int) -> set[int]:
    """`pid` and all below it, by the kernel's own lists."""
    found, waiting = set[int](), [pid]
    while waiting:
        found.add(one := waiting.pop())
        for task in _tasks(one):
            try:
                with open(f"/proc/{one}/task/{task}/children") as f:
                    waiting += map(int, f.read().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def _tasks(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
