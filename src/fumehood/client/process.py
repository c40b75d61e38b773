"""A program in the background of a sandbox: read it live, write to it, signal it, resize its terminal, wait for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fumehood.agent import wire
from fumehood.client.calls import await_engine, block_on
from fumehood.client.port import Link, Stream
from fumehood.errors import WireError

if TYPE_CHECKING:
    from fumehood.client.sandbox import AsyncSandbox, Sandbox

Chunk = tuple[str, bytes]  # ("stdout" | "stderr" | "terminal", bytes)
_NAMES = {wire.STDOUT: "stdout", wire.STDERR: "stderr", wire.TERMINAL: "terminal"}


@dataclass(frozen=True, slots=True)
class Exit:
    """How it ended: one of the two is set."""

    exit_code: int | None
    signal: int | None


@dataclass
class Started:
    pid: int
    stream: Stream
    link: Link

    async def next(self) -> Chunk | None:
        async for frame in self.stream:
            if frame.kind == wire.DATA:
                return _NAMES.get(frame.payload[0], "stdout"), frame.payload[1:]
        return None

    async def wait(self) -> Exit:
        end = await self.stream.result()
        return Exit(end.get("exit_code"), end.get("signal"))


async def start_process(
    box: AsyncSandbox | Sandbox,
    argv: tuple[str, ...],
    cwd: str | None,
    env: Mapping[str, str] | None,
    pty: tuple[int, int] | None,
    stdin: bool,
) -> Started:
    arguments: dict[str, Any] = {"argv": list(argv), "env": dict(env or {}), "stdin": stdin}
    if cwd:
        arguments["cwd"] = cwd
    if pty:
        arguments["pty"] = {"rows": pty[0], "cols": pty[1]}
    return await _followed(box.port.link, await box.port.link.open("exec.start", **arguments))


async def _followed(link: Link, stream: Stream) -> Started:
    async for frame in stream:
        event = link.checked_json(frame) if frame.kind == wire.EVENT else {}
        if event.get("type") == "started":
            return Started(int(event["pid"]), stream, link)
    raise WireError("the agent ended the stream before it named the process")


class AsyncProcess:
    """Iterate for (name, bytes) as they come. Leaving it alone does not end the program; the sandbox's end does."""

    def __init__(self, box: AsyncSandbox, started: Started) -> None:
        self._engine, self._started = box.engine, started
        self.pid = started.pid

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while (chunk := await await_engine(self._engine, self._started.next())) is not None:
            yield chunk

    async def wait(self) -> Exit:
        return await await_engine(self._engine, self._started.wait())

    async def write(self, data: bytes) -> None:
        await await_engine(self._engine, self._started.stream.send(data))

    async def close_stdin(self) -> None:
        await await_engine(self._engine, self._started.stream.close_input())

    async def signal(self, number: int, *, group: bool = False) -> None:
        await await_engine(self._engine, self._call("exec.signal", signal=number, group=group))

    async def resize(self, rows: int, cols: int) -> None:
        await await_engine(self._engine, self._call("exec.resize", rows=rows, cols=cols))

    def _call(self, verb: str, **arguments: Any) -> Any:
        return self._started.link.call(verb, pid=self.pid, **arguments)


class Process:
    """AsyncProcess, blocking."""

    def __init__(self, box: Sandbox, started: Started) -> None:
        self._engine, self._started = box.engine, started
        self.pid = started.pid

    def __iter__(self) -> Iterator[Chunk]:
        while (chunk := block_on(self._engine, self._started.next())) is not None:
            yield chunk

    def wait(self) -> Exit:
        return block_on(self._engine, self._started.wait())

    def write(self, data: bytes) -> None:
        block_on(self._engine, self._started.stream.send(data))

    def close_stdin(self) -> None:
        block_on(self._engine, self._started.stream.close_input())

    def signal(self, number: int, *, group: bool = False) -> None:
        block_on(self._engine, self._call("exec.signal", signal=number, group=group))

    def resize(self, rows: int, cols: int) -> None:
        block_on(self._engine, self._call("exec.resize", rows=rows, cols=cols))

    def _call(self, verb: str, **arguments: Any) -> Any:
        return self._started.link.call(verb, pid=self.pid, **arguments)
