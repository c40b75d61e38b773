"""Streams that were left, in the server's own loop: nothing of them goes on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from e2b_code_interpreter import AsyncSandbox

from fumehood.config import Config
from fumehood.gateway.app import create_app
from fumehood.gateway.auth import Authenticator
from fumehood.gateway.server import bind, serve
from fumehood.service import Service

KEY = "e2b_" + "0123456789abcdef" * 4


async def _nothing() -> None: ...


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    tmp_path.chmod(0o700)
    config = dataclasses.replace(Config.load(), state_dir=tmp_path, pool_floor=0, pool_policies="")
    stopping, sock = asyncio.Event(), bind("127.0.0.1:0")
    async with await Service.open(config) as service:
        app = create_app(service, Authenticator(service, (KEY,)))
        serving = asyncio.create_task(serve(app, sock, config, stopping=stopping, drained=_nothing))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        stopping.set()
        await serving


async def test_streams_that_were_left_leave_nothing_behind(url: str) -> None:
    box = await AsyncSandbox.create(template="python", api_key=KEY, api_url=url, sandbox_url=url)
    await box.run_code("1")
    before = len(asyncio.all_tasks())
    for _ in range(5):
        await (await box.commands.run("sleep 30", background=True)).disconnect()
        await (await box.files.watch_dir("/tmp", on_event=print)).stop()
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110 - nobody tells when a task is gone
            await asyncio.sleep(0.05)
    assert len(await box.commands.list()) == 5, "the programs themselves go on"
    await box.kill()
