"""files.*: plain calls as the sandbox's user, inside the sandbox. The host never follows a guest's path (H12)."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable
from itertools import islice
from typing import Any

from . import tree
from .loop import Refused, Stream, Task
from .wire import CHUNK_BYTES, FILE

LIST_BATCH = 500
MAX_LISTED = 100_000  # in one answer, and read from one directory before it is sorted
WRITE_BYTES = 1 << 20
_TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


def resolve(path: str, home: str) -> str:
    """Absolute; `~` and relative paths start at the home."""
    if path == "~" or path.startswith("~/"):
        path = path[2:]
    return os.path.normpath(os.path.join(home, path))


def entry(path: str) -> dict[str, Any]:
    """The Entry of docs/wire.md, of the link itself if it is one. Raises OSError."""
    s = os.lstat(path)
    kind = _TYPES.get(stat.S_IFMT(s.st_mode), "other")
    described = {
        "name": os.path.basename(path) or "/",
        "type": kind,
        "path": path,
        "size": s.st_size,
        "mode": stat.S_IMODE(s.st_mode),
        "owner": _name(pwd.getpwuid, s.st_uid),
        "group": _name(grp.getgrgid, s.st_gid),
        "modified_s": s.st_mtime,
    }
    return {**described, "target": os.readlink(path)} if kind == "symlink" else described


def _name(look_up: Callable[[int], Any], number: int) -> str:
    try:
        return look_up(number)[0]
    except KeyError:
        return str(number)


def listing(stream: Stream, path: str, depth: int) -> Task:
    """Depth first, names sorted. Links to directories are shown, not entered."""
    if not stat.S_ISDIR(os.stat(path).st_mode):
        raise Refused("invalid", f"{path} is not a directory", "ENOTDIR")
    count, batch = 0, list[dict[str, Any]]()
    pending = [(p, depth) for p in _sorted(path)]
    while pending and count < MAX_LISTED:
        current, levels = pending.pop()
        try:
            batch.append(entry(current))
            if levels > 1 and batch[-1]["type"] == "directory":
                pending += [(p, levels - 1) for p in _sorted(current)]
        except (FileNotFoundError, PermissionError):
            continue  # gone since its directory was read, or shown but closed to us
        count += 1
        if len(batch) == LIST_BATCH:
            stream.event({"type": "entries", "entries": batch})
            batch = []
            yield None
    if batch:
        stream.event({"type": "entries", "entries": batch})
    stream.end({"count": count, **({"truncated": True} if pending else {})})


def _sorted(path: str) -> list[str]:
    """Paths of the entries, last name first: a stack to pop from."""
    with os.scandir(path) as entries:
        return sorted((e.path for e in islice(entries, MAX_LISTED)), reverse=True)


def mkdir(path: str) -> dict[str, Any]:
    os.makedirs(path)
    return entry(path)


def remove(stream: Stream, path: str, home: str) -> Task:
    if path in ("/", home):
        raise Refused("invalid", f"{path} itself can't be removed; remove what is in it")
    yield from tree.remove(path)
    stream.end({})


def move(stream: Stream, source: str, destination: str) -> Task:
    os.makedirs(os.path.dirname(destination), exist_ok=True)
    try:
        os.rename(source, destination)
    except OSError as e:
        if e.errno != errno.EXDEV:  # home and /tmp are mounts of their own
            raise
        yield from _move_across(source, destination)
    stream.end({"entry": entry(destination)})


def _move_across(source: str, destination: str) -> Task:
    staged = f"{destination}.moving-{os.urandom(4).hex()}"
    try:
        yield from tree.copy(source, staged)
        os.rename(staged, destination)
    except BaseException:
        if os.path.lexists(staged):
            for _ in tree.remove(staged):
                pass
        raise
    yield from tree.remove(source)


def read(stream: Stream, path: str, offset: int, length: int | None) -> Task:
    with open(tree.open_regular(path, os.O_RDONLY), "rb", buffering=0) as file:
        file.seek(offset)
        sent = 0
        while data := file.read(CHUNK_BYTES if length is None else min(CHUNK_BYTES, length - sent)):
            stream.data(FILE, data)
            sent += len(data)
            yield None
    stream.end({"size": sent})


class Upload:
    """One files.write. A new file makes exactly three events for a watcher: create, chmod, write (if under a MiB)."""

    def __init__(self, stream: Stream, path: str, mode: int | None) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._stream, self._path, self._held = stream, path, bytearray()
        self._fd, self._fresh = self._open(mode)
        stream.on_data, stream.on_close, stream.on_cancel = self._data, self._done, self._cancel

    def _open(self, mode: int | None) -> tuple[int, bool]:
        try:
            fd = tree.open_regular(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            # Not O_TRUNC: only after open_regular has seen that it is a regular file.
            fd = tree.open_regular(self._path, os.O_WRONLY | os.O_CREAT)
            os.ftruncate(fd, 0)
            if mode is not None:
                os.fchmod(fd, mode)
            return fd, False
        os.fchmod(fd, 0o644 if mode is None else mode)
        return fd, True

    def _data(self, channel: int, data: bytes) -> None:
        self._held += data
        if len(self._held) >= WRITE_BYTES:
            self._write()

    def _write(self) -> None:
        try:
            while self._held:
                del self._held[: os.write(self._fd, self._held)]
        except OSError:
            self._abandon()
            raise

    def _done(self) -> None:
        self._write()
        os.close(self._fd)
        self._stream.end({"entry": entry(self._path)})

    def _cancel(self) -> None:
        self._abandon()
        self._stream.end({})

    def _abandon(self) -> None:
        """A half of a new file is worse than none."""
        os.close(self._fd)
        if self._fresh:
            os.unlink(self._path)
