"""One real server for each test file, with the native tier behind it, in a thread: the SDK's synchronous half blocks."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from e2b_code_interpreter import Sandbox
from e2b_server import Server, authenticate, beyond
from fumehood.service import Service

from fumehood.config import Config
from fumehood.gateway import e2b


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory: Path = tmp_path_factory.mktemp("e2b")
    started, box = threading.Event(), list[Any]()
    config = dataclasses.replace(Config.load(), state_dir=directory, pool_floor=0, pool_policies="", max_upload_bytes=8 << 20)

    async def main() -> None:
        async with await Service.open(config) as service:
            app = e2b.route(beyond, service, authenticate)
            http = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error", timeout_graceful_shutdown=1))
            serving = asyncio.create_task(http.serve())
            while not http.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
            port = http.servers[0].sockets[0].getsockname()[1]
            stop = asyncio.Event()
            box.extend([Server(f"http://127.0.0.1:{port}", service, asyncio.get_running_loop()), stop])
            started.set()
            await stop.wait()
            http.should_exit = True
            await serving

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="server")
    thread.start()
    while not started.wait(0.1):
        assert thread.is_alive(), "the server did not start"
    yield box[0]
    box[0].loop.call_soon_threadsafe(box[1].set)
    thread.join()


@pytest.fixture
def make(server: Server) -> Iterator[Callable[..., Sandbox]]:
    made: list[Sandbox] = []

    def create(**options: Any) -> Sandbox:
        made.append(Sandbox.create(**{"template": "python", **server.options(), **options}))
        return made[-1]

    yield create
    for sandbox in made:
        sandbox.kill()


@pytest.fixture(scope="module")
def box(server: Server) -> Iterator[Sandbox]:
    """One for the tests of a file that leave it as it was."""
    sandbox = Sandbox.create(template="python", **server.options())
    yield sandbox
    sandbox.kill()
