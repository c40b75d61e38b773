"""Files of a guest's memory, which are mostly holes: a page that nobody touched takes no room on the disk."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

BLOCK_BYTES = 64 << 10
_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02
_libc = ctypes.CDLL(None, use_errno=True)


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """(start, end) of whatever is no hole."""
    position, size = 0, os.fstat(fd).st_size
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # nothing but a hole follows
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def copy(source: int, target: int) -> None:
    """`source` as it is, holes included, into the empty `target`. Raises OSError."""
    os.ftruncate(target, os.fstat(source).st_size)
    for start, end in extents(source):
        while start < end:
            copied = os.copy_file_range(source, target, end - start, start, start)
            if copied == 0:
                raise OSError(errno.EIO, "the file has become shorter while it was copied")
            start += copied


def punch(fd: int) -> None:
    """Makes holes of blocks that are all zeros. Raises OSError."""
    for start, end in list(_zeros(fd)):
        if _libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH_HOLE, ctypes.c_long(start), ctypes.c_long(end - start)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _zeros(fd: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of such blocks that takes room."""
    zeros = bytes(BLOCK_BYTES)
    for start, end in extents(fd):
        run = block = start
        while block < end:
            data = os.pread(fd, min(BLOCK_BYTES - block % BLOCK_BYTES, end - block), block)
            if not data:
                raise OSError(errno.EIO, "the file has become shorter while it was read")  # a monitor's, which may do so
            if data != zeros[: len(data)]:
                if run < block:
                    yield run, block
                run = block + len(data)
            block += len(data)
        if run < end:
            yield run, end
