"""One cgroup directory, v1 or v2, held by descriptor. The only code that touches the cgroup file system.

A group keeps one descriptor per hierarchy and opens files when needed: an openat costs about 2 us, while a thousand
sandboxes with every file kept open would need 20,000 descriptors.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from fumehood.errors import CapacityExceeded, InvalidInput, InvalidTransition, SandboxGone, SetupFailed
from fumehood.runtime.host.pidfd import kill


class Directory:
    """Methods raise OSError as the kernel gives it, unless said otherwise."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def write(self, file: str, value: str) -> None:
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def read(self, file: str) -> str:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            parts = [os.read(fd, 1 << 16)]
            while file == "cgroup.procs" and parts[-1]:  # the only file that outgrows one read
                parts.append(os.read(fd, 1 << 16))
        finally:
            os.close(fd)
        return b"".join(parts).decode()

    def read_if_there(self, file: str) -> str:
        """Empty for a file that this kernel lacks, such as pids.peak before 6.1."""
        try:
            return self.read(file)
        except FileNotFoundError:
            return ""

    def table(self, file: str) -> dict[str, int]:
        """A flat `key number` file; empty when the kernel lacks it."""
        return {key: int(n) for key, n in (line.split() for line in self.read_if_there(file).splitlines())}

    def number(self, file: str) -> int:
        return int(self.read_if_there(file) or 0)

    def pids(self) -> set[int]:
        """Host pids, without those of other pid namespaces than the caller's (the kernel shows them as 0)."""
        return {int(line) for line in self.read("cgroup.procs").split()} - {0}

    def remove(self, timeout_s: float) -> None:
        """rmdir; EBUSY passes as the last zombies go. Raises InvalidTransition when it does not in time."""

        def gone() -> bool:
            try:
                Path(self.path).rmdir()
            except OSError as e:
                if e.errno == errno.EBUSY:
                    return False
                if e.errno != errno.ENOENT:
                    raise
            return True

        if not wait(gone, timeout_s):
            raise InvalidTransition(
                f"{self.path} can't be removed",
                cause="processes are left in it, or a group that something else made below it",
                remediation="end them, then reconcile",
                pids=sorted(self.pids())[:20],
            )
        self.close()


def wait(done: Callable[[], bool], timeout_s: float) -> bool:
    """Poll from 0.1 ms up to 10 ms apart: most of what a cgroup takes its time for is over in the first millisecond."""
    deadline, pause = time.monotonic() + timeout_s, 0.0001
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return True


def signal_all(directory: Directory) -> int:
    """SIGKILL to every listed process; how many were listed.

    A pid may be reused between reading it and killing it, so each is pinned by a pidfd first and killed only if a
    second reading still lists it: the pinned process was then a member, whoever has the number afterwards.
    """
    pinned = {pid: fd for pid in directory.pids() if (fd := _pin(pid)) >= 0}
    try:
        for pid in directory.pids() & pinned.keys() if pinned else ():
            kill(pinned[pid])
    finally:
        for fd in pinned.values():
            os.close(fd)
    return len(pinned)


def _pin(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    except OSError as e:
        if e.errno == errno.EINVAL:  # a thread, whose leader is listed as well
            return -1
        raise


@contextmanager
def step(what: str) -> Generator[None]:
    """Say which step the kernel refused, in terms that a caller can act on. SetupFailed keeps the errno's name."""
    try:
        yield
    except OSError as e:
        said = f"cgroup: can't {what}"
        if e.errno == errno.EEXIST:
            raise InvalidInput(said, cause="it exists", remediation="use another id, or reconcile first") from e
        if e.errno in (errno.ENOSPC, errno.EAGAIN, errno.ENOMEM):
            fix = "remove unused sandboxes, or raise cgroup.max.descendants"
            raise CapacityExceeded(said, cause=os.strerror(e.errno), remediation=fix) from e
        if e.errno == errno.ESRCH:
            raise SandboxGone(said, cause="the process has ended", remediation="make a new sandbox") from e
        name = errno.errorcode.get(e.errno or 0, "?")
        fix = "see whether something else changes the groups under fumehood, then try again"
        raise SetupFailed(said, cause=str(e), remediation=fix, errno=name, step=what) from e
