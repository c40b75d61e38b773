"""Server-sent events, as far as fumehood sends them: `event:` and one `data:` line of JSON; comments keep it alive."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from fumehood.client import answers


async def events(url: str, chunks: AsyncIterable[bytes], limit_bytes: int) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """(event, data) each. An unfinished event of more than `limit_bytes` is refused."""
    held, kind = bytearray(), ""
    async for chunk in chunks:
        seen = len(held)
        held += chunk
        if b"\n" not in chunk:
            if len(held) > limit_bytes:
                raise answers.not_ours(url, f"an event has more than {limit_bytes} bytes")
            continue
        end = held.rindex(b"\n", seen) + 1
        lines, held = bytes(held[:end]).splitlines(), held[end:]
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"event":
                kind = value.strip().decode("utf-8", "replace")
            elif name == b"data":
                data = answers.parsed(url, value)
                yield kind or str(data.get("event")), data
                kind = ""
