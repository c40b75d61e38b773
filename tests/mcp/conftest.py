"""The official MCP client against the real server: as a process over stdio, and over HTTP on a port of its own."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from mcp_seen import until

from fumehood.mcp.server import HttpApp, http_app
from mcp import StdioServerParameters


@pytest.fixture
def stdio(tmp_path: Path) -> Callable[..., StdioServerParameters]:
    def parameters(*options: str) -> StdioServerParameters:
        command = ["-c", "from fumehood.cli import main; main()", "mcp", *options]
        own = {"FUMEHOOD_STATE_DIR": str(tmp_path / "state"), "FUMEHOOD_RUN_DIR": str(tmp_path / "run")}
        return StdioServerParameters(command=sys.executable, args=command, env={**os.environ, **own}, cwd=tmp_path)

    return parameters


Serve = Callable[..., AbstractAsyncContextManager[str]]


@pytest.fixture
def serve() -> Serve:
    @asynccontextmanager
    async def serving(sandbox_for: Any = lambda headers: {}, **options: Any) -> AsyncIterator[str]:
        app: HttpApp = http_app(sandbox_for, **options)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
            task = asyncio.ensure_future(server.serve(sockets=[listening]))
            await until(lambda: server.started or task.done())
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
            finally:
                server.should_exit = True
                await task

    return serving
