"""The bridge between a caller and the engine's loop, once for each face; everything else is written once, async."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fumehood.client.engine import Engine
from fumehood.execution import Sinks
from fumehood.model import RichResult

T = TypeVar("T")
OnText = Callable[[str], Any]
OnResult = Callable[[RichResult], Any]
_Call = tuple[Callable[..., Any], Any]


async def await_engine(engine: Engine, work: Coroutine[Any, Any, T]) -> T:
    """Cancelling the caller's task cancels the work in the engine, and with it the process that it follows."""
    return await asyncio.wrap_future(engine.submit(work))


def block_on(engine: Engine, work: Coroutine[Any, Any, T]) -> T:
    future = engine.submit(work)
    try:
        return future.result()
    except BaseException:  # Ctrl-C above all: the run must not go on behind the caller's back
        future.cancel()
        raise


def _sinks(
    put: Callable[[_Call], None], on_stdout: OnText | None, on_stderr: OnText | None, on_result: OnResult | None
) -> Sinks:
    def output(name: str, text: str) -> None:
        callback = on_stdout if name == "stdout" else on_stderr
        if callback is not None:
            put((callback, text))

    return Sinks(output if on_stdout or on_stderr else None, (lambda r: put((on_result, r))) if on_result else None)


Work = Callable[[Sinks], Coroutine[Any, Any, T]]


async def await_with_callbacks(
    engine: Engine, work: Work[T], on_stdout: OnText | None, on_stderr: OnText | None, on_result: OnResult | None
) -> T:
    """Callbacks, plain or async, run in the caller's loop, in order, before this returns."""
    if not (on_stdout or on_stderr or on_result):
        return await await_engine(engine, work(Sinks()))
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[_Call | None]()
    sinks = _sinks(lambda c: void(loop.call_soon_threadsafe(arrived.put_nowait, c)), on_stdout, on_stderr, on_result)
    task = asyncio.ensure_future(await_engine(engine, work(sinks)))
    task.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (call := await arrived.get()) is not None:
            outcome = call[0](call[1])
            if isinstance(outcome, Awaitable):
                await outcome
        return await task
    finally:
        task.cancel()


def block_with_callbacks(
    engine: Engine, work: Work[T], on_stdout: OnText | None, on_stderr: OnText | None, on_result: OnResult | None
) -> T:
    """Callbacks run in the calling thread, in order, before this returns."""
    if not (on_stdout or on_stderr or on_result):
        return block_on(engine, work(Sinks()))
    arrived: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
    future: concurrent.futures.Future[T] = engine.submit(work(_sinks(arrived.put, on_stdout, on_stderr, on_result)))
    future.add_done_callback(lambda _: arrived.put(None))
    try:
        while (call := arrived.get()) is not None:
            call[0](call[1])
        return future.result()
    except BaseException:
        future.cancel()
        raise


def void(_value: object) -> None:
    return None
