"""`fumehood mcp`: the tools for an AI client, on stdin and stdout. Nothing but the protocol may be printed there."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from fumehood.cli import exits


def mcp(
    policy: Annotated[str | None, typer.Option(help="Preset or file for every sandbox; clients can't choose another.")] = None,
    url: Annotated[str | None, typer.Option(help="A running fumehood server; its key is read from FUMEHOOD_API_KEY.")] = None,
) -> None:
    """Serve the Model Context Protocol on stdin and stdout: run code, commands and files in sandboxes of the session."""
    sandbox = {name: value for name, value in (("policy", policy), ("url", url)) if value is not None}
    exits.drive(_serve(sandbox))


async def _serve(sandbox: dict[str, Any]) -> int:
    try:
        from fumehood.mcp.server import serve_stdio
    except ModuleNotFoundError as missing:
        exits.complain(f"{missing.name} is not installed", "the MCP server needs it", "in the checkout: pip install '.[mcp]'")
        return exits.FAILED
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)  # before the SDK sets up frames drawn for a wide terminal
    await serve_stdio(**sandbox)
    return 0
