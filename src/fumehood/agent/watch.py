"""files.watch: inotify through ctypes, one instance for each watch.

The words are fsnotify's: a move is `rename` under the old name and `create` under the new one.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
import termios
from collections.abc import Iterator

from .loop import Loop, Refused, Stream

MODIFY, ATTRIB, MOVED_FROM, MOVED_TO = 0x002, 0x004, 0x040, 0x080
CREATE, DELETE, DELETE_SELF, MOVE_SELF = 0x100, 0x200, 0x400, 0x800
Q_OVERFLOW, IGNORED, ONLYDIR, DONT_FOLLOW, ISDIR = 0x4000, 0x8000, 0x01000000, 0x02000000, 0x40000000
MASK = MODIFY | ATTRIB | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF
CHANGES = (
    (CREATE | MOVED_TO, "create"),
    (MOVED_FROM, "rename"),
    (DELETE, "remove"),
    (MODIFY, "write"),
    (ATTRIB, "chmod"),
)
MAX_DIRECTORIES = 8_000  # below the kernel's default of 8,192 watches for each user
READ_BYTES = 1 << 16
_HEAD = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


class Watch:
    def __init__(self, loop: Loop, stream: Stream, path: str, recursive: bool) -> None:
        """Raises Refused or OSError (ENOSPC or EMFILE: the sandbox's inotify limits)."""
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise Refused("invalid", f"{path} is not a directory", "ENOTDIR")
        self._loop, self._stream, self._root, self._recursive = loop, stream, path, recursive
        self._directories: dict[int, str] = {}  # watch descriptor -> path relative to the root, "" for the root
        self._announced: set[str] = set()
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")
        try:
            self._add("")
            list(self._below(""))  # what was there before is watched, not announced
        except BaseException:
            os.close(self._fd)
            raise
        self._announced.clear()
        stream.on_cancel = self._stop
        stream.event({"type": "ready"})
        loop.reading(self._fd, self._read)

    def _add(self, name: str) -> None:
        if len(self._directories) >= MAX_DIRECTORIES:
            raise Refused("file_error", f"more than {MAX_DIRECTORIES} directories to watch", "ENOSPC")
        path = os.fsencode(os.path.join(self._root, name))
        mask = MASK | ONLYDIR | (DONT_FOLLOW if name else 0)
        self._directories[_checked(_libc.inotify_add_watch(self._fd, path, mask), f"inotify of {name or '.'}")] = name

    def _below(self, name: str) -> Iterator[str]:
        """All entries under a directory that is watched already; directories among them get watched first.

        What appears between the two is seen twice, so every name is remembered until its own event has come.
        """
        pending = [name]
        while pending and self._recursive:
            with os.scandir(os.path.join(self._root, parent := pending.pop())) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    child = os.path.join(parent, entry.name)
                    self._announced.add(child)
                    yield child
                    if entry.is_dir(follow_symlinks=False):
                        self._add(child)
                        pending.append(child)

    def _read(self) -> None:
        with self._stream.answering():
            data = os.read(self._fd, READ_BYTES)
            while data and not self._stream.ended:
                wd, mask, _, length = _HEAD.unpack_from(data)
                name = data[_HEAD.size : _HEAD.size + length].rstrip(b"\0")
                data = data[_HEAD.size + length :]
                self._happened(wd, mask, os.fsdecode(name))
        if self._stream.ended:
            self._stop()
        elif not self._events_wait():
            self._announced.clear()

    def _events_wait(self) -> bool:
        return struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, b"\0" * 4))[0] > 0

    def _happened(self, wd: int, mask: int, name: str) -> None:
        if mask & Q_OVERFLOW:
            self._stream.event({"type": "overflow"})
            return
        directory = self._directories.get(wd)
        if directory is None:
            return
        if mask & IGNORED:
            del self._directories[wd]
        if not name:
            if not directory and mask & (DELETE_SELF | MOVE_SELF):
                raise Refused("not_found", f"the watched directory {self._root} is gone", "ENOENT")
            return  # the parent's watch tells the same with a name
        self._tell(mask, os.path.join(directory, name))

    def _tell(self, mask: int, name: str) -> None:
        change = next(word for bits, word in CHANGES if mask & bits)
        if change == "create" and name in self._announced:
            self._announced.discard(name)
            return
        if change in ("remove", "rename"):
            self._announced.discard(name)  # if it comes back, that is news
        self._change(change, name)
        if mask & ISDIR and self._recursive:
            if change == "create":
                self._appeared(name)
            elif change == "rename":
                self._left(name)

    def _appeared(self, name: str) -> None:
        try:
            self._add(name)
            for child in self._below(name):
                self._change("create", child)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return  # gone again, or closed: its own event follows

    def _left(self, name: str) -> None:
        for wd, directory in list(self._directories.items()):
            if directory == name or directory.startswith(name + "/"):
                del self._directories[wd]
                _libc.inotify_rm_watch(self._fd, wd)

    def _change(self, change: str, name: str) -> None:
        self._stream.event({"type": "change", "change": change, "name": name})

    def _stop(self) -> None:
        self._loop.forget(self._fd)
        os.close(self._fd)
        self._stream.end({})
