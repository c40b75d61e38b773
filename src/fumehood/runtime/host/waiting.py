"""Waiting for the kernel in the loop, where no thread has to stand for it."""

from __future__ import annotations

import asyncio
import os


async def readable(fd: int) -> None:
    """Returns when `fd` has something to read, or for a pidfd: when its process has ended."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    watched = os.dup(fd)  # two may wait for one descriptor, of which a loop takes one reader only
    loop.add_reader(watched, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(watched)
        os.close(watched)
