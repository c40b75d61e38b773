"""What the MCP tests look at."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcp.types import CallToolResult


def text(answer: CallToolResult) -> str:
    return "\n".join(block.text for block in answer.content if block.type == "text")


def marked(marker: str) -> list[int]:
    """Processes whose command line holds `marker`: those of one test's sandboxes."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


async def until(true: Callable[[], Any], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 # processes of the host tell nobody when they end
            await asyncio.sleep(0.05)
