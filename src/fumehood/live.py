"""One live sandbox: its handle, its link, its state and the tally of what was refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

from fumehood.errors import InvalidInput, InvalidTransition, SandboxGone
from fumehood.events import EgressDenied, Event, SyscallRefused
from fumehood.execution import Capture, Followed, Sinks, follow
from fumehood.model import (
    CodeRequest,
    ConnectionAttempt,
    ExecRequest,
    RefusedSyscall,
    Result,
    SandboxSpec,
    SandboxState,
    Timings,
    move,
)
from fumehood.outcome import Facts, decide, used
from fumehood.runtime.base import Handle, Stats
from fumehood.runtime.link import Link

MAX_CODE_BYTES = 4 << 20
_KILL_WAIT_S = 1.0
_MAX_DISTINCT = 1_000  # different refused calls or addresses remembered for each sandbox


class Live:
    def __init__(self, sandbox_id: str, spec: SandboxSpec) -> None:
        self.id, self.spec = sandbox_id, spec
        self.state = SandboxState.CREATING
        self.handle: Handle
        self.link: Link
        self.create_ms = 0.0
        self.gone_because = ""
        self._active = 0
        self._last_reading: tuple[Stats, bool] | None = None  # of the handle, once it is closed
        self._refused: Counter[tuple[str, str]] = Counter()
        self._attempts: Counter[ConnectionAttempt] = Counter()
        self._expiry: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    def note(self, event: Event) -> None:
        """Host-side events only; nothing that the guest says arrives here (H16)."""
        match event:
            case SyscallRefused():
                _tally(self._refused, (event.name, event.arch))
            case EgressDenied():
                _tally(self._attempts, event.attempt)
            case _:
                pass

    async def run(self, request: CodeRequest, sinks: Sinks) -> Result:
        """Code in a context. Raises InvalidInput for code that can't be code, NotFound for an unknown context."""
        _check_code(request.code)
        arguments: dict[str, Any] = {"code": request.code, "language": request.language, "env": dict(request.env)}
        if request.context is not None:
            arguments["id"] = request.context
        return await self._execute("context.run", arguments, request.timeout_s, sinks, None)

    async def exec(self, request: ExecRequest, sinks: Sinks) -> Result:
        """A program, to its end. Raises InvalidInput or NotFound for an argv or cwd that can't be started."""
        arguments: dict[str, Any] = {
            "argv": list(request.argv),
            "env": dict(request.env),
            "stdin": request.stdin is not None,
            **({"cwd": request.cwd} if request.cwd else {}),
            **({"pty": {"rows": request.pty[0], "cols": request.pty[1]}} if request.pty else {}),
        }
        return await self._execute("exec.start", arguments, request.timeout_s, sinks, request.stdin)

    async def _execute(
        self, verb: str, arguments: dict[str, Any], timeout_s: float | None, sinks: Sinks, stdin: bytes | None
    ) -> Result:
        deadline_s = self.deadline(timeout_s)
        (before, _), refused, attempts = self._reading(), self._refused.copy(), self._attempts.copy()
        self._enter()
        with contextlib.ExitStack() as undo:  # also when the caller left
            undo.callback(self._leave)
            stream = await self.link.open(verb, **arguments)
            undo.callback(asyncio.create_task(_feed(stream, stdin)).cancel)
            done = await follow(self.link, stream, verb, Capture(self.spec.limits, sinks), deadline_s, self.kill)
        return self._result(done, before, self._refused - refused, self._attempts - attempts, deadline_s)

    def deadline(self, asked_s: float | None) -> float:
        """A call may shorten the sandbox's own limit, never lengthen it."""
        limit_s = self.spec.limits.timeout_s
        if asked_s is not None and not 0 < asked_s <= limit_s:
            raise InvalidInput(
                f"timeout_s = {asked_s!r} is out of range",
                cause=f"this sandbox's limit is {limit_s:g} s",
                remediation="create the sandbox with a longer timeout_s",
            )
        return limit_s if asked_s is None else asked_s

    def _enter(self) -> None:
        if self.state is SandboxState.STOPPED:
            raise SandboxGone("the sandbox ended", cause=self.gone_because, remediation="create a new sandbox")
        if self.state in (SandboxState.PAUSED, SandboxState.QUARANTINED):
            raise InvalidTransition(f"the sandbox is {self.state}", remediation="resume() it first")
        if self.state is not SandboxState.RUNNING:
            self.state = move(self.state, SandboxState.RUNNING)
        self._active += 1

    def _leave(self) -> None:
        self._active -= 1
        if self._active == 0 and self.state is SandboxState.RUNNING:
            self.state = move(self.state, SandboxState.READY)

    def _reading(self) -> tuple[Stats, bool]:
        """The accounts, and whether the disk is full."""
        return self._last_reading or (self.handle.stats(), self.handle.disk_is_full())

    def _result(
        self,
        done: Followed,
        before: Stats,
        refused: Counter[tuple[str, str]],
        attempts: Counter[ConnectionAttempt],
        deadline_s: float,
    ) -> Result:
        self.handle.told(done.capture.account)
        after, disk_full = self._reading()
        calls = tuple(RefusedSyscall(name, n, arch) for (name, arch), n in refused.most_common())
        exit_code = done.number("exit_code")
        facts = Facts(
            done.ended,
            before,
            after,
            disk_full=disk_full,
            refused=calls,
            egress_denied=sum(attempts.values()),
            deadline_s=deadline_s,
            gone_because=self.gone_because or done.gone_because,
            outcome=str(done.end.get("outcome", "ok")),
            exit_code=exit_code,
            signal=done.number("signal"),
        )
        status, cause = decide(facts, self.spec.limits)
        capture = done.capture
        return Result(
            status=status,
            cause=cause,
            exit_code=exit_code if exit_code is not None else 0 if status == "ok" else None,
            stdout=capture.text("stdout"),
            stderr=capture.text("stderr"),
            stdout_truncated="stdout" in capture.truncated,
            stderr_truncated="stderr" in capture.truncated,
            results=tuple(capture.results),
            error=capture.error,
            changes=done.changes(),
            usage=used(before, after, done.execute_s),
            refused_syscalls=calls,
            connections=tuple(ConnectionAttempt(a.address, a.port, a.protocol, a.allowed, n) for a, n in attempts.items()),
            protections=self.handle.protections,
            timings=Timings(create_ms=self.create_ms, execute_ms=done.execute_s * 1e3),
            sandbox_id=self.id,
            context=done.end.get("context"),
            execution_count=capture.execution_count,
        )

    async def pause(self) -> None:
        self.state = move(self.state, SandboxState.PAUSED)
        await self.handle.pause()

    async def resume(self) -> None:
        self.state = move(self.state, SandboxState.RUNNING if self._active else SandboxState.READY)
        await self.handle.resume()

    async def kill(self, cause: str = "killed by its owner") -> None:
        """End every process, now. The state and the accounts stay readable until close().

        Returns after at most _KILL_WAIT_S: the kernel may need longer to take down a hundred GiB of page tables, which
        must not stretch a deadline (H17); close() waits for it.
        """
        if self.state is not SandboxState.STOPPED:
            self.gone_because = cause
            self.state = move(self.state, SandboxState.STOPPED)
            self._ending = asyncio.create_task(self.handle.kill())
            await asyncio.wait({self._ending}, timeout=_KILL_WAIT_S)
            self.link.lose(cause)

    async def bind(self, spec: SandboxSpec) -> None:
        """Make an anonymous sandbox its claimer's: limits by the host, env by its agent, whose answer shows that it lives.

        `spec` may differ from the one it was made with only in env and the runtime's `late_limits`.
        """
        if spec.limits != self.spec.limits:
            await self.handle.limit(spec.limits)
        await self.link.call("bind", env=dict(spec.env), **self.handle.identity(spec))
        self.spec = spec

    async def checkpoint(self, context: str | None = None) -> str:
        """Of a Python context (None: the first) and the home directory. The name to give to rollback()."""
        if context is None:
            contexts = (await self.link.call("context.list"))["contexts"]
            context = next((str(c["id"]) for c in contexts if c["language"] == "python"), "python")
        return f"{context}:{(await self.link.call('context.checkpoint', id=context))['checkpoint']}"

    async def rollback(self, checkpoint: str) -> None:
        context, _, name = checkpoint.partition(":")
        await self.link.call("context.rollback", id=context, checkpoint=name)

    def expire_after(self, seconds: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        loop, cause = asyncio.get_running_loop(), f"its lifetime of {seconds:g} s is over"
        self._expiry = loop.call_later(seconds, lambda: loop.create_task(self.kill(cause)))

    async def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        await self.kill("closed")
        if self._ending is not None:
            await self._ending
        # For what ran: it may end after this, for its listener may have stopped reading, and nobody here waits for that.
        self._last_reading = self._reading()
        await self.link.aclose()
        await self.handle.aclose()


async def _feed(stream: Any, data: bytes | None) -> None:
    if data is not None:
        with contextlib.suppress(SandboxGone):  # whoever follows the stream is told
            await stream.send(data)
            await stream.close_input()


def _tally(counter: Counter[Any], key: Any) -> None:
    if key in counter or len(counter) < _MAX_DISTINCT:
        counter[key] += 1


def _check_code(code: str) -> None:
    size = len(code.encode("utf-8", "surrogatepass"))
    if size > MAX_CODE_BYTES:
        raise InvalidInput(
            f"the code has {size} bytes",
            cause=f"the limit is {MAX_CODE_BYTES}",
            remediation="write data to a file with files.write() and read it in the code",
        )
    if "\0" in code:
        raise InvalidInput("the code has a NUL byte", remediation="remove it: no language here accepts one")
