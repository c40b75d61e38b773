"""The SDK. `AsyncSandbox` is the one that is written; `Sandbox` is its blocking face.

with Sandbox(policy="data-analysis") as box:
    result = box.run("import pandas as pd; pd.DataFrame({'a': [1, 2]}).describe()")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from fumehood.client.calls import OnResult, OnText, await_engine, await_with_callbacks, block_on, block_with_callbacks
from fumehood.client.contexts import AsyncContexts, Contexts
from fumehood.client.core import Core, as_argv
from fumehood.client.engine import Engine
from fumehood.client.files import AsyncFiles, Files
from fumehood.client.listing import discard, kept, there
from fumehood.client.process import AsyncProcess, Process, start_process
from fumehood.client.snapshots import Snapshot
from fumehood.model import Result
from fumehood.records import SandboxRecord
from fumehood.runtime.base import Capabilities, Stats

__all__ = ["AsyncSandbox", "Sandbox", "Snapshot", "capabilities"]

Records = list[SandboxRecord]  # `list` is also a method here
Kept = list[Snapshot]


def capabilities(tier: str = "auto") -> Capabilities:
    """What `tier` can enforce on this host."""
    engine = Engine.of_this_process()

    async def ask() -> Capabilities:
        return engine.supervisor.runtime(tier).capabilities()

    return block_on(engine, ask())


class AsyncSandbox(Core):
    """A sandbox of this process, or of a server (`url=`). Raises PolicyError at once for a bad policy, the rest when opened."""

    @classmethod
    async def connect(cls, sandbox_id: str, *, url: str | None = None, api_key: str | None = None) -> Self:
        """Join one that lives on a server. close() then leaves it alive. Raises NotFound, ServerUnreachable."""
        return await cls._joining(sandbox_id, url, api_key).open()

    @property
    def files(self) -> AsyncFiles:
        return AsyncFiles(self)

    @property
    def contexts(self) -> AsyncContexts:
        return AsyncContexts(self)

    async def open(self) -> Self:
        """Create the sandbox, where no `async with` does it. Raises ProtectionUnavailable, CapacityExceeded, SetupFailed."""
        await await_engine(self._engine, self._open())
        return self

    async def close(self) -> None:
        """End it and give everything back. Idempotent."""
        await await_engine(self._engine, self._close())

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        await self.close()

    async def run(
        self,
        code: str,
        *,
        language: str = "python",
        context: str | None = None,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_result: OnResult | None = None,
    ) -> Result:
        """Run code in a context that keeps its state. A failing program is a Result, not an exception."""
        work = self._code(code, language, context, timeout_s, env)
        return await await_with_callbacks(self._engine, work, on_stdout, on_stderr, on_result)

    async def exec(
        self,
        argv: Sequence[str] | str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        timeout_s: float | None = None,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
    ) -> Result:
        """Run a program to its end."""
        work = self._program(argv, cwd, env, stdin, timeout_s)
        return await await_with_callbacks(self._engine, work, on_stdout, on_stderr, None)

    async def start(
        self,
        argv: Sequence[str] | str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        pty: tuple[int, int] | None = None,
        stdin: bool = True,
    ) -> AsyncProcess:
        """Start a program in the background; the AsyncProcess follows and steers it."""
        return AsyncProcess(self, await await_engine(self._engine, start_process(self, as_argv(argv), cwd, env, pty, stdin)))

    async def processes(self) -> list[dict[str, Any]]:
        """The programs that run in it: `{"pid", "argv", "cwd", "tag", "pty"}` each."""
        return (await await_engine(self._engine, self.port.link.call("exec.list")))["processes"]

    async def checkpoint(self, context: str | None = None) -> str:
        """Keep the state of a Python context and of the home directory; not of threads and child processes."""
        return await await_engine(self._engine, self.port.checkpoint(context))

    async def snapshot(self, metadata: Mapping[str, str] | None = None) -> Snapshot:
        """Keep all of it as it is now, memory, programs and files, for rollback() and Sandbox(snapshot=).
        It goes on afterwards; whoever followed a program or a watch in it gets Detached. discard_snapshot() forgets it.

        Raises Unsupported (a tier without snapshots, such as native), InvalidTransition while something runs in it,
        CapacityExceeded (the disk is full), InvalidInput (`metadata` is kept by a server only).
        """
        return await await_engine(self._engine, self._snapshot(metadata))

    async def fork(self, count: int) -> list[Self]:
        """`count` (1 to 64) running copies, all or none, open already: use each in `async with`, or close() it. None sees
        another or this one; ids, clock and the kernel's random numbers are their own, and so is their time to live.

        Raises as snapshot().
        """
        return await await_engine(self._engine, self._fork(count))

    async def rollback(self, name: str) -> None:
        """Back to what `checkpoint()` kept of a context, or to a `snapshot()` of this sandbox, by its id: memory, programs
        and files; what runs in it ends. Raises NotFound for an unknown one, Unsupported, CapacityExceeded, SandboxGone.
        """
        await await_engine(self._engine, self._rollback(name))

    async def pause(self) -> None:
        """Stop every process of the sandbox where it is; deadlines go on."""
        await await_engine(self._engine, self.port.pause())

    async def resume(self) -> None:
        """Let what `pause()` stopped go on."""
        await await_engine(self._engine, self.port.resume())

    async def extend(self, seconds: float) -> None:
        """It ends `seconds` from now, sooner or later than it would have. Raises InvalidInput."""
        await await_engine(self._engine, self._extend(seconds))

    async def stats(self) -> Stats:
        """Memory, processes and usage now, by the host's accounting."""
        return await await_engine(self._engine, self.port.stats())

    async def kill(self) -> None:
        """End every process of the sandbox at once. Later calls raise SandboxGone."""
        await await_engine(self._engine, self.port.kill())

    @classmethod
    async def list(
        cls, *, url: str | None = None, api_key: str | None = None, state: str | None = None, limit: int = 1000
    ) -> Records:
        """The caller's sandboxes on a server: those that live, or with `state="stopped"` those that ended."""
        engine = Engine.of_this_process()
        return await await_engine(engine, there(engine, url, api_key, state, limit))

    @classmethod
    async def snapshots(
        cls,
        *,
        sandbox_id: str | None = None,
        tier: str = "auto",
        url: str | None = None,
        api_key: str | None = None,
        limit: int = 1000,
    ) -> Kept:
        """What was kept of `sandbox_id`, or of all, newest first: the caller's on a server; without one what `tier` has on this
        host, whoever made it. Raises Unsupported for a tier without snapshots.
        """
        engine = Engine.of_this_process()
        return await await_engine(engine, kept(engine, url, api_key, tier, sandbox_id, limit))

    @classmethod
    async def discard_snapshot(
        cls, snapshot_id: str, *, tier: str = "auto", url: str | None = None, api_key: str | None = None
    ) -> None:
        """Forget one; sandboxes that came from it go on. `tier`: without a server, where it was made. Raises NotFound,
        Unsupported, InvalidInput.
        """
        engine = Engine.of_this_process()
        await await_engine(engine, discard(engine, url, api_key, tier, snapshot_id))


