"""The directory that a Firecracker sees: the place's own, or as root a chroot below it which the jailer enters.

Once its guest runs, a monitor counts as hostile, and so does whatever it can write to: this side names files through one
descriptor, follows no symbolic link and connects to sockets alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Generator
from pathlib import Path

from fumehood.errors import CapacityExceeded, SetupFailed
from fumehood.runtime.microvm.machine import Place
from fumehood.runtime.microvm.removal import remove

API = "api"
_ID = "vm"  # the directory is one machine's alone
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FIRECRACKER_ARGS = ("--api-sock", API, "--level", "Warn")


@contextlib.contextmanager
def on_disk(what: str) -> Generator[None]:
    """Raises CapacityExceeded when it is full, else SetupFailed."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityExceeded(what, cause=str(e), remediation="make room on the disk") from None
        raise SetupFailed(what, cause=str(e), remediation="run `fumehood doctor`") from e


class Jail:
    def __init__(self, place: Place, binary: Path, jailer: Path | None) -> None:
        """Takes the place's directory until aclose(). Raises SetupFailed when anything is in there already."""
        self._place, self._binary = place, binary.resolve()  # the jailer resolves it, too, before it makes a name of it
        self._uid, self._jailer = place.uid, jailer if place.uid is not None else None
        with on_disk(f"a machine can't have the directory {place.directory}"), contextlib.ExitStack() as undo:
            base = os.open(place.directory, _OPEN_DIRECTORY)
            undo.callback(os.close, base)
            if self._jailer is not None and place.uid is not None:
                undo.callback(os.fchown, base, place.uid, place.uid)
                # Before the look: afterwards nobody but root can plant anything in the jailer's way (H3).
                os.fchown(base, 0, 0)
                os.fchmod(base, 0o700)
            if left := os.listdir(base):
                raise FileExistsError(errno.EEXIST, "it is not empty", left[0])
            undo.callback(_clear, place.directory)
            self._fd = os.dup(base) if self._jailer is None else _made(base, (self._binary.name, _ID, "root"))
            undo.pop_all()
            os.close(base)

    @property
    def command(self) -> tuple[str, ...]:
        """Of a Firecracker that finds here what it is told of by name alone."""
        firecracker = (str(self._binary), *_FIRECRACKER_ARGS)
        uid = str(self._uid)
        if self._jailer is not None:
            base = ("--chroot-base-dir", str(self._place.directory), "--exec-file", str(self._binary), "--id", _ID)
            ids = ("--uid", uid, "--gid", uid)
            return (str(self._jailer), *base, *ids, "--resource-limit", "no-file=1024", "--", *_FIRECRACKER_ARGS)
        if self._uid is not None:
            ids = ("--reuid", uid, "--regid", uid, "--clear-groups", "--inh-caps=-all", "--bounding-set=-all")
            return ("setpriv", *ids, "--", *firecracker)
        return firecracker

    def link(self, name: str, source: Path | str, directory: int | None = None) -> None:
        """A file of this host as `name`. Raises OSError."""
        os.link(source, name, src_dir_fd=directory, dst_dir_fd=self._fd)

    def create(self, name: str) -> int:
        """An empty file that the monitor can write to. Raises OSError."""
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        if self._uid is not None:
            os.fchown(fd, self._uid, self._uid)
        return fd

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # the monitor may have done it
            os.unlink(name, dir_fd=self._fd)

    @contextlib.contextmanager
    def socket(self, name: str) -> Generator[str]:
        """A path to connect to, short whatever the directory's is. Raises OSError."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):  # else a monitor could send us to any socket of this host
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"{name} is no socket")
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    async def aclose(self) -> None:
        """After the monitor's end."""
        os.close(self._fd)
        _clear(self._place.directory)  # not in a thread: at the interpreter's end there are none
        if self._jailer is not None and self._uid is not None:
            os.chown(self._place.directory, self._uid, self._uid)


def _made(base: int, names: tuple[str, ...]) -> int:
    """A descriptor of the last of these directories, each made in the one before."""
    fd = os.dup(base)
    for name in names:
        parent = fd
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
        finally:
            os.close(parent)
    return fd


def _clear(directory: Path) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            remove(entry.path)
