"""The SDK. `AsyncSandbox` is the one that is written; `Sandbox` is its blocking face.

with Sandbox(policy="data-analysis") as box:
    result = box.run("import pandas as pd; pd.DataFrame({'a': [1, 2]}).describe()")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from fumehood.client.calls import OnResult, OnText, await_engine, await_with_callbacks, block_on, block_with_callbacks
from fumehood.client.contexts import AsyncContexts, Contexts
from fumehood.client.engine import Engine
from fumehood.client.files import AsyncFiles, Files
from fumehood.client.process import AsyncProcess, Process, start_process
from fumehood.config import Config
from fumehood.errors import InvalidTransition
from fumehood.execution import Sinks
from fumehood.live import Live
from fumehood.model import CodeRequest, ExecRequest, Protection, Result, SandboxSpec, Template
from fumehood.policy.resolve import resolve
from fumehood.policy.rules import Policy
from fumehood.runtime.base import Capabilities, Stats

T = TypeVar("T")
PolicyLike = str | Path | Policy | Mapping[str, Any] | None


def capabilities(tier: str = "auto") -> Capabilities:
    """What `tier` can enforce on this host."""
    engine = Engine.of_this_process()

    async def ask() -> Capabilities:
        return engine.supervisor.runtime(tier).capabilities()

    return block_on(engine, ask())


class _Core:
    """What both faces share: the resolved spec and the live sandbox. No I/O."""

    def __init__(
        self,
        *,
        policy: PolicyLike = None,
        template: str | Template | None = None,
        limits: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        tier: str = "auto",
        config: Config | None = None,
    ) -> None:
        self._engine = Engine.of_this_process(config)
        chosen = policy if policy is not None else self._engine.supervisor.config.default_policy
        self.spec: SandboxSpec = resolve(
            chosen, overrides={"limits": dict(limits)} if limits else {}, env=env or {}, template=template
        )
        self.tier = tier
        self._live: Live | None = None

    @property
    def live(self) -> Live:
        if self._engine.pid != os.getpid():
            raise InvalidTransition(
                "this sandbox belongs to the process that forked this one", remediation="make a new one here"
            )
        if self._live is None:
            raise InvalidTransition("this sandbox is not open", remediation="use it inside `with`, or call open() first")
        return self._live

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def id(self) -> str:
        return self.live.id

    @property
    def protections(self) -> tuple[Protection, ...]:
        """Each mechanism as it is for this sandbox: enforced, degraded or off."""
        return self.live.handle.protections

    async def _open(self) -> None:
        if self._live is None:
            self._live = await self._engine.supervisor.create(self.spec, self.tier)

    async def _close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            await self._engine.supervisor.close_sandbox(live.id)

    def _code(
        self, code: str, language: str, context: str | None, timeout_s: float | None, env: Mapping[str, str] | None
    ) -> Callable[[Sinks], Coroutine[Any, Any, Result]]:
        request = CodeRequest(code, language, context, env or {}, timeout_s)
        return lambda sinks: self.live.run(request, sinks)

    def _program(
        self,
        argv: Sequence[str] | str,
        cwd: str | None,
        env: Mapping[str, str] | None,
        stdin: bytes | None,
        timeout_s: float | None,
    ) -> Callable[[Sinks], Coroutine[Any, Any, Result]]:
        request = ExecRequest(as_argv(argv), env or {}, cwd, stdin, None, timeout_s)
        return lambda sinks: self.live.exec(request, sinks)

    async def _checkpoint(self, context: str | None) -> str:
        context = context or await self._default_context()
        return f"{context}:{(await self.live.link.call('context.checkpoint', id=context))['checkpoint']}"

    async def _default_context(self) -> str:
        contexts = (await self.live.link.call("context.list"))["contexts"]
        return next(c["id"] for c in contexts if c["language"] == "python")

    async def _rollback(self, checkpoint: str) -> None:
        context, _, name = checkpoint.partition(":")
        await self.live.link.call("context.rollback", id=context, checkpoint=name)

    async def _stats(self) -> Stats:
        return self.live.handle.stats()


def as_argv(argv: Sequence[str] | str) -> tuple[str, ...]:
    """A string is a line for bash, as in every shell."""
    return ("/bin/bash", "-c", argv) if isinstance(argv, str) else tuple(argv)


class AsyncSandbox(_Core):
    """A sandbox of this process. Raises PolicyError at once for a bad policy, the rest when it is opened."""

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
        return (await await_engine(self._engine, self.live.link.call("exec.list")))["processes"]

    async def checkpoint(self, context: str | None = None) -> str:
        """Keep the state of a Python context and of the home directory; not of threads and child processes."""
        return await await_engine(self._engine, self._checkpoint(context))

    async def rollback(self, checkpoint: str) -> None:
        """Back to what `checkpoint()` kept. Raises NotFound for an unknown one."""
        await await_engine(self._engine, self._rollback(checkpoint))

    async def pause(self) -> None:
        """Stop every process of the sandbox where it is; deadlines go on."""
        await await_engine(self._engine, self.live.pause())

    async def resume(self) -> None:
        """Let what `pause()` stopped go on."""
        await await_engine(self._engine, self.live.resume())

    async def stats(self) -> Stats:
        """Memory, processes and usage now, by the host's accounting."""
        return await await_engine(self._engine, self._stats())

    async def kill(self) -> None:
        """End every process of the sandbox at once. Later calls raise SandboxGone."""
        await await_engine(self._engine, self.live.kill())


class Sandbox(_Core):
    """AsyncSandbox, blocking. Safe to use from several threads. Opens on first `with` or open()."""

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
        return block_on(self._engine, self.live.link.call("exec.list"))["processes"]

    def checkpoint(self, context: str | None = None) -> str:
        """Keep the state of a Python context and of the home directory; not of threads and child processes."""
        return block_on(self._engine, self._checkpoint(context))

    def rollback(self, checkpoint: str) -> None:
        """Back to what `checkpoint()` kept. Raises NotFound for an unknown one."""
        block_on(self._engine, self._rollback(checkpoint))

    def pause(self) -> None:
        """Stop every process of the sandbox where it is; deadlines go on."""
        block_on(self._engine, self.live.pause())

    def resume(self) -> None:
        """Let what `pause()` stopped go on."""
        block_on(self._engine, self.live.resume())

    def stats(self) -> Stats:
        """Memory, processes and usage now, by the host's accounting."""
        return block_on(self._engine, self._stats())

    def kill(self) -> None:
        """End every process of the sandbox at once. Later calls raise SandboxGone."""
        block_on(self._engine, self.live.kill())
