"""An initramfs: a cpio archive in the "newc" format (cpio(5)), the same bytes for the same contents."""

from __future__ import annotations

import stat
from collections.abc import Mapping

_TRAILER = "TRAILER!!!"


def archive(files: Mapping[str, tuple[int, bytes]], directories: tuple[str, ...]) -> bytes:
    """`files`: path -> (permission bits, contents); the directories that they lie in have to be named, outer ones first."""
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in directories]
    entries += [(name, stat.S_IFREG | mode, data) for name, (mode, data) in sorted(files.items())]
    return b"".join(_entry(n, *e) for n, e in enumerate([*entries, (_TRAILER, 0, b"")], 1))


def _entry(inode: int, name: str, mode: int, data: bytes) -> bytes:
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, mtime, size, four device numbers, length of the name with its NUL, check sum
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