class Sandbox(Core):
    """AsyncSandbox, blocking. Safe to use from several threads. Opens on first `with` or open()."""

    @classmethod
    def connect(cls, sandbox_id: str, *, url: str | None = None, api_key: str | None = None) -> Self:
        """Join one that lives on a server. close() then leaves it alive. Raises NotFound, ServerUnreachable."""
        return cls._joining(sandbox_id, url, api_key).open()

    @property
    def files(self) -> Files:
        return Files(self)

    @property
    def contexts(self) -> Contexts:
        return Contexts(self)

    def open(self) -> Self:
        """Create the sandbox, where no `with` does it. Raises ProtectionUnavailable, CapacityExceeded, SetupFailed."""
        block_on(self._engine, self._open())
        return self

    def close(self) -> None:
        """End it and give everything back. Idempotent."""
        block_on(self._engine, self._close())

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def run(
        self,
        code: str,
        *,
        language: str = "python",
        context: str | None = None,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
        on_result: OnResult | None = None,
    ) -> Result:
        """Run code in a context that keeps its state. A failing program is a Result, not an exception."""
        work = self._code(code, language, context, timeout_s, env)
        return block_with_callbacks(self._engine, work, on_stdout, on_stderr, on_result)

    def exec(
        self,
        argv: Sequence[str] | str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        timeout_s: float | None = None,
        on_stdout: OnText | None = None,
        on_stderr: OnText | None = None,
    ) -> Result:
        """Run a program to its end."""
        work = self._program(argv, cwd, env, stdin, timeout_s)
        return block_with_callbacks(self._engine, work, on_stdout, on_stderr, None)

    def start(
        self,
        argv: Sequence[str] | str,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        pty: tuple[int, int] | None = None,
        stdin: bool = True,
    ) -> Process:
        """Start a program in the background; the Process follows and steers it."""
        return Process(self, block_on(self._engine, start_process(self, as_argv(argv), cwd, env, pty, stdin)))

    def processes(self) -> list[dict[str, Any]]:
        """The programs that run in it: `{"pid", "argv", "cwd", "tag", "pty"}` each."""
        return block_on(self._engine, self.port.link.call("exec.list"))["processes"]

    def checkpoint(self, context: str | None = None) -> str:
        """Keep the state of a Python context and of the home directory; not of threads and child processes."""
        return block_on(self._engine, self.port.checkpoint(context))

    def snapshot(self, metadata: Mapping[str, str] | None = None) -> Snapshot:
        """Keep all of it as it is now, memory, programs and files, for rollback() and Sandbox(snapshot=).
        It goes on afterwards; whoever followed a program or a watch in it gets Detached. discard_snapshot() forgets it.

        Raises Unsupported (a tier without snapshots, such as native), InvalidTransition while something runs in it,
        CapacityExceeded (the disk is full), InvalidInput (`metadata` is kept by a server only).
        """
        return block_on(self._engine, self._snapshot(metadata))

    def fork(self, count: int) -> list[Self]:
        """`count` (1 to 64) running copies, all or none, open already: use each in `with`, or close() it. None sees
        another or this one; ids, clock and the kernel's random numbers are their own, and so is their time to live.

        Raises as snapshot().
        """
        return block_on(self._engine, self._fork(count))

    def rollback(self, name: str) -> None:
        """Back to what `checkpoint()` kept of a context, or to a `snapshot()` of this sandbox, by its id: memory, programs
        and files; what runs in it ends. Raises NotFound for an unknown one, Unsupported, CapacityExceeded, SandboxGone.
        """
        block_on(self._engine, self._rollback(name))

    def pause(self) -> None:
        """Stop every process of the sandbox where it is; deadlines go on."""
        block_on(self._engine, self.port.pause())

    def resume(self) -> None:
        """Let what `pause()` stopped go on."""
        block_on(self._engine, self.port.resume())

    def extend(self, seconds: float) -> None:
        """It ends `seconds` from now, sooner or later than it would have. Raises InvalidInput."""
        block_on(self._engine, self._extend(seconds))

    def stats(self) -> Stats:
        """Memory, processes and usage now, by the host's accounting."""
        return block_on(self._engine, self.port.stats())

    def kill(self) -> None:
        """End every process of the sandbox at once. Later calls raise SandboxGone."""
        block_on(self._engine, self.port.kill())

    @classmethod
    def list(
        cls, *, url: str | None = None, api_key: str | None = None, state: str | None = None, limit: int = 1000
    ) -> Records:
        """The caller's sandboxes on a server: those that live, or with `state="stopped"` those that ended."""
        engine = Engine.of_this_process()
        return block_on(engine, there(engine, url, api_key, state, limit))

    @classmethod
    def snapshots(
        cls,
        *,
        sandbox_id: str | None = None,
        tier: str = "auto",
        url: str | None = None,
        api_key: str | None = None,
        limit: int = 1000,
    ) -> Kept:
        """What was kept of `sandbox_id`, or of all, newest first: the caller's on a server; without one what `tier` has on this
        host, whoever made it. Raises Unsupported for a tier without snapshots.
        """
        engine = Engine.of_this_process()
        return block_on(engine, kept(engine, url, api_key, tier, sandbox_id, limit))

    @classmethod
    def discard_snapshot(
        cls, snapshot_id: str, *, tier: str = "auto", url: str | None = None, api_key: str | None = None
    ) -> None:
        """Forget one; sandboxes that came from it go on. `tier`: without a server, where it was made. Raises NotFound,
        Unsupported, InvalidInput.
        """
        engine = Engine.of_this_process()
        block_on(engine, discard(engine, url, api_key, tier, snapshot_id))
