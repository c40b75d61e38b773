"""Standard input as lines for the SDK, from a thread that nobody has to wait for.

The SDK's own reader sits in a thread's read() that no cancellation reaches: after SIGTERM or Ctrl-C the server would hang
until its client closed the pipe. This thread is a daemon and reads raw, so no lock of Python's is held when the process ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

from fumehood.model import MIB

_MAX_LINE_BYTES = 16 * MIB
_QUEUED = 64  # lines read ahead; then the client's pipe fills and it waits


@asynccontextmanager
async def stdin_lines() -> AsyncGenerator[AsyncIterator[str], None]:
    """Lines of fd 0, which points at the null device meanwhile so that nothing else can eat of the protocol."""
    private = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    try:
        yield _lines(private)
    finally:
        os.dup2(private, 0)  # `private` stays open: the thread may still sit in a read of it


async def _lines(fd: int) -> AsyncGenerator[str, None]:
    loop, arrived, room = asyncio.get_running_loop(), asyncio.Queue[bytes | None](), threading.Semaphore(_QUEUED)

    def hand_over(line: bytes | None) -> None:
        room.acquire()
        loop.call_soon_threadsafe(arrived.put_nowait, line)

    threading.Thread(target=_read, args=(fd, hand_over), name="fumehood-mcp-stdin", daemon=True).start()
    while (line := await arrived.get()) is not None:
        room.release()
        yield line.decode(errors="replace")


def _read(fd: int, hand_over: Callable[[bytes | None], None]) -> None:
    rest = bytearray()
    try:
        while len(rest) <= _MAX_LINE_BYTES and (chunk := os.read(fd, 1 << 16)):
            *lines, last = chunk.split(b"\n")
            for line in lines:
                hand_over(bytes(rest + line))
                rest.clear()
            rest += last
        hand_over(None)
    except RuntimeError:
        return  # the loop is closed: nobody listens any more
