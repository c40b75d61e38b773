"""One supervisor for each process, in a loop of its own on a background thread.

So one zygote serves every Sandbox of the process, a caller that blocks its own event loop stalls no other sandbox, and
notebooks, threads and short asyncio.run() calls all work. After os.fork() the child gets an engine of its own on first
use; the parent's sandboxes stay the parent's.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Protocol, TypeVar, cast

from fumehood.config import Config
from fumehood.model import SandboxSpec
from fumehood.runtime.tiers import TIERS
from fumehood.supervisor import Supervisor

T = TypeVar("T")


class Shared(Protocol):
    async def aclose(self) -> None: ...


S = TypeVar("S", bound=Shared)


class Engine:
    """Use `Engine.of_this_process()`; `submit` runs a coroutine in its loop from any thread."""

    _current: Engine | None = None
    _making = threading.Lock()

    def __init__(self, config: Config) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fumehood", daemon=True)
        self._thread.start()
        self.supervisor: Supervisor = Supervisor(config, TIERS)
        self._shared: dict[Hashable, Shared] = {}
        self.kept_specs: dict[str, SandboxSpec] = {}  # of the snapshots that this process made, by id
        atexit.register(self.close)

    @classmethod
    def of_this_process(cls, config: Config | None = None) -> Engine:
        with cls._making:
            if cls._current is None:
                cls._current = cls(config or Config.load())
            return cls._current

    @classmethod
    def _forget(cls) -> None:
        """In the child of a fork: the thread is not there, and the parent's sandboxes are not ours to end."""
        if cls._current is not None:
            atexit.unregister(cls._current.close)
        cls._current, cls._making = None, threading.Lock()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def shared(self, key: Hashable, make: Callable[[], S]) -> S:
        """One for each key: the connections that all sandboxes of a process have in common. In its loop only."""
        if key not in self._shared:
            self._shared[key] = make()
        return cast("S", self._shared[key])

    def close(self) -> None:
        """End every sandbox of this process and give everything back. Also runs at exit."""
        with Engine._making:
            if Engine._current is self:
                Engine._current = None
        atexit.unregister(self.close)
        if not self._thread.is_alive():
            return
        self.submit(self._end()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _end(self) -> None:
        """What is still under way first: a creation that was cancelled has things to give back."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for shared in self._shared.values():
            await shared.aclose()
        await self.supervisor.aclose()


os.register_at_fork(after_in_child=Engine._forget)  # pyright: ignore[reportPrivateUsage]
