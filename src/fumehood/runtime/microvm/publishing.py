"""Assets whose files are made in the loop, by monitors, while a thread waits to write down what they are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fumehood.runtime.microvm.assets import Assets, Facts, Manifest


async def publish(
    assets: Assets, name: str, fill: Callable[[Path], Awaitable[Facts]], need_bytes: int, known: Iterable[Manifest]
) -> Manifest:
    """A snapshot of whatever `fill` puts into its directory. Raises what Assets.publish and `fill` raise."""
    loop = asyncio.get_running_loop()

    async def filled(directory: Path) -> Facts:
        return await fill(directory)

    def make(directory: Path) -> Facts:
        return asyncio.run_coroutine_threadsafe(filled(directory), loop).result()

    # A thread of its own: those of the loop's pool are what `fill` may have to wait for, and a few of these would take all.
    thread = ThreadPoolExecutor(1, "fumehood-publish")
    try:
        return await loop.run_in_executor(thread, lambda: assets.publish("snapshots", name, make, need_bytes, known))
    finally:
        thread.shutdown(wait=False)
