"""A process's memory, made its own before a machine is snapshotted: else each clone pays for the same page faults."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re

MADV_POPULATE_WRITE = 23  # Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


def own() -> None:
    """Ends the sharing that fork() began. Of two that share, the second to do so keeps the pages that were there, so they stay
    on the account of the control group that made them. Raises OSError.

    What can't be populated is left as it is: [vvar] is no memory, and a kernel before 5.14 does not know the advice.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        lines = [line.split(maxsplit=2) for line in maps]
    for area, permissions, _ in lines:
        if permissions == "rw-p":
            start, stop = (int(end, 16) for end in area.split("-"))
            _own(start, stop - start)


def _own(start: int, length: int) -> None:
    """The pages that are there; more would be new ones, for room that libraries took and may never use."""
    there = ctypes.create_string_buffer(length // mmap.PAGESIZE)
    if _libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), there):
        return _check(errno.ENOMEM)
    for run in re.finditer(rb"[^\0]+", there.raw):
        first = start + run.start() * mmap.PAGESIZE
        size = ctypes.c_size_t((run.end() - run.start()) * mmap.PAGESIZE)
        if _libc.madvise(ctypes.c_void_p(first), size, MADV_POPULATE_WRITE):
            _check(errno.EINVAL, errno.ENOMEM)
    return None


def _check(*expected: int) -> None:
    """ENOMEM: unmapped since the file was read."""
    if (number := ctypes.get_errno()) not in expected:
        raise OSError(number, os.strerror(number))
