"""An event loop whose time passes only when everybody waits, and then at once: hours in a second, the same each time."""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

Clock = Callable[[], float]


class _Selector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits for ever")
        self.now += timeout
        return super().select(0)


def simulate(work: Callable[[Clock], Coroutine[Any, Any, Any]]) -> Any:
    """Runs `work(clock)` to its end. RuntimeError: nothing could ever happen again. AssertionError: it left tasks behind."""
    selector = _Selector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]

    async def whole() -> Any:
        result = await work(loop.time)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(whole())


def simulated(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The same for a test: its first argument is the clock, others are pytest's."""

    @functools.wraps(test)
    def run(**params: Any) -> None:
        simulate(lambda clock: test(clock, **params))

    signature = inspect.signature(test)
    run.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return run
