"""A file on its way into a sandbox: streamed, and no byte of it rests on the host."""

from __future__ import annotations

import asyncio
from typing import Any

from fumehood.agent import wire
from fumehood.runtime.link import Link


class Writing:
    """One files.write. A failure inside (no space) is seen at the next write, not after the last of a gigabyte."""

    def __init__(self, link: Link, path: str, mode: int | None = None) -> None:
        self._link, self._given = link, {"path": path} if mode is None else {"path": path, "mode": mode}

    async def open(self) -> Writing:
        self._stream = await self._link.open("files.write", **self._given)
        self._ending = asyncio.create_task(self._stream.result())
        return self

    async def write(self, data: bytes) -> None:
        if self._ending.done():
            self._ending.result()
        await self._stream.send(data, wire.FILE)

    async def finish(self) -> dict[str, Any]:
        """Its entry."""
        await self._stream.close_input()
        return wire.table((await self._ending).get("entry"))

    async def abandon(self) -> None:
        """Half of a new file is worse than none: the agent removes it."""
        if not self._ending.done():
            if not self._link.lost:
                await self._stream.cancel()
            self._ending.cancel()
        await asyncio.wait({self._ending})
        self._stream.abandon()
