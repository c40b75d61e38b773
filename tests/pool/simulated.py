"""An event loop whose time passes only when everybody waits, and then at once: hours of the pool in a second, the same each time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class _Selector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits for ever")
        self.now += timeout
        return super().select(0)


def simulate(work: Callable[[Callable[[], float]], Coroutine[Any, Any, Any]]) -> Any:
    """Runs `work(clock)` to its end. Raises RuntimeError when nothing could ever happen again, AssertionError for tasks left."""
    selector = _Selector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]

    async def whole() -> Any:
        result = await work(loop.time)
        await asyncio.sleep(0)  # done callbacks
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(whole())
