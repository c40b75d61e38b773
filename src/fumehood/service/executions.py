"""Executions: each has one record from its arrival to its end, waits for its turn, and can be cancelled by its id."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError

from fumehood.errors import FumehoodError, NotFound
from fumehood.model import KIB, MIB, Result, Status
from fumehood.records import ExecutionKind, ExecutionRecord
from fumehood.scheduler import Grant
from fumehood.store import Store

_log = logging.getLogger("fumehood.service")
_RESULT = TypeAdapter(Result)
MAX_KEPT_BYTES = 8 * MIB  # of a result, as JSON, in the history; whoever waits for it gets all of it
_CUT_CHARS = 128 * KIB  # of a stream or a traceback that is cut: a character takes up to 12 bytes of JSON

Work = Callable[[], Awaitable[Result]]


def new_id() -> str:
    return "e" + secrets.token_hex(12)


def to_json(result: Result) -> bytes:
    """As `fumehood run --json` prints it. Names of files may hold what is no Unicode: those go the slower way, escaped."""
    try:
        return _RESULT.dump_json(result)
    except PydanticSerializationError:
        import json

        text = json.dumps(_RESULT.dump_python(result))
        return json.dumps(json.loads(text, parse_constant=lambda _: None)).encode()  # NaN is null, as on the fast way


@dataclass(eq=False)
class Running:
    record: ExecutionRecord
    turn: Callable[[], Awaitable[Grant]]
    work: Work
    waited_ms: float = 0.0  # before it was begun here
    task: asyncio.Task[Result] | None = None
    cancelled: str = ""  # why, when it was cancelled from here: then the caller gets a result that says so
    is_over: bool = False
    started_at: float | None = None

    def stop(self) -> None:
        """Cancelled while its end is written, it would have none, in the records or for its caller."""
        if self.task is not None and not self.is_over:
            self.task.cancel()


class Executions:
    """`done` is told of each that ended. A Running is alive exactly as long as its record is not `done`."""

    def __init__(self, store: Store, done: Callable[[ExecutionRecord], None]) -> None:
        self._store, self._done = store, done
        self._alive: dict[str, Running] = {}

    def begin(
        self,
        tenant: str,
        sandbox_id: str,
        kind: ExecutionKind,
        turn: Callable[[], Awaitable[Grant]],
        work: Work,
        execution_id: str | None = None,
        waited_ms: float = 0.0,
    ) -> Running:
        """Recorded and on its way: `work` begins once `turn` has granted it. Raises CapacityExceeded when the disk does not
        keep up; then nothing was begun.
        """
        record = ExecutionRecord(execution_id or new_id(), sandbox_id, tenant, kind, "queued", time.time())
        self._store.begin_execution(record)
        running = self._alive[record.id] = Running(record, turn, work, waited_ms)
        running.task = asyncio.create_task(self._to_the_end(running))
        running.task.add_done_callback(_seen)
        return running

    async def result(self, running: Running) -> Result:
        """Raises what the work raised. Cancelling whoever waits here stops the program (the client went away)."""
        assert running.task is not None
        try:
            return await asyncio.shield(running.task)
        except asyncio.CancelledError:
            running.stop()
            await asyncio.wait({running.task})  # a second cancellation ends this, not the writing
            raise

    def cancel(self, tenant: str, execution_id: str, cause: str = "cancelled by its id") -> bool:
        """False when it is not alive (here) or has ended; its record then says how."""
        running = self._alive.get(execution_id)
        if running is None or running.record.tenant != tenant or running.is_over:
            return False
        running.cancelled = cause
        # Not at once: a task that is cancelled before its first step never gets to write how it ended.
        asyncio.get_running_loop().call_soon(running.stop)
        return True

    def alive(self, tenant: str | None, execution_id: str) -> ExecutionRecord | None:
        running = self._alive.get(execution_id)
        return running.record if running is not None and tenant in (None, running.record.tenant) else None

    async def stop_all(self) -> None:
        """Cancels what still runs, and returns when every record says so."""
        tasks = {running.task for running in self._alive.values() if running.task is not None}
        for running in list(self._alive.values()):
            self.cancel(running.record.tenant, running.record.id, "the server was stopped")
        if tasks:
            await asyncio.wait(tasks)

    def __len__(self) -> int:
        return len(self._alive)

    async def _to_the_end(self, running: Running) -> Result:
        try:
            result = await self._in_turn(running)
        except FumehoodError as e:
            status: Status = "killed" if e.code == "sandbox_gone" else "error"
            await self._finish(running, Result(status, str(e), sandbox_id=running.record.sandbox_id))
            raise
        except asyncio.CancelledError:
            cause = running.cancelled or "its caller went away"
            result = Result("cancelled", cause, sandbox_id=running.record.sandbox_id)
            await self._finish(running, result)
            if not running.cancelled:
                raise
        except Exception as e:  # a bug of ours: the record must not say for ever that it runs
            await self._finish(running, Result("error", f"internal: {e!r}", sandbox_id=running.record.sandbox_id))
            raise
        else:
            await self._finish(running, result)
        return result

    async def _in_turn(self, running: Running) -> Result:
        with await running.turn() as grant:
            running.started_at = time.time()
            running.record = replace(running.record, state="running", started_at=running.started_at)
            result = await running.work()
        return replace(result, timings=replace(result.timings, queue_ms=running.waited_ms + grant.queue_ms))

    async def _finish(self, running: Running, result: Result) -> None:
        running.is_over = True
        record = replace(running.record, state="done", finished_at=time.time(), status=result.status, cause=result.cause[:4096])
        try:
            write = partial(
                self._store.finish_execution,
                record.id,
                started_at=running.started_at,
                finished_at=record.finished_at or 0.0,
                status=result.status,
                cause=_unicode(record.cause),
                result=_kept(result),
            )
            await self._written(running.record, write)
        finally:
            del self._alive[record.id]
            self._done(record)

    async def _written(self, begun: ExecutionRecord, finish: Callable[[], Awaitable[None]]) -> None:
        try:
            await finish()
        except NotFound:  # the write that began it had failed, with nobody waiting for it
            self._store.begin_execution(begun)
            await finish()


def _kept(result: Result) -> str:
    text = to_json(result)
    return (text if len(text) <= MAX_KEPT_BYTES else to_json(_cut(result))).decode()


def _cut(result: Result) -> Result:
    error = result.error and replace(result.error, traceback=result.error.traceback[-_CUT_CHARS:])
    cut = replace(result, results=(), changes=(), context=None, error=error)
    cut = replace(cut, stdout=result.stdout[-_CUT_CHARS:], stderr=result.stderr[-_CUT_CHARS:])
    return replace(cut, stdout_truncated=True, stderr_truncated=True)


def _unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _seen(task: asyncio.Task[Result]) -> None:
    """Of a background execution nobody else asks: its record says it all."""
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, FumehoodError):
        _log.error("an execution failed inside", exc_info=error)


def unknown(execution_id: str) -> NotFound:
    return NotFound(f"no execution {execution_id[:40]!r}", remediation="list them; old ones are forgotten")
