"""The agent's ends of a child's standard streams. Both are bounded in memory, whatever the child does (H15)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
import termios
from collections.abc import Callable

from .loop import Later, Loop, Task
from .wire import CHUNK_BYTES

SPOOL_MEMORY_BYTES = 1 << 20


class Ends:
    """The descriptors made for one child. `theirs` close at the end of the block; `ours` only if it fails."""

    def __init__(self) -> None:
        self.ours: list[int] = []
        self.theirs: list[int] = []

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        for fd in {*self.theirs, *(self.ours if failed else ())}:
            os.close(fd)

    def from_child(self) -> tuple[int, int]:
        """(our end, its end) of a pipe that it writes."""
        reader, writer = os.pipe()
        self.ours.append(reader)
        self.theirs.append(writer)
        return reader, writer

    def to_child(self) -> tuple[int, int]:
        reader, writer = os.pipe()
        self.ours.append(writer)
        self.theirs.append(reader)
        return writer, reader

    def null(self) -> int:
        self.theirs.append(fd := os.open("/dev/null", os.O_RDONLY))
        return fd

    def terminal(self) -> tuple[int, int, int]:
        """(ours to read, ours to write, its own)."""
        master, slave = os.openpty()
        self.ours.append(master)
        self.theirs.append(slave)
        self.ours.append(writer := os.dup(master))
        return master, writer, slave


class Output:
    """One output: read as the host keeps up, given to `sink(channel, data)`. Owns fd."""

    def __init__(self, loop: Loop, fd: int, channel: int, sink: Callable[[int, bytes], None]) -> None:
        os.set_blocking(fd, False)
        self.fd, self._loop, self._channel, self._sink = fd, loop, channel, sink
        self.ended = Later(loop)

    def start(self) -> None:
        self._loop.reading(self.fd, self._readable)

    def _readable(self) -> None:
        self._read(CHUNK_BYTES)

    def _read(self, size: int) -> int:
        try:
            data = os.read(self.fd, size)
        except BlockingIOError:
            return 0
        except OSError as e:
            if e.errno != errno.EIO:  # a terminal whose other side is gone
                raise
            data = b""
        if data:
            self._sink(self._channel, data)
        else:
            self.close()
        return len(data)

    def drain(self) -> Task:
        """Reads what is in the pipe now. Not until EAGAIN: an orphan that holds the pipe could write for ever."""
        left = 0 if self.ended.done else self.waiting()
        while left > 0 and (size := self._read(min(left, CHUNK_BYTES))):
            left -= size
            yield None

    def waiting(self) -> int:
        return struct.unpack("i", fcntl.ioctl(self.fd, termios.FIONREAD, b"\0" * 4))[0]

    def close(self) -> None:
        if not self.ended.done:
            self._loop.forget(self.fd)
            os.close(self.fd)
            self.ended.resolve(None)


class Input:
    """What the host sent for a child that may never read it: the first MiB in memory, the rest in an unlinked file
    in the sandbox's own /tmp, so under its disk limit. Owns fd."""

    def __init__(self, loop: Loop, fd: int) -> None:
        os.set_blocking(fd, False)
        self._loop, self._fd = loop, fd
        self._spool = tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY_BYTES)  # noqa: SIM115
        self._start = self._stop = 0
        self._closing = self.closed = False

    def write(self, data: bytes) -> None:
        """Raises OSError (ENOSPC). What comes after close() or after the child closed its side is dropped."""
        if self._closing or self.closed:
            return
        self._spool.seek(self._stop)
        self._spool.write(data)
        self._stop += len(data)
        self._pump()

    def close(self) -> None:
        """End of input, once all of it is taken."""
        self._closing = True
        self._pump()

    def abandon(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.forget(self._fd)
            os.close(self._fd)
            self._spool.close()

    def _pump(self) -> None:
        try:
            while not self.closed and self._start < self._stop:
                self._spool.seek(self._start)
                self._start += os.write(self._fd, self._spool.read(CHUNK_BYTES))
        except BlockingIOError:
            self._loop.writing(self._fd, self._pump)
            return
        except OSError as e:
            if e.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.abandon()  # the child closed its stdin
        if self.closed:
            return
        self._loop.writing(self._fd, None)
        self._start = self._stop = 0
        self._spool.truncate(0)
        if self._closing:
            self.abandon()
