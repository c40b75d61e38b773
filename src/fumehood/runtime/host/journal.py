"""What a supervisor made on this host, so that the next one can remove what a killed one left (H19).

`run_dir/instances/<id>/` is held by an flock for the life of its supervisor. The instance's name is part of every path
and cgroup it makes, so the directory is the whole record: whoever gets its lock finds a dead owner and may clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

from fumehood.model import ID_PATTERN


class Instance:
    """This supervisor's own entry. `scratch` is the empty directory that zygotes build their roots on."""

    def __init__(self, run_dir: Path) -> None:
        self.name = "i" + secrets.token_hex(6)
        instances = run_dir / "instances"
        instances.mkdir(0o700, parents=True, exist_ok=True)
        with _exclusive(instances):  # between mkdir and lock another supervisor would take us for dead
            self.directory = instances / self.name
            self.directory.mkdir(0o711)
            self._fd = _lock(self.directory)
        self.scratch = self.directory / "root"
        self.scratch.mkdir(0o755)

    def close(self) -> None:
        shutil.rmtree(self.directory)
        if self._fd is not None:
            os.close(self._fd)


@contextlib.contextmanager
def _exclusive(instances: Path) -> Generator[None]:
    """One supervisor at a time makes or removes entries."""
    fd = os.open(instances, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _lock(directory: Path) -> int | None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def reconcile(run_dir: Path, remove: Callable[[str], None]) -> list[str]:
    """Call `remove(instance)` for each dead supervisor's instance, then drop its entry. Returns the names."""
    found: list[str] = []
    instances = run_dir / "instances"
    instances.mkdir(0o700, parents=True, exist_ok=True)
    with _exclusive(instances):
        for directory in sorted(instances.iterdir()):
            if not ID_PATTERN.match(directory.name) or (fd := _lock(directory)) is None:
                continue
            remove(directory.name)
            shutil.rmtree(directory)
            os.close(fd)
            found.append(directory.name)
    return found
