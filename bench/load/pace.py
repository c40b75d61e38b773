"""Open loop: work starts at its times whatever the server does, so that a slow server does not slow its own test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from bench.figures import percentile

Work = Callable[[], Coroutine[Any, Any, None]]


class Pace:
    """`lags_ms`: how late each start was, which is the generator's own fault; `failures`: its own exceptions."""

    def __init__(self) -> None:
        self.started = 0
        self.most = 0
        self.lags_ms: list[float] = []
        self.failures: list[str] = []
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float, per_s: float, make: Work) -> None:
        began = time.monotonic()
        for n in range(int(seconds * per_s)):
            due = began + n / per_s
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            self.lags_ms.append((time.monotonic() - due) * 1e3)
            self._start(make())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self.started += 1
        task = asyncio.create_task(work)
        self._running.add(task)
        self.most = max(self.most, len(self._running))
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (e := task.exception()):
            self.failures.append(f"{type(e).__name__}: {e}"[:400])

    async def drain(self, seconds: float) -> int:
        """Wait for what runs; how many did not end in that time, which are given up."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)
        left = list(self._running)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return len(left)

    def report(self) -> dict[str, Any]:
        late = {f"p{p}": round(percentile(self.lags_ms, p), 2) for p in (50, 99, 100)} if self.lags_ms else {}
        return {"started": self.started, "at_once_most": self.most, "late_ms": late, "failures": self.failures[:10]}
