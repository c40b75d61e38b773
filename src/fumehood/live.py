"""One live sandbox: its handle, its link, its state and the tally of what was refused."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from fumehood.errors import InvalidInput, InvalidTransition, SandboxGone
from fumehood.execution import Capture, Followed, Sinks, check_code, feed, follow
from fumehood.model import CodeRequest, ExecRequest, Result, SandboxSpec, SandboxState, move
from fumehood.runtime.base import Handle, Stats
from fumehood.runtime.link import Link
from fumehood.tally import Tally
from fumehood.verdict import Seen, result_of

_KILL_WAIT_S = 1.0
_LEAST_S = 0.001  # that a run has left, however long it waited
COPIED = "the sandbox was copied: attach again"


class Live:
    """`join` makes the link to the agent of a handle."""

    def __init__(self, sandbox_id: str, spec: SandboxSpec, tier: str, join: Callable[[Handle], Awaitable[Link]]) -> None:
        self.id, self.spec, self.tier = sandbox_id, spec, tier
        self.state = SandboxState.CREATING
        self.handle: Handle
        self.link: Link
        self.create_ms, self.gone_because = 0.0, ""
        self._join, self._active = join, 0
        # Held while it is copied, rolled back, paused or resumed, and at the beginning of each execution.
        self._moving = asyncio.Lock()
        self._last_readings = WeakKeyDictionary[Handle, tuple[Stats, bool]]()  # of handles that are closed
        self._tally = Tally()
        self.note = self._tally.note
        self._expiry: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def is_paused(self) -> bool:
        return self.state in (SandboxState.PAUSED, SandboxState.QUARANTINED)

    async def run(self, request: CodeRequest, sinks: Sinks) -> Result:
        """Code in a context. Raises InvalidInput for code that can't be code, NotFound for an unknown context."""
        check_code(request.code)
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
        deadline_s, asked_at = self.deadline(timeout_s), time.monotonic()
        with contextlib.ExitStack() as undo:  # also when the caller left
            async with self._moving:
                handle, link = self.handle, self.link  # a rollback gives it others, and ends what runs in these
                (before, _), tally = self._reading(handle), self._tally.copy()
                self._enter()
                undo.callback(self._leave)
            left_s = max(_LEAST_S, deadline_s - (time.monotonic() - asked_at))
            stream = await link.open(verb, **arguments)
            undo.callback(asyncio.create_task(feed(stream, stdin)).cancel)
            done = await follow(link, stream, verb, Capture(self.spec.limits, sinks), left_s, self.kill, handle.grace)
        return self._result(handle, done, before, tally, deadline_s)

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

    def check_alive(self) -> None:
        if self.state is SandboxState.STOPPED:
            raise SandboxGone("the sandbox ended", cause=self.gone_because, remediation="create a new sandbox")

    def _enter(self) -> None:
        self.check_alive()
        if self.is_paused:
            raise InvalidTransition(f"the sandbox is {self.state}", remediation="resume() it first")
        if self.state is not SandboxState.RUNNING:
            self.state = move(self.state, SandboxState.RUNNING)
        self._active += 1

    def _leave(self) -> None:
        self._active -= 1
        if self._active == 0 and self.state is SandboxState.RUNNING:
            self.state = move(self.state, SandboxState.READY)

    def _reading(self, handle: Handle) -> tuple[Stats, bool]:
        """The accounts, and whether the disk is full."""
        return self._last_readings.get(handle) or (handle.stats(), handle.disk_is_full())

    def _result(self, handle: Handle, done: Followed, before: Stats, tally: Tally, deadline_s: float) -> Result:
        handle.told(done.capture.account)
        after, disk_full = self._reading(handle)
        seen = Seen(before, after, disk_full, *self._tally.since(tally), deadline_s, self.gone_because)
        result = result_of(done, seen, self.spec.limits, tuple(handle.protections))
        return replace(result, sandbox_id=self.id, timings=replace(result.timings, create_ms=self.create_ms))

    async def pause(self) -> None:
        async with self._moving:
            self.state = move(self.state, SandboxState.PAUSED)
            await self.handle.pause()

    async def resume(self) -> None:
        async with self._moving:
            self.state = move(self.state, SandboxState.RUNNING if self._active else SandboxState.READY)
            await self.handle.resume()
            if self.link.detached:  # it was copied while it was paused
                await self._relink()

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

    # -- copies of the whole (supervisor.py)

    @contextlib.asynccontextmanager
    async def still(self) -> AsyncGenerator[None]:
        """In here nothing begins in it, nobody else pauses, resumes, copies or rolls it back. Raises SandboxGone."""
        async with self._moving:
            self.check_alive()
            yield

    @contextlib.asynccontextmanager
    async def copied(self) -> AsyncGenerator[None]:
        """The same, for who copies it in here. Its link is cut before, for a guest may lose connections by being copied, and
        made anew afterwards. Raises InvalidTransition too, when something runs in it.
        """
        async with self.still():
            if self._active:
                raise _busy(self._active)
            self.link.detach(COPIED)
            try:
                yield
            finally:
                await self._relink()

    async def _relink(self) -> None:
        """Contexts and programs are as they were. What is paused answers nobody: then resume() does this."""
        await self.link.aclose()
        if self.is_paused or self.state is SandboxState.STOPPED:
            return
        try:
            self.link = await self._join(self.handle)
        except Exception as e:
            await self.kill(f"its agent did not come back: {e}")
            raise
        if self.gone_because:  # meanwhile
            self.link.lose(self.gone_because)

    async def replace(self, handle: Handle, link: Link, cause: str) -> None:
        """In still(): go on as another machine, bound, and paused as this one is. What ran ends, and is told why."""
        old, self.handle = self.handle, handle
        old_link, self.link = self.link, link
        old_link.detach(cause)
        if self.gone_because:  # since the caller looked: it was the old one that was killed then
            await handle.kill()
        await old.kill()
        await self._put_away(old, old_link)

    async def wait_dead(self) -> None:
        """Returns when it has ended, whatever machine it was then."""
        while True:
            handle = self.handle
            await handle.wait_dead()
            if handle is self.handle:
                return

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
        await self._put_away(self.handle, self.link)

    async def _put_away(self, handle: Handle, link: Link) -> None:
        # For what ran: it may end after this, for its listener may have stopped reading, and nobody here waits for that.
        self._last_readings[handle] = self._reading(handle)
        await link.aclose()
        await handle.aclose()


def _busy(n_active: int) -> InvalidTransition:
    busy = InvalidTransition(
        "an execution runs in the sandbox",
        cause=f"{n_active} of them would be cut off",
        remediation="try again when it has ended",
    )
    busy.retryable = True
    return busy
