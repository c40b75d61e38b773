"""`fumehood shell`: an interactive terminal in a new sandbox."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.cli import exits, profiles
from fumehood.errors import InvalidInput

if TYPE_CHECKING:
    from fumehood.client.process import AsyncProcess, Exit

DAY_S = 86_400.0


def shell(
    policy: Annotated[str | None, typer.Option(help="A preset or a policy file.")] = None,
    tier: Annotated[str, typer.Option(help="auto, native or fake.")] = "auto",
    template: Annotated[str | None, typer.Option(help="What the sandbox is made from.")] = None,
    command: Annotated[str, typer.Option("--command", help="The program to start.")] = "bash",
) -> None:
    """Open a terminal in a new sandbox; it is gone when you leave."""

    async def work() -> int:
        with profiles.named(policy):
            return await _shell(command, {"policy": policy, "tier": tier, "template": template})

    exits.drive(work())


async def _shell(command: str, sandbox: dict[str, Any]) -> int:
    from fumehood.client.sandbox import AsyncSandbox

    if not sys.stdin.isatty():
        raise InvalidInput(
            "standard input is not a terminal", cause="a shell needs one", remediation="use fumehood run for programs"
        )
    async with AsyncSandbox(**sandbox, limits={"lifetime_s": DAY_S, "timeout_s": DAY_S}) as box:
        env = {"TERM": "xterm-256color", "PS1": r"sandbox:\w\$ "}
        process = await box.start([command], env=env, pty=_size())
        with _raw(sys.stdin.fileno()):
            ended = await _join(process)
    return ended.exit_code if ended.exit_code is not None else 128 + (ended.signal or 0)


async def _join(process: AsyncProcess) -> Exit:
    loop = asyncio.get_running_loop()
    stdin = sys.stdin.fileno()
    keys: asyncio.Queue[bytes] = asyncio.Queue()
    loop.add_reader(stdin, lambda: keys.put_nowait(os.read(stdin, 65536)))
    resizes: set[asyncio.Task[None]] = set()
    loop.add_signal_handler(signal.SIGWINCH, lambda: resizes.add(loop.create_task(process.resize(*_size()))))
    typing = loop.create_task(_type(keys, process))
    try:
        async for _, data in process:
            _put(data)
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


def _put(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]


def _size() -> tuple[int, int]:
    size = os.get_terminal_size(sys.stdin.fileno())
    return (size.lines or 24, size.columns or 80)


@contextmanager
def _raw(fd: int) -> Generator[None]:
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
