"""How the agent makes a child that will run user code: one ordered recipe, the same for programs and for sessions."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import NoReturn

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
OOM_SCORE = b"500"
LEAST_CLOSED = 4096  # the limit may have been lowered below descriptors that exist

_libc = ctypes.CDLL(None, use_errno=True)
_oom_fd = -1


def prctl(option: int, value: int) -> None:
    """Raises OSError."""
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def settle_as_init(*, traceable: bool = False) -> None:
    """What PID 1 does before its first child. Safe to call when the agent is not PID 1 (tests, some OCI runtimes)."""
    global _oom_fd
    while (fd := os.open("/dev/null", os.O_RDWR)) < 3:  # 0-2 exist, so that no pipe gets such a number
        os.set_inheritable(fd, True)
    os.close(fd)
    # Python's SIGINT handler would let `kill -INT 1` raise KeyboardInterrupt in here; the kernel shields PID 1 only from
    # signals that have no handler.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if os.getpid() != 1:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Dumpable for this one open(): the change of uid took that away, and /proc/self with it. No user code exists yet.
    # Best effort: Landlock or a read-only /proc may forbid it, and user code can lower the value again to where it began
    # (oom_score_adj_min): it makes the kernel prefer user code to the agent, the cgroup limit is what holds.
    prctl(PR_SET_DUMPABLE, 1)
    with contextlib.suppress(OSError):
        _oom_fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    prctl(PR_SET_DUMPABLE, int(traceable))  # 0, H16: user code has our uid and must not open /proc/1/mem or trace us


def fork(main: Callable[[], NoReturn], stdio: Sequence[int]) -> int:
    """A child in its own session and process group that runs `main` with `stdio` as 0-2.

    Returns its pid. `main` calls confined() before anything that the caller controls. Raises OSError (EAGAIN when the
    sandbox is at its pids limit).
    """
    with _raised_oom_score():
        pid = os.fork()
        if pid == 0:
            _be_child(main, stdio)
    return pid


def confined(confine: Callable[[], None], keep: int) -> None:
    """The last step: the tier's confine(), then every descriptor but 0-2 and `keep` is closed (H5, H16).

    In this order because confine() may need descriptors of its tier, such as the one that announces a seccomp listener.
    """
    confine()
    os.closerange(3, keep)
    os.closerange(keep + 1, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], LEAST_CLOSED))


@contextlib.contextmanager
def _raised_oom_score() -> Generator[None, None, None]:
    # The child inherits the score; it could not set it itself, /proc/self is root's while it is not dumpable.
    if _oom_fd < 0:
        yield
        return
    before = os.pread(_oom_fd, 16, 0)
    try:
        os.pwrite(_oom_fd, OOM_SCORE, 0)
        yield
    finally:
        os.pwrite(_oom_fd, before, 0)


def _be_child(main: Callable[[], NoReturn], stdio: Sequence[int]) -> NoReturn:
    try:
        os.setsid()
        _default_signals()
        os.umask(0o022)
        for target, fd in enumerate(stdio):  # all above 2, see settle_as_init()
            os.dup2(fd, target)
        main()
    except BaseException:
        # Fails closed (H13): whatever goes wrong before user code, user code does not start.
        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        os._exit(127)


def _default_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def fork_orphan() -> int:
    """0 in a grandchild whose parent has gone, its pid in the caller. Raises BlockingIOError when there is no room for it."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads are not in a checkpoint, as documented
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                os.close(writer)
                return 0
            os.write(writer, pid.to_bytes(4, "big"))
            os._exit(0)
    os.close(writer)
    try:
        os.waitpid(middle, 0)
        pid = int.from_bytes(os.read(reader, 4), "big")
    finally:
        os.close(reader)
    if pid == 0:
        raise BlockingIOError(errno.EAGAIN, "no process could be made: the sandbox is at its limit of processes or memory")
    return pid
