"""What an agent that was taken over says to files.list: it never stops, or says what is no listing (H15, H16)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from fumehood.agent import wire
from fumehood.gateway.listing import MAX_ENTRIES, listed
from fumehood.runtime.link import Link

LARGE = {"path": "x" * (8 << 20)}


@contextlib.asynccontextmanager
async def says(*events: dict[str, Any], ends: bool) -> AsyncGenerator[Link]:
    """A link to an agent that answers whatever is asked by these, again and again unless it `ends`."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs)

    async def answer() -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(wire.encode_json(0, wire.HELLO, {"generation": wire.GENERATION}))
            await reader.readexactly(wire.HEADER_BYTES)
            while True:
                for event in events:
                    writer.write(wire.encode_json(1, wire.EVENT, event))
                    await writer.drain()
                if ends:
                    writer.write(wire.encode_json(1, wire.END, {"ok": {}}))
                    return

    link = Link(*await asyncio.open_unix_connection(sock=ours))
    answering = asyncio.create_task(answer())
    try:
        await link.start(10)
        yield link
    finally:
        await link.aclose()
        answering.cancel()
        await asyncio.wait({answering})
        writer.close()


@pytest.mark.parametrize("entries", [[{}] * 5_000, [LARGE]], ids=["small", "large"])
async def test_an_endless_listing_is_cut(entries: list[dict[str, Any]]) -> None:
    async with says({"entries": entries}, ends=False) as link, asyncio.timeout(60):
        found, truncated = await listed(link, "/", 1)
    assert truncated and len(found) <= MAX_ENTRIES
    assert len(json.dumps(found)) < 160 << 20


@pytest.mark.parametrize("entries", [5, "text", {"a": 1}, None, [5, None, "x"]])
async def test_what_is_no_listing_has_no_entries(entries: object) -> None:
    async with says({"entries": entries}, {"entries": [{"path": "/a"}]}, ends=True) as link, asyncio.timeout(60):
        found, truncated = await listed(link, "/", 1)
    assert found[-1] == {"path": "/a"} and not truncated
    assert not any(found[:-1])
