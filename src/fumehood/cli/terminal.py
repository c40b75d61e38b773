"""This terminal joined with a program's terminal inside: keys go in, what it draws comes out, it follows the window's size."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fumehood.cli import show
from fumehood.errors import InvalidInput

if TYPE_CHECKING:
    from fumehood.client.process import AsyncProcess, Exit

ENV = {"TERM": "xterm-256color", "PS1": r"sandbox:\w\$ "}


def demand() -> None:
    """Raises InvalidInput where standard input is no terminal."""
    if not sys.stdin.isatty():
        raise InvalidInput(
            "standard input is not a terminal", cause="a shell needs one", remediation="use fumehood run for programs"
        )


async def join(process: AsyncProcess) -> Exit:
    loop = asyncio.get_running_loop()
    stdin = sys.stdin.fileno()
    keys: asyncio.Queue[bytes] = asyncio.Queue()
    resizes: set[asyncio.Task[None]] = set()
    with _restored(stdin):
        tty.setraw(stdin)
        loop.add_reader(stdin, lambda: keys.put_nowait(os.read(stdin, 65536)))
        loop.add_signal_handler(signal.SIGWINCH, lambda: resizes.add(loop.create_task(process.resize(*size()))))
        typing = loop.create_task(_type(keys, process))
        try:
            async for _, data in process:
                show.raw(sys.stdout, data)
            return await process.wait()
        finally:
            loop.remove_reader(stdin)
            loop.remove_signal_handler(signal.SIGWINCH)
            for task in (typing, *resizes):
                task.cancel()
            await asyncio.gather(typing, *resizes, return_exceptions=True)


async def _type(keys: asyncio.Queue[bytes], process: AsyncProcess) -> None:
    while data := await keys.get():
        await process.write(data)
    await process.close_stdin()


def size() -> tuple[int, int]:
    """(rows, columns)"""
    found = os.get_terminal_size(sys.stdin.fileno())
    return (found.lines or 24, found.columns or 80)


@contextmanager
def keys_at_once(fd: int) -> Generator[None]:
    """Keys arrive without Enter and unseen, while Ctrl-C still interrupts."""
    with _restored(fd):
        tty.setcbreak(fd)
        yield


@contextmanager
def _restored(fd: int) -> Generator[None]:
    before = termios.tcgetattr(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
