"""Trees that user code made: removed and copied in small steps, without recursion, whatever their depth or modes.

Everything here runs inside the sandbox as its user (H12), so a hostile tree can waste time, which the host limits, and
nothing more.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from itertools import count, islice

from .loop import Refused, Task

BATCH = 500
COPY_BYTES = 1 << 20
MAX_COPY_ENTRIES = 50_000
MAX_COPY_BYTES = 1 << 30  # apparent size: a sparse terabyte must not be read to its end


def remove(path: str) -> Task:
    """rm -rf. Raises OSError; a path that is not there is FileNotFoundError."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    yield from _empty(path, keep=())
    os.rmdir(path)


def empty(path: str, keep: str) -> Task:
    """Removes all that is in the directory `path`, but for the entry named `keep`."""
    yield from _empty(path, (keep,))


def _empty(path: str, keep: tuple[str, ...]) -> Task:
    """Moves directories up to `path` as it meets them: depth never exceeds two, so no recursion, no long names."""
    names = (f".removing-{n}" for n in count())
    top = _open_directory(path)
    try:
        while batch := _batch(top, keep):
            for name in batch:
                if _unlink(name, top):
                    continue
                yield from _flatten(name, top, names)
                os.rmdir(name, dir_fd=top)
            yield None
    finally:
        os.close(top)


def _flatten(name: str, top: int, names: Iterator[str]) -> Task:
    inner = _open_directory(name, top)
    try:
        while batch := _batch(inner):
            for child in batch:
                if not _unlink(child, inner):
                    _permit(child, inner)  # to move a directory is to write its `..`
                    os.rename(child, _unused(names, top), src_dir_fd=inner, dst_dir_fd=top)
            yield None
    finally:
        os.close(inner)


def _unused(names: Iterator[str], top: int) -> str:
    return next(n for n in names if not _exists(n, top))


def _exists(name: str, directory: int) -> bool:
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def _batch(directory: int, keep: tuple[str, ...] = ()) -> list[str]:
    with os.scandir(directory) as entries:
        return [e.name for e in islice(entries, BATCH) if e.name not in keep]


def _unlink(name: str, directory: int) -> bool:
    """False for a directory."""
    if stat.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode):
        return False
    os.unlink(name, dir_fd=directory)
    return True


def _open_directory(name: str, parent: int | None = None) -> int:
    _permit(name, parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _permit(name: str, parent: int | None = None) -> None:
    mode = os.lstat(name, dir_fd=parent).st_mode
    if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
        os.chmod(name, stat.S_IMODE(mode) | 0o700, dir_fd=parent)


def copy(source: str, destination: str) -> Task:
    """Copies a file or tree to `destination`, which must not exist: contents, modes, times, links as links.

    Hard links become files of their own; sockets and devices are left out. Raises Refused (too big) or OSError; what
    was copied until then stays for the caller to remove.
    """
    pending, modes = [(source, destination)], list[tuple[str, os.stat_result]]()
    entries = size = 0
    while pending:
        old, new = pending.pop()
        info = os.lstat(old)
        entries, size = entries + 1, size + (info.st_size if stat.S_ISREG(info.st_mode) else 0)
        if entries > MAX_COPY_ENTRIES or size > MAX_COPY_BYTES:
            raise Refused("file_error", f"{source}: more than {MAX_COPY_ENTRIES} entries or {MAX_COPY_BYTES} bytes", "EFBIG")
        if stat.S_ISDIR(info.st_mode):
            os.mkdir(new, 0o700)
            modes.append((new, info))
            pending += [(os.path.join(old, name), os.path.join(new, name)) for name in os.listdir(old)]
        elif stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(old), new)
        elif stat.S_ISFIFO(info.st_mode):
            os.mkfifo(new, stat.S_IMODE(info.st_mode))
        elif stat.S_ISREG(info.st_mode):
            yield from _copy_file(old, new)
            _stamp(new, info)
        yield None
    for path, info in reversed(modes):  # last, since filling a directory changes its times and may need its modes
        _stamp(path, info)


def lift(stage: str, home: str) -> None:
    """Moves all that is in the directory `stage` into `home`, on the same file system, then removes `stage`."""
    _permit(stage)
    for name in os.listdir(stage):
        path, info = os.path.join(home, name), os.lstat(os.path.join(stage, name))
        _permit(os.path.join(stage, name))  # to move a directory is to write its `..`
        os.rename(os.path.join(stage, name), path)
        if stat.S_ISDIR(info.st_mode):
            _stamp(path, info)
    os.rmdir(stage)


def _stamp(path: str, info: os.stat_result) -> None:
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    os.chmod(path, stat.S_IMODE(info.st_mode))


def _copy_file(old: str, new: str) -> Task:
    with open(open_regular(old, os.O_RDONLY), "rb", buffering=0) as reader, open(new, "xb", buffering=0) as writer:
        while data := reader.read(COPY_BYTES):
            while data:
                data = data[writer.write(data) :]
            yield None


def open_regular(path: str, flags: int, mode: int = 0o666) -> int:
    """A descriptor of a regular file. O_NONBLOCK, so that a fifo can't make PID 1 wait; no device is ever used."""
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
    except OSError as e:
        if e.errno != errno.ENXIO:  # a fifo without a reader
            raise
        raise Refused("file_error", f"{path} is not a regular file", "ENXIO") from None
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind):
        return fd
    os.close(fd)
    raise Refused("file_error", f"{path} is not a regular file", "EISDIR" if stat.S_ISDIR(kind) else "ENXIO")
