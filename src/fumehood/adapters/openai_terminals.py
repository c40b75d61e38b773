"""The terminals of the OpenAI Agents SDK's shell tool: programs that outlive a call, read and written piece by piece."""

from __future__ import annotations

import asyncio
import signal
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from agents.sandbox.errors import PtySessionNotFoundError
from agents.sandbox.session import BaseSandboxSession
from agents.sandbox.session.pty_output import collect_pty_output
from agents.sandbox.session.pty_types import (
    PTY_PROCESSES_MAX,
    PtyExecUpdate,
    allocate_pty_process_id,
    clamp_pty_yield_time_ms,
    process_id_to_prune_from_meta,
    resolve_pty_write_yield_time_ms,
)
from agents.sandbox.types import User

from fumehood.client.process import AsyncProcess
from fumehood.client.sandbox import AsyncSandbox
from fumehood.errors import NotFound, SandboxGone
from fumehood.model import MIB

_SIZE = (24, 80)  # rows, columns
_KEPT_BYTES = 1 * MIB  # of output from one asking to the next; the SDK would gather without bound while it waits (H15)
_DROPPED = b"\n[more output than 1 MiB at once: the rest is left out]\n"


class Terminal:
    """One program and its output since it was last asked for."""

    def __init__(self, process: AsyncProcess, tty: bool) -> None:
        self.process, self.tty, self.used = process, tty, time.monotonic()
        self.chunks, self.lock, self.arrived, self.ended = deque[bytes](), asyncio.Lock(), asyncio.Event(), asyncio.Event()
        self.exit_code: int | None = None
        self.room = _KEPT_BYTES
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for _, data in self.process:
                if self.room > 0:
                    async with self.lock:
                        self.chunks.append(data[: self.room] + (_DROPPED if len(data) >= self.room else b""))
                    self.room -= len(data)
                    self.arrived.set()
            ended = await self.process.wait()
            self.exit_code = ended.exit_code if ended.exit_code is not None else 128 + (ended.signal or signal.SIGKILL)
        except SandboxGone:
            self.exit_code = 128 + signal.SIGKILL
        finally:
            self.ended.set()
            self.arrived.set()

    async def end(self) -> None:
        if not self.ended.is_set():
            try:
                await self.process.signal(signal.SIGKILL, group=True)
            except (NotFound, SandboxGone):
                self.ended.set()  # it went by itself just now
        self.reader.cancel()
        await asyncio.gather(self.reader, return_exceptions=True)


class Terminals(BaseSandboxSession):
    """The half of a session that has terminals; the other half says in which environment programs run."""

    def __init__(self, box: AsyncSandbox) -> None:
        self._box = box
        self._terminals: dict[int, Terminal] = {}

    def supports_pty(self) -> bool:
        return True

    @abstractmethod
    async def _environment(self) -> Mapping[str, str]: ...

    async def pty_exec_start(
        self,
        *command: str | Path,
        timeout: float | None = None,  # noqa: ASYNC109 # the SDK's name
        shell: bool | list[str] = True,
        user: str | User | None = None,
        tty: bool = False,
        yield_time_s: float | None = None,
        max_output_tokens: int | None = None,
    ) -> PtyExecUpdate:
        argv = self._prepare_exec_command(*command, shell=shell, user=user)
        env, cwd = await self._environment(), self.state.manifest.root
        process = await self._box.start(argv, cwd=cwd, env=env, pty=_SIZE if tty else None, stdin=tty)
        await self._make_room()
        number = allocate_pty_process_id(set(self._terminals))
        self._terminals[number] = Terminal(process, tty)
        wait_ms = clamp_pty_yield_time_ms(10_000 if yield_time_s is None else int(yield_time_s * 1000))
        return await self._update(number, wait_ms, max_output_tokens)

    async def pty_write_stdin(
        self, *, session_id: int, chars: str, yield_time_s: float | None = None, max_output_tokens: int | None = None
    ) -> PtyExecUpdate:
        terminal = self._terminals.get(session_id)
        if terminal is None:
            raise PtySessionNotFoundError(session_id=session_id)
        if chars:
            if not terminal.tty:
                raise RuntimeError("stdin is not available for this process")
            await terminal.process.write(chars.encode())
        terminal.used = time.monotonic()
        asked_ms = 250 if yield_time_s is None else int(yield_time_s * 1000)
        wait_ms = resolve_pty_write_yield_time_ms(yield_time_ms=asked_ms, input_empty=not chars)
        return await self._update(session_id, wait_ms, max_output_tokens)

    async def pty_terminate_all(self) -> None:
        terminals, self._terminals = list(self._terminals.values()), {}
        for terminal in terminals:
            await terminal.end()

    async def _update(self, number: int, wait_ms: int, max_output_tokens: int | None) -> PtyExecUpdate:
        terminal = self._terminals[number]
        terminal.room = _KEPT_BYTES
        output, tokens, closed = await collect_pty_output(
            output_chunks=terminal.chunks,
            output_lock=terminal.lock,
            output_notify=terminal.arrived,
            is_done=terminal.ended.is_set,
            yield_time_ms=wait_ms,
            max_output_tokens=max_output_tokens,
        )
        if closed:
            self._terminals.pop(number, None)
            await terminal.end()
        return PtyExecUpdate(None if closed else number, output, terminal.exit_code if closed else None, tokens)

    async def _make_room(self) -> None:
        if len(self._terminals) < PTY_PROCESSES_MAX:
            return
        meta = [(number, t.used, t.ended.is_set()) for number, t in self._terminals.items()]
        if (oldest := process_id_to_prune_from_meta(meta)) is not None:
            await self._terminals.pop(oldest).end()
