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
from collections.abc import Callable
from pathlib import Path

from fumehood.model import ID_PATTERN


class Instance:
    """This supervisor's own entry. `scratch` is the empty directory that zygotes build their roots on."""

    def __init__(self, run_dir: Path) -> None:
        self.name = "i" + secrets.token_hex(6)
        self.directory = run_dir / "instances" / self.name
        self.directory.mkdir(0o700, parents=True)
        self._fd = _lock(self.directory)
        assert self._fd is not None
        self.scratch = self.directory / "root"
        self.scratch.mkdir(0o755)

    def close(self) -> None:
        shutil.rmtree(self.directory)
        if self._fd is not None:
            os.close(self._fd)


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
    for directory in sorted((run_dir / "instances").glob("*")):
        with contextlib.suppress(FileNotFoundError):  # another supervisor may be cleaning up the same one
            if not ID_PATTERN.match(directory.name) or (fd := _lock(directory)) is None:
                continue
            remove(directory.name)
            shutil.rmtree(directory)
            os.close(fd)
            found.append(directory.name)
    return found
