"""A program inside with this process's standard input and outputs as its own."""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
import sys
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from fumehood.cli import show, terminal
from fumehood.errors import FumehoodError

if TYPE_CHECKING:
    from fumehood.client.process import AsyncProcess, Exit
    from fumehood.client.sandbox import AsyncSandbox

_END_S = 2.0  # what a program gets to end itself after Ctrl-C


async def run_in(box: AsyncSandbox, argv: list[str], cwd: str | None, env: dict[str, str], tty: bool) -> Exit:
    if tty:
        return await terminal.join(await box.start(argv, cwd=cwd, env={**terminal.ENV, **env}, pty=terminal.size()))
    # A terminal's lines are not for it: without -t it has no input, as a job in the background has none.
    piped = not sys.stdin.isatty()
    process = await box.start(argv, cwd=cwd, env=env, stdin=piped)
    if piped:
        threading.Thread(target=_feed, args=(process, asyncio.get_running_loop()), daemon=True).start()
    try:
        return await _follow(process)
    except asyncio.CancelledError:
        await _end(process)
        raise


def _feed(process: AsyncProcess, loop: asyncio.AbstractEventLoop) -> None:
    """A thread, since a regular file can't be awaited; a daemon, since the program may end while nothing comes."""
    fd = sys.stdin.fileno()
    try:
        while data := os.read(fd, 65_536):
            asyncio.run_coroutine_threadsafe(process.write(data), loop).result()
        asyncio.run_coroutine_threadsafe(process.close_stdin(), loop).result()
    except (FumehoodError, CancelledError, RuntimeError):  # the program or this command ended: nobody wants the rest
        return


async def _follow(process: AsyncProcess) -> Exit:
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
    async for name, data in process:
        stream = sys.stderr if name == "stderr" else sys.stdout
        if stream.isatty():
            show.write(stream, decoders[name].decode(data))
        else:
            show.raw(stream, data)
    return await process.wait()


async def _end(process: AsyncProcess) -> None:
    """Ctrl-C is meant for the program: as on a terminal it may end itself, then it is ended."""
    await process.signal(signal.SIGINT, group=True)
    try:
        await asyncio.wait_for(process.wait(), _END_S)
    except TimeoutError:
        await process.signal(signal.SIGKILL, group=True)
