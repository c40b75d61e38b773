"""What is below a directory, in memory that has a bound whatever the agent sends (H15)."""

from __future__ import annotations

from typing import Any, cast

from fumehood.agent import wire
from fumehood.gateway.call import leave
from fumehood.runtime.link import Link

MAX_ENTRIES = 100_000  # as the agent has it
_MAX_BYTES = 128 << 20  # a hundred thousand with short paths take less
_ITEM_BYTES = 64  # what a value takes once parsed, beside its text


async def listed(link: Link, path: str, depth: int, max_entries: int = MAX_ENTRIES) -> tuple[list[dict[str, Any]], bool]:
    """Its entries, and whether there are more. Raises what the agent answers."""
    stream, found, size_bytes = await link.open("files.list", path=path, depth=depth), list[dict[str, Any]](), 0
    try:
        async for frame in stream:
            size_bytes += len(frame.payload) + _ITEM_BYTES * wire.json_items(frame.payload)
            rows = link.checked_json(frame).get("entries")
            found += [wire.table(row) for row in cast("list[object]", rows)] if isinstance(rows, list) else []
            if len(found) > max_entries or size_bytes > _MAX_BYTES:
                return found[:max_entries], True
        return found, bool(stream.ok.get("truncated"))
    finally:
        await leave(stream)
